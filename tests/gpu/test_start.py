"""The start of a worker on a GPU: FlashInfer's modules are loaded before it could listen."""

from __future__ import annotations

import json
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from prometheus_client import CollectorRegistry

from decode.drafting import make_drafting
from engine.base.errors import ConfigError
from engine.base.option_groups import CacheOptions, DraftOptions, ModelOptions, StepOptions
from engine.base.types import Role, SamplingParams, StopParams
from engine.cache.kv_cache import zeroed_pages
from engine.cache.sizing import GpuMemory
from engine.scheduling.events import FinishedEvent, TokensEvent
from engine.scheduling.request import EngineRequest
from engine.step.build import Engine, build_engine
from engine.step.device import Device
from tests.support.flashinfer_kernels import Launches
from tests.support.tiny_folder import CONFIG

WIDE = CONFIG | {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}


def start(folder: Path, place: torch.device) -> Engine:
    """A GPU of numbers, whose tensors lie where FlashInfer computes in this test."""
    (folder / "config.json").write_text(json.dumps(WIDE))
    (folder / "tokenizer.json").write_text("{}")
    memory = GpuMemory(8 << 30, 7 << 30, 1 << 30)
    allocate = zeroed_pages
    if place.type == "cuda":

        def allocate(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.uint8, device=place)

    device = Device(place, "sm90", "Fake H100", lambda: memory, allocate)
    model = ModelOptions(model=str(folder), dtype="bfloat16", seed_weights=1)
    drafting = make_drafting(model, DraftOptions(draft_tokens=4))
    return build_engine(
        Role.DECODE,
        model,
        CacheOptions(kv_cache_memory=1 << 20),
        StepOptions(max_batched_tokens=40, max_num_seqs=3),
        CollectorRegistry(),
        drafting,
        device,
    )


def test_both_kernels_have_run_when_a_worker_is_built(
    tmp_path: Path, flashinfer_kernels: Launches
) -> None:
    engine = start(tmp_path, torch.device("cpu"))
    assert {"decode", "prefill"} <= set(flashinfer_kernels.names)
    profile = "device=cuda arch=sm90 attention=flashinfer-0.7.4"
    assert engine.identity.numeric_profile.endswith(profile)


def test_an_answer_over_the_pool_that_came_last(
    tmp_path: Path, flashinfer_device: torch.device
) -> None:
    core = start(tmp_path, flashinfer_device).core
    work = EngineRequest("r", tuple(range(2, 60)), b"", SamplingParams(), StopParams(12))
    key = 1
    core.add(key, work)
    events = []
    for _ in range(60):
        core.step()
        events += core.take_events()
        if events and isinstance(events[-1], FinishedEvent):
            break
    tokens = [t for e in events if isinstance(e, TokensEvent) for t in e.token_ids]
    assert isinstance(events[-1], FinishedEvent) and events[-1].error is None
    assert 0 < len(tokens) <= 12


NINJA = "Ninja build failed. Ninja output:\n[1/3] c++ x.cu\n/bin/sh: 1: {}\nninja: build stopped"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(NINJA.format("/usr/local/cuda/bin/nvcc: not found")), "nvcc: not found"),
        (RuntimeError("Could not find nvcc and default cuda_home doesn't exist"), "find nvcc"),
        (FileNotFoundError(2, "No such file or directory", "ninja"), "'ninja'"),
        (PermissionError(13, "Permission denied", "/.cache/flashinfer"), "/.cache/flashinfer"),
    ],
)
def test_what_cannot_be_compiled_is_one_sentence(
    error: Exception, reason: str, tmp_path: Path, flashinfer_kernels: Launches
) -> None:
    """Not a restart every ten seconds, while the coordinator waits."""
    from flashinfer.jit.core import JitSpec

    broken = mock.patch.object(JitSpec, "build_and_load", side_effect=error)
    with broken, pytest.raises(ConfigError, match=r"g\+\+ and ninja.*docs/gpu\.md") as caught:
        start(tmp_path, torch.device("cpu"))
    assert reason in caught.value.message and "\n" not in caught.value.message


def test_other_errors_of_a_plan_stay_what_they_are(
    tmp_path: Path, flashinfer_kernels: Launches
) -> None:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper as Decode

    broken = mock.patch.object(Decode, "plan", side_effect=RuntimeError("an illegal access"))
    with broken, pytest.raises(RuntimeError, match="illegal"):
        start(tmp_path, torch.device("cpu"))


def test_a_package_that_is_broken_is_one_sentence(
    tmp_path: Path, flashinfer_kernels: Launches
) -> None:
    def load(name: str) -> Any:
        raise RuntimeError(f"{name}-cubin version does not match\nmore")

    broken = mock.patch("engine.attention.flashinfer_backend.importlib.import_module", load)
    with broken, pytest.raises(ConfigError, match=r"imported .flashinfer-cubin version does not"):
        start(tmp_path, torch.device("cpu"))


def test_ninja_is_found_in_an_environment_that_is_not_activated(
    tmp_path: Path, flashinfer_kernels: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`.venv/bin/coordinator start`: FlashInfer calls ninja by name."""
    scripts = tmp_path / "bin"
    scripts.mkdir()
    (scripts / "ninja").write_text("#!/bin/sh\n")
    (scripts / "ninja").chmod(0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(scripts))
    monkeypatch.setenv("PATH", "/nowhere")
    start(tmp_path, torch.device("cpu"))
    assert shutil.which("ninja") == str(scripts / "ninja")
    assert os.environ["PATH"].startswith("/nowhere"), "what a user has chosen goes first"
