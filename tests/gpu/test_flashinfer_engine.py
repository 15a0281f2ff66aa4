"""A worker's engine from options to answers, with FlashInfer, on a GPU that is the CPU's memory."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry

from decode.drafting import make_drafting
from engine.base.option_groups import CacheOptions, DraftOptions, ModelOptions, StepOptions
from engine.base.types import Role
from engine.cache.sizing import GpuMemory
from engine.scheduling.events import FinishedEvent, TokensEvent
from engine.step import loading
from engine.step.build import Engine, build_engine
from engine.step.device import Device
from tests.support.draft_bench import random_works
from tests.support.flashinfer_kernels import Launches
from tests.support.paged import CPU
from tests.support.tiny_folder import CONFIG

FAKE_GPU = Device(CPU, "sm90", "Fake H100", lambda: GpuMemory(8 << 30, 8 << 30, 0))


def engine_of(folder: Path, num_heads: int) -> Engine:
    """A decode worker's, whose first layer drafts."""
    shape = {"num_attention_heads": num_heads, "head_dim": 64, "sliding_window": 50}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(CONFIG | shape | {"architectures": ["MistralForCausalLM"]})
    )
    (folder / "tokenizer.json").write_text("{}")
    model = ModelOptions(model=str(folder), dtype="float16", seed_weights=1, draft_model="first:1")
    step = StepOptions(max_batched_tokens=48, max_num_seqs=4)
    drafting = make_drafting(model, DraftOptions("model"))
    cache, registry = CacheOptions(kv_cache_memory=8 << 20), CollectorRegistry()
    return build_engine(Role.DECODE, model, cache, step, registry, drafting, FAKE_GPU)


def answers(engine: Engine) -> list[list[int]]:
    """Of eight requests, greedy and sampled."""
    core, tokens, left = engine.core, {}, set()
    for work in random_works(random.Random(3), 8):
        key = len(tokens) + 1
        tokens[key] = []
        left.add(key)
        core.add(key, work)
    while left:
        core.step()
        for event in core.take_events():
            if isinstance(event, TokensEvent):
                tokens[event.key] += event.token_ids
            elif isinstance(event, FinishedEvent):
                left.remove(event.key)
    return list(tokens.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="its GPU is the CPU's memory")
@pytest.mark.parametrize("num_heads", [4, 6])
def test_answers_are_the_torch_backends_and_nothing_is_compiled_for_them(
    num_heads: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flashinfer_kernels: Launches,
) -> None:
    engine = engine_of(tmp_path / "model", num_heads)
    assert "arch=sm90 attention=flashinfer-0.7.4" in engine.identity.numeric_profile
    compiled = list(flashinfer_kernels.modules)
    assert any("use_swa_True" in name for name in compiled)
    flashinfer_kernels.names.clear()
    got = answers(engine)
    assert {"decode", "prefill"} & set(flashinfer_kernels.names)
    assert flashinfer_kernels.modules == compiled, "the warm-up left a module out"
    monkeypatch.setattr(loading, "flashinfer_version", lambda: None)
    other = engine_of(tmp_path / "model", num_heads)
    assert "attention=torch" in other.identity.numeric_profile
    assert got == answers(other)
    assert sum(map(len, got)) > 60
