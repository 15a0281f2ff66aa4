"""Each architecture from a GGUF file: what transformers computes of the same weights."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from engine.checkpoint.config import read_config
from engine.checkpoint.packed import packed_file, read_packed
from engine.checkpoint.source import Checkpoint, resolve, weights
from engine.kernels import kernels
from engine.runner.loader import load_model
from engine.runner.native_model import NativeModel
from engine.runner.torch_model import TorchModel
from tests.support import dense_models, gguf_of
from tests.support.paged import CPU, Bench, bfloat16_kv
from tests.support.reference_model import logits_of

LIBRARY = kernels()
COMMON: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": gguf_of.VOCAB,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": None,
}
HEAD = {"attention.key_length": 32, "attention.value_length": 32}
DENSE = dense_models.MODELS
LONGROPE_ATTENTION = math.sqrt(1 + math.log(1024 / 4) / math.log(4))  # as the converter has it

WITHOUT_HEAD = {key: value for key, value in COMMON.items() if key != "head_dim"}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
EXPERT_NUMBERS = {"expert_count": 6, "expert_used_count": 3, "expert_feed_forward_length": 64}


@dataclass(frozen=True)
class Case:
    """A configuration of transformers, and what the converter makes of it."""

    config: transformers.PretrainedConfig
    arch: str
    numbers: dict[str, Any] = field(default_factory=dict)
    lists: dict[str, list[Any]] = field(default_factory=dict)
    stored: Callable[[str, Any], Any] = lambda name, values: values
    extra: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {
    "qwen3": Case(
        transformers.Qwen3Config(**COMMON, tie_word_embeddings=True),
        "qwen3",
        HEAD | {"rope.freq_base": 10000.0},
    ),
    "gemma 2": Case(
        transformers.Gemma2Config(**COMMON, sliding_window=13, query_pre_attn_scalar=32),
        "gemma2",
        {
            **HEAD,
            "attention.sliding_window": 13,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        stored=gguf_of.norms_plus_one,
    ),
    "gemma 3": Case(
        transformers.Gemma3TextConfig(
            **COMMON | {"num_hidden_layers": 7}, sliding_window=13, query_pre_attn_scalar=32
        ),
        "gemma3",
        HEAD | {"attention.sliding_window": 13, "rope.freq_base": 1e6},
        stored=gguf_of.norms_plus_one,
    ),
    "gemma 3, scaled, windows by a list": Case(
        transformers.Gemma3TextConfig(
            **COMMON,
            sliding_window=13,
            query_pre_attn_scalar=32,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        ),
        "gemma3",
        {
            **HEAD,
            "attention.sliding_window": 13,
            "rope.freq_base": 1e6,
            "rope.freq_base_swa": 500.0,
            "rope.scaling.factor": 8.0,
        },
        {"attention.sliding_window_pattern": [False, True, False]},
        stored=gguf_of.norms_plus_one,
    ),
    "phi 3, window": Case(
        DENSE["phi 3, window"],
        "phi3",
        {
            "rope.dimension_count": 32,
            "rope.freq_base": 10000.0,
            "rope.scaling.original_context_length": 4096,
            "attention.sliding_window": 13,
        },
    ),
    "phi 4 mini": Case(
        DENSE["phi 4 mini"],
        "phi3",
        {
            "rope.dimension_count": 32,
            "rope.freq_base": 10000.0,
            "rope.scaling.original_context_length": 4,
            "rope.scaling.attn_factor": LONGROPE_ATTENTION,
            "attention.sliding_window": 0,
        },
        extra={
            "rope_factors_long.weight": np.array(dense_models.LONG[:16], np.float32),
            "rope_factors_short.weight": np.array(dense_models.SHORT[:16], np.float32),
        },
    ),
    "smollm3": Case(
        DENSE["smollm3"],
        "smollm3",
        {"rope.freq_base": 2e6, "rope.dimension_count": 32},
        stored=gguf_of.permuted(3, 1),
    ),
    "granite": Case(
        DENSE["granite"],
        "granite",
        {
            "rope.freq_base": 10000.0,
            "rope.dimension_count": 32,
            "embedding_scale": 12.0,
            "attention.scale": 0.125,
            "residual_scale": 0.25,
            "logit_scale": 8.0,
        },
        stored=gguf_of.permuted(3, 1),
    ),
    "olmo 2": Case(DENSE["olmo 2"], "olmo2", {"rope.freq_base": 10000.0}),
    "olmo 3": Case(
        DENSE["olmo 3"],
        "olmo2",
        {
            "rope.freq_base": 1000.0,
            "rope.freq_base_swa": 1000.0,
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 256,
            "attention.sliding_window": 13,
        },
        {
            "rope.scaling.type": "yarn",
            "attention.sliding_window_pattern": [True, False],
        },
    ),
    "glm 4": Case(
        DENSE["glm 4"],
        "glm4",
        {
            "attention.key_length": 64,
            "attention.value_length": 64,
            "rope.freq_base": 10000.0,
            "rope.dimension_count": 32,
        },
    ),
    "exaone 4": Case(
        DENSE["exaone 4"],
        "exaone4",
        {"rope.freq_base": 10000.0, "attention.sliding_window": 13},
        {"attention.sliding_window_pattern": [True, True, True, False]},
    ),
    "exaone 4, no windows": Case(
        DENSE["exaone 4, no windows"], "exaone4", {"rope.freq_base": 10000.0}
    ),
    "ministral 3": Case(
        DENSE["ministral 3"],
        "mistral3",
        {
            **HEAD,
            "rope.freq_base": 1000.0,
            "rope.dimension_count": 32,
            "rope.scaling.factor": 16.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0,
            "rope.scaling.yarn_log_multiplier": 1.0,
            "attention.temperature_scale": 0.1,
        },
        {"rope.scaling.type": "yarn"},
        stored=gguf_of.permuted(3, 1),
    ),
    "mistral, of a vision model": Case(
        transformers.MistralConfig(**COMMON, sliding_window=None),
        "mistral3",
        HEAD | {"rope.freq_base": 10000.0, "rope.dimension_count": 32},
        stored=gguf_of.permuted(6, 2),
    ),
    "mixtral": Case(
        transformers.MixtralConfig(**COMMON, num_local_experts=5, sliding_window=None),
        "llama",
        HEAD | {"rope.freq_base": 1e6, "expert_count": 5, "expert_used_count": 2},
        stored=gguf_of.permuted(6, 2),
    ),
    "qwen2 moe": Case(
        transformers.Qwen2MoeConfig(
            **WITHOUT_HEAD | EXPERTS | {"hidden_size": 192}, shared_expert_intermediate_size=96
        ),
        "qwen2moe",
        {**EXPERT_NUMBERS, "expert_shared_feed_forward_length": 96},
    ),
    "qwen3 moe": Case(
        transformers.Qwen3MoeConfig(**COMMON | EXPERTS, norm_topk_prob=True),
        "qwen3moe",
        HEAD | EXPERT_NUMBERS,
    ),
    "gpt-oss": Case(
        transformers.GptOssConfig(
            **COMMON, num_local_experts=6, num_experts_per_tok=3, sliding_window=13
        ),
        "gpt-oss",
        {
            **HEAD,
            **EXPERT_NUMBERS,
            "expert_feed_forward_length": 160,
            "attention.sliding_window": 13,
            "rope.freq_base": 150000.0,
            "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": 4096,
            "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0,
        },
        {"rope.scaling.type": "yarn"},
    ),
    "glm-4.5, with a layer of MTP": Case(
        transformers.Glm4MoeConfig(
            **COMMON | {"head_dim": 64},
            use_qk_norm=True,
            attention_bias=True,
            moe_intermediate_size=64,
            n_routed_experts=6,
            num_experts_per_tok=3,
            n_group=3,
            topk_group=2,
            routed_scaling_factor=1.5,
        ),
        "glm4moe",
        {
            **EXPERT_NUMBERS,
            "block_count": 4,
            "nextn_predict_layers": 1,
            "attention.key_length": 64,
            "rope.dimension_count": 32,
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "expert_group_count": 3,
            "expert_group_used_count": 2,
            "expert_weights_scale": 1.5,
            "expert_gating_func": 2,
        },
        {"expert_weights_norm": True},
        extra={"blk.3.nextn.eh_proj.weight": np.zeros((96, 192), np.float32)},
    ),
}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIPTYCH_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, torch.nn.Module, Checkpoint]:
    """A random model with weights that bfloat16 holds, and the file."""
    case: Case = request.param
    torch.manual_seed(3)
    reference = transformers.AutoModelForCausalLM.from_config(
        case.config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
            parameter.copy_(parameter.bfloat16())
        for name, buffer in reference.named_buffers():
            if "correction" in name:
                buffer.normal_(0.0, 0.15)
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    how = {"lists": case.lists, "stored": case.stored, "extra": case.extra}
    gguf_of.write(path, reference, case.arch, case.numbers, **how)
    return case, reference, resolve(str(path))


def logits(model: TorchModel | NativeModel, prompt: list[int]) -> torch.Tensor:
    bench = Bench(model, block_size=16)
    return bench.step((bench.sequence(prompt), len(prompt), len(prompt)))


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((got - expected).abs().amax(-1) / expected.abs().amax(-1)).max())


def test_the_file_equals_transformers(
    pair: tuple[Case, torch.nn.Module, Checkpoint], record_property: Callable[[str, object], None]
) -> None:
    _, reference, checkpoint = pair
    rng = random.Random(1)
    prompt = [rng.randrange(gguf_of.VOCAB) for _ in range(60)]
    exact = load_model(checkpoint.config, weights(checkpoint, "float32"), torch.float32, CPU)
    expected = logits_of(reference, prompt)
    found = error(logits(exact, prompt), expected)
    record_property("torch", found)
    assert found < 1e-4
    if LIBRARY is None:
        return
    packed = read_packed(packed_file(checkpoint, "auto"), checkpoint.config)
    with bfloat16_kv():
        expected = logits(exact, prompt)
    native = NativeModel(checkpoint.config, packed, LIBRARY)
    found = error(logits(native, prompt), expected)
    record_property("C", found)
    assert found < 3e-3


def test_one_tensor_of_q_k_and_v(tmp_path: Path) -> None:
    """llama.cpp's converter joins them on demand; rows of q and k are in its order by head."""
    config = transformers.LlamaConfig(**COMMON, attention_bias=True)
    torch.manual_seed(3)
    reference = transformers.LlamaForCausalLM(config).eval()
    path = tmp_path / "m.gguf"
    numbers = HEAD | {"rope.freq_base": 10000.0}
    gguf_of.write(path, reference, "llama", numbers, stored=gguf_of.permuted(6, 2), fuse_qkv=True)
    checkpoint = resolve(str(path))
    exact = load_model(checkpoint.config, weights(checkpoint, "float32"), torch.float32, CPU)
    prompt = list(range(60))
    assert error(logits(exact, prompt), logits_of(reference, prompt)) < 1e-4


def test_its_configuration_is_that_of_the_folder(
    pair: tuple[Case, torch.nn.Module, Checkpoint], tmp_path: Path
) -> None:
    case, _, checkpoint = pair
    case.config.save_pretrained(tmp_path)
    from_folder = read_config(tmp_path)
    tokens = {"bos_token_id": None, "eos_token_ids": ()}
    assert dataclasses.replace(checkpoint.config, **tokens) == dataclasses.replace(
        from_folder, **tokens
    )
    written = json.loads((checkpoint.folder / "config.json").read_text())
    assert transformers.AutoConfig.for_model(**written).model_type == case.config.model_type
