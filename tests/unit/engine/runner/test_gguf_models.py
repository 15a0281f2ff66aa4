"""Each architecture from a GGUF file: what transformers computes of the same weights."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from tests.support import gguf_of
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


@dataclass(frozen=True)
class Case:
    """A configuration of transformers, and what the converter makes of it."""

    config: transformers.PretrainedConfig
    arch: str
    numbers: dict[str, Any] = field(default_factory=dict)
    lists: dict[str, list[Any]] = field(default_factory=dict)
    stored: Callable[[str, Any], Any] = lambda name, values: values


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
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    how = {"lists": case.lists, "stored": case.stored}
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
