"""Each architecture from a GGUF file: what transformers computes of the same weights."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
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
from tests.support import dense_cases, expert_models, gguf_of
from tests.support.gguf_of import COMMON, HEAD, Case
from tests.support.paged import CPU, Bench, bfloat16_kv
from tests.support.reference_model import logits_of

LIBRARY = kernels()
PARTS = ("gate", "up", "down")
CASES: dict[str, Case] = dense_cases.CASES | expert_models.CASES


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


def test_gate_and_up_of_experts_in_one_tensor(tmp_path: Path) -> None:
    case = expert_models.CASES["gpt-oss"]  # has biases, too
    apart, together = tmp_path / "apart.gguf", tmp_path / "together.gguf"
    reference = gguf_of.random_file(apart, case)
    how: dict[str, Any] = {"lists": case.lists, "fuse_experts": True}
    gguf_of.write(together, reference, case.arch, case.numbers, **how)
    found = [
        load_model(each.config, weights(each, "float32"), torch.float32, CPU).weights
        for each in (resolve(str(apart)), resolve(str(together)))
    ]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
