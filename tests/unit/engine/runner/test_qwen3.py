"""Qwen3 from a GGUF file: what transformers computes of the same weights, in torch and in C."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from engine.checkpoint.packed import packed_file, read_packed
from engine.checkpoint.source import Checkpoint, resolve, weights
from engine.kernels import kernels
from engine.kernels.decoder import why_not_decoder
from engine.models import qwen3
from engine.runner.loader import load_model
from engine.runner.native_model import NativeModel
from engine.runner.torch_model import TorchModel
from tests.support import tiny_gguf
from tests.support.paged import CPU, Bench, bfloat16_kv
from tests.support.reference_model import logits_of

HEAD_DIM = 32  # hidden 64 / 4 heads would be 16
LIBRARY = kernels()


@pytest.fixture(params=[False, True], ids=["tied", "untied"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[torch.nn.Module, Checkpoint]:
    path = tmp_path / "m.gguf"
    tiny_gguf.tiny(path, arch="qwen3", untied=request.param, head_dim=HEAD_DIM, pre="qwen2")
    checkpoint = resolve(str(path))
    (shard,) = weights(checkpoint, "float32")
    config = transformers.AutoConfig.from_pretrained(checkpoint.folder)
    reference = transformers.Qwen3ForCausalLM(config).eval()
    missing, unexpected = reference.load_state_dict(load_file(shard), strict=False)
    assert (missing, unexpected) == ([] if request.param else ["lm_head.weight"], [])
    reference.tie_weights()
    return reference, checkpoint


def logits(model: TorchModel | NativeModel, prompt: list[int]) -> torch.Tensor:
    bench = Bench(model, block_size=16)
    return bench.step((bench.sequence(prompt), len(prompt), len(prompt)))


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((got - expected).abs().amax(-1) / expected.abs().amax(-1)).max())


def test_a_gguf_file_equals_transformers(pair: tuple[torch.nn.Module, Checkpoint]) -> None:
    reference, checkpoint = pair
    config = checkpoint.config
    assert (config.architecture, config.head_dim) == ("Qwen3ForCausalLM", HEAD_DIM)
    rng = random.Random(1)
    prompt = [rng.randrange(config.vocab_size) for _ in range(60)]
    shards = weights(checkpoint, "float32")
    exact = load_model(config, shards, torch.float32, CPU)
    assert error(logits(exact, prompt), logits_of(reference, prompt)) < 1e-4
    if LIBRARY is not None:
        packed = read_packed(packed_file(checkpoint, "auto"), config)
        for tensor in exact.weights.values():
            if tensor.dim() == 2:  # packed as bfloat16; vectors stay as they are
                tensor.copy_(tensor.bfloat16())
        with bfloat16_kv():
            expected = logits(exact, prompt)
        assert error(logits(NativeModel(config, packed, LIBRARY), prompt), expected) < 3e-3


def test_the_kernels_take_it_and_a_coordinator_needs_no_torch_for_it() -> None:
    source = Path(qwen3.__file__).read_text()
    assert len(source.splitlines()) <= 150
    assert "\nimport torch" not in source


def test_a_tensor_that_the_kernels_do_not_know_is_left_to_torch(
    pair: tuple[torch.nn.Module, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pair[1].config
    assert why_not_decoder(config) == ""
    monkeypatch.setattr("engine.kernels.decoder._VECTORS", ("input_norm", "mlp_norm"))
    assert "Qwen3ForCausalLM" in why_not_decoder(config)
