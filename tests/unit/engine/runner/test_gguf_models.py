"""Each architecture from a GGUF file: what transformers computes of the same weights."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterator
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
from tests.support import dense_models, expert_models, gguf_of
from tests.support.gguf_of import Case
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

PARTS = ("gate", "up", "down")

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
    **expert_models.CASES,
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
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    reference = gguf_of.random_file(path, case)
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


def test_quantised_experts_stay_packed(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """One tensor of all experts, Q8_0 here, is cut into theirs with its integers."""
    names = (f"blk.{i}.ffn_{part}_exps.weight" for i in range(3) for part in ("gate", "down"))
    path = tmp_path / "m.gguf"
    gguf_of.random_file(path, expert_models.CASES["qwen3 moe"], frozenset(names))
    checkpoint = resolve(str(path))
    exact = load_model(checkpoint.config, weights(checkpoint, "float32"), torch.float32, CPU)
    if LIBRARY is None:
        pytest.skip("needs a C compiler and a CPU with AVX512 and VNNI")
    packed = read_packed(packed_file(checkpoint, "auto"), checkpoint.config)
    kinds = {name: {m.kind for m in packed.matrices[f"1.{name}_experts"]} for name in PARTS}
    assert kinds == {"gate": {"q8_0"}, "up": {"bf16"}, "down": {"q8_0"}}
    prompt = list(range(60))
    with bfloat16_kv():
        expected = logits(exact, prompt)
    found = error(logits(NativeModel(checkpoint.config, packed, LIBRARY), prompt), expected)
    record_property("C", found)
    assert found < 3e-3
