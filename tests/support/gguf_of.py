"""A transformers model as the GGUF file that llama.cpp's converter makes of it.

The `gguf` package's own table gives the names, so a wrong name in an architecture's list shows.
What the converter does with metadata and values, a test states by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from tests.support import tiny_gguf

VOCAB = len(tiny_gguf.byte_level_vocab()[0])
Values = np.ndarray
# What the tiny configurations share, and the metadata of their heads.
COMMON: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": None,
}
HEAD = {"attention.key_length": 32, "attention.value_length": 32}


@dataclass(frozen=True)
class Case:
    """A configuration of transformers, and what the converter makes of it."""

    config: transformers.PretrainedConfig
    arch: str
    numbers: dict[str, Any] = field(default_factory=dict)
    lists: dict[str, Any] = field(default_factory=dict)  # and what else is no number
    stored: Callable[[str, Any], Any] = lambda name, values: values
    extra: dict[str, Any] = field(default_factory=dict)


def write(
    path: Path,
    model: torch.nn.Module,
    arch: str,
    numbers: dict[str, Any],
    *,
    lists: dict[str, Any] | None = None,
    stored: Callable[[str, Values], Values] = lambda name, values: values,
    extra: dict[str, Values] | None = None,
    fuse_qkv: bool = False,
    fuse_experts: bool = False,
    quantized: frozenset[str] = frozenset(),
) -> None:
    """Write `model`, of VOCAB tokens.

    Args:
        path: of the file.
        model: a transformers model with fp32 weights.
        arch: the format's name of the architecture.
        numbers: metadata under the name, beside those that every decoder has.
        lists: arrays under the name.
        stored: what the file holds of a tensor, by its Hugging Face name.
        extra: tensors of the file alone, by their names there.
        fuse_qkv: q, k and v are one tensor.
        fuse_experts: gate and up of experts are one tensor.
        quantized: tensors that become Q8_0, by their names there.
    """
    config: Any = model.config
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tensors = {}
    for name, values in _converted(model):
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known, f"the gguf package does not know {name}"
        tensors[known] = np.ascontiguousarray(stored(name, values))
    for name in [name for name in tensors if fuse_experts and ".ffn_gate_exps." in name]:
        parts = [tensors.pop(name.replace("gate", part)) for part in ("gate", "up")]
        tensors[name.replace("gate", "gate_up")] = np.concatenate(parts, axis=1)
    for name in [name for name in tensors if fuse_qkv and ".attn_q." in name]:
        parts = [tensors.pop(name.replace("attn_q", f"attn_{part}")) for part in "qkv"]
        tensors[name.replace("attn_q", "attn_qkv")] = np.concatenate(parts)
    shared: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    tiny_gguf.write(
        path,
        arch=arch,
        numbers=shared | numbers,
        tensors=tensors | (extra or {}),
        quantized=quantized,
        meta={f"{arch}.{key}": value for key, value in (lists or {}).items()},
    )


def _converted(model: torch.nn.Module) -> Iterator[tuple[str, Values]]:
    """The model's tensors as the converter names and cuts them: gate and up of experts apart."""
    for name, parameter in model.named_parameters():  # a tied head is listed once
        values = parameter.detach().numpy()
        if ".mlp.experts." not in name:
            yield name + ".weight" * name.endswith(".sinks"), values
            continue
        is_gpt_oss = model.config.model_type == "gpt_oss"  # type: ignore[union-attr]
        suffix = "bias" if name.endswith("_bias") else "weight"
        name = name.removesuffix("_bias")
        if is_gpt_oss and suffix == "weight":
            values = values.swapaxes(1, 2)
        if name.endswith("down_proj"):
            yield f"{name}.{suffix}", values
            continue
        half = values.shape[1] // 2
        gate, up = slice(half), slice(half, None)
        if is_gpt_oss:
            gate, up = slice(0, None, 2), slice(1, None, 2)
        for part, rows in (("gate", gate), ("up", up)):
            yield f"{name.replace('gate_up', part)}.{suffix}", values[:, rows]
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            yield name.replace("_bias", ".bias"), buffer.detach().numpy()


def permuted(num_heads: int, num_kv_heads: int) -> Callable[[str, Values], Values]:
    """The converter's order of the rows of q and k."""
    heads = {"q_proj": num_heads, "k_proj": num_kv_heads}

    def stored(name: str, values: Values) -> Values:
        found = next((n for part, n in heads.items() if part in name), 0)
        return tiny_gguf.permute(values, found) if found else values

    return stored


def norms_plus_one(name: str, values: Values) -> Values:
    """The converter adds Gemma's 1."""
    return values + np.float32(1) if name.endswith("norm.weight") else values


def random_file(
    path: Path, case: Case, quantized: frozenset[str] = frozenset(), *, rounded: bool = True
) -> torch.nn.Module:
    """Write a random model of the case, and return it. `rounded`: bfloat16 holds its weights."""
    torch.manual_seed(3)
    make: Any = transformers.AutoModelForCausalLM.from_config
    reference: torch.nn.Module = make(
        case.config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
            if rounded:
                parameter.copy_(parameter.bfloat16())
        for name, buffer in reference.named_buffers():
            if "correction" in name:
                buffer.normal_(0.0, 0.15)
    how: dict[str, Any] = {"lists": case.lists, "stored": case.stored, "extra": case.extra}
    write(path, reference, case.arch, case.numbers, quantized=quantized, **how)
    return reference
