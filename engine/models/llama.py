"""Llama and Qwen2 (SmolLM2 and many others are Llamas).

They differ in what their configuration files leave to a default: biases and windows.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.models.architecture import Architecture, TensorSpec
from engine.models.config import ConfigReader, ModelConfig
from engine.models.config_keys import decoder_fields, qwen_windows
from engine.models.decoder import decoder_tensors, forward

LLAMA, QWEN2 = "LlamaForCausalLM", "Qwen2ForCausalLM"


def _read_llama(raw: ConfigReader) -> ModelConfig:
    attention_bias, mlp_bias = (bool(raw.get(f"{x}_bias", False)) for x in ("attention", "mlp"))
    return ModelConfig(
        LLAMA,
        **decoder_fields(raw),
        attention_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=mlp_bias,
    )


def _read_qwen2(raw: ConfigReader) -> ModelConfig:
    return ModelConfig(QWEN2, **decoder_fields(raw), attention_bias=True, **qwen_windows(raw))


def _tensors(c: ModelConfig) -> Iterator[TensorSpec]:
    # llama.cpp's converter reorders q and k of Llama models only.
    return decoder_tensors(c, permuted_heads=c.architecture == LLAMA)


ARCHITECTURES = (
    Architecture(LLAMA, "llama", _read_llama, _tensors, forward, gguf="llama"),
    Architecture(QWEN2, "qwen2", _read_qwen2, _tensors, forward, gguf="qwen2"),
)
