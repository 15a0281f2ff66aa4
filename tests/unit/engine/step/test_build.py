"""An engine with a draft model, from options: what two workers must agree on, and its memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
import torch
from prometheus_client import CollectorRegistry

from decode.drafting import make_drafting
from decode.speculative.draft_model import ModelDrafter
from engine.base.errors import ConfigError, SelfTestFailed
from engine.base.option_groups import CacheOptions, DraftOptions, ModelOptions, StepOptions
from engine.base.types import Role
from engine.cache.sizing import CONTEXT_BYTES, GpuMemory
from engine.runner.runner import Runner
from engine.step import build as build_module
from engine.step import loading
from engine.step.build import Engine, build_engine, memory_errors, pick_budgets
from engine.step.device import Device
from tests.support.paged import CPU
from tests.support.tiny_folder import CONFIG


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models of one vocabulary, of configurations alone: weights come from a seed."""
    for name, changes in (("big", {}), ("small", {"num_hidden_layers": 1, "hidden_size": 32})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG | changes))
        (tmp_path / name / "tokenizer.json").write_text("{}")
    return tmp_path


def build(
    folder: Path, draft: str, role: Role = Role.DECODE, drafter: str = "model", **cache_options: Any
) -> Engine:
    model = ModelOptions(
        model=str(folder / "big"),
        dtype="float32",
        device="cpu",
        seed_weights=1,
        draft_model=draft,
    )
    cache = CacheOptions(**(cache_options or {"kv_cache_memory": 1 << 20}))
    drafting = make_drafting(model, DraftOptions(drafter))
    return build_engine(role, model, cache, StepOptions(), CollectorRegistry(), drafting)


def test_both_roles_agree_and_no_other_configuration_does(folder: Path) -> None:
    small = str(folder / "small")
    decode, prefill = build(folder, small), build(folder, small, Role.PREFILL)
    assert decode.identity.digest == prefill.identity.digest
    assert decode.identity.digest == build(folder, small, drafter="none").identity.digest
    others = [build(folder, "", drafter="none"), build(folder, "first:1"), build(folder, "first:2")]
    digests = {engine.identity.digest for engine in (decode, *others)}
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"rope_type": "linear", "factor": 2.0}, 512),
    ],
)
def test_a_stretched_context_is_served(folder: Path, rope: dict, context: int) -> None:
    (folder / "big" / "config.json").write_text(json.dumps(CONFIG | {"rope_scaling": rope}))

    def length(max_model_len: int) -> int:
        model = ModelOptions(
            model=str(folder / "big"),
            dtype="float32",
            device="cpu",
            seed_weights=1,
            max_model_len=max_model_len,
        )
        cache = CacheOptions(kv_cache_memory=4 << 20)
        engine = build_engine(Role.PREFILL, model, cache, StepOptions(), CollectorRegistry())
        return engine.identity.max_model_len

    assert length(0) == length(context) == context
    assert length(300) == 300
    with pytest.raises(ConfigError, match=f"the model's context is {context}"):
        length(context + 1)


def test_the_pool_holds_both(folder: Path) -> None:
    engine = build(folder, str(folder / "small"))
    # keys and values of 16 tokens in fp32: 3 layers of 2 heads of 16, 1 layer of 2 heads of 8
    assert engine.layout.block_bytes == 2 * 16 * 4 * (3 * 2 * 16 + 2 * 8)
    assert engine.core.pool.num_blocks == (1 << 20) // engine.layout.block_bytes
    assert engine.kv_cache.num_bytes == engine.core.pool.num_blocks * engine.layout.block_bytes
    assert engine.core.scheduler.speculation is not None
    assert isinstance(engine.core.scheduler.speculation.drafter, ModelDrafter)


def test_a_pool_is_sized_by_the_share_of_its_worker(folder: Path) -> None:
    """Not by what the machine has at the moment: a restart would have another context."""
    engine = build(folder, "", drafter="none", memory_share=f"{320 << 20}:the cgroup's 2 GiB")
    assert 0 <= (80 << 20) - engine.kv_cache.num_bytes < engine.layout.block_bytes
    assert engine.kv_pool.num_bytes == engine.kv_cache.num_bytes


def test_first_layers_share_the_targets_weights(folder: Path) -> None:
    core = build(folder, "first:2").core
    assert core.scheduler.speculation is not None
    drafter = core.scheduler.speculation.drafter
    assert isinstance(drafter, ModelDrafter)
    target, draft = core._runner._model, drafter._runner._model  # type: ignore[attr-defined]
    assert draft.weights["1.qkv"] is target.weights["1.qkv"]
    assert draft.head is target.head


class FakeGpu:
    """A GPU of numbers, with memory of the host behind them."""

    def __init__(self, total: int, monkeypatch: pytest.MonkeyPatch, fails_at: str = "") -> None:
        self.order: list[str] = []
        self._fails_at = fails_at
        self.memory = GpuMemory(total, total, 0)
        self.device = Device(CPU, "sm90", "Fake H100", self._memory, self._allocate)
        for module, name in ((loading, "random_model"), (build_module, "warm_up")):
            monkeypatch.setattr(module, name, self._noting(name, getattr(module, name)))

    def _noting(self, name: str, call: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self._note(name)
            self.memory = replace(self.memory, reserved_bytes=self.memory.reserved_bytes + GIB)
            return call(*args, **kwargs)

        return noted

    def _note(self, name: str) -> None:
        self.order.append(name)
        if name == self._fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def _memory(self) -> GpuMemory:
        self._note("measured")
        return self.memory

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        self._note("pool")
        return torch.zeros(num_bytes, dtype=torch.uint8)


GIB = 1 << 30
SIXTEEN_MIB = 1 << 24


def build_on(gpu: FakeGpu, folder: Path, **options: Any) -> Engine:
    model = ModelOptions(model=str(folder / "big"), dtype="bfloat16", seed_weights=1)
    step = StepOptions(max_batched_tokens=64, max_num_seqs=3)
    cache = CacheOptions(**options)
    drafting = make_drafting(model, DraftOptions())
    return build_engine(Role.DECODE, model, cache, step, CollectorRegistry(), drafting, gpu.device)


def test_on_a_gpu_the_pool_is_the_last_to_be_sized(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and the largest step have their memory by then: a GiB each, here."""
    total = int((2 * GIB + CONTEXT_BYTES + SIXTEEN_MIB) / 0.9)
    gpu = FakeGpu(total, monkeypatch)
    engine = build_on(gpu, folder)
    assert gpu.order == ["random_model", "warm_up", "measured", "pool"]
    assert 0 <= SIXTEEN_MIB - engine.kv_cache.num_bytes < engine.layout.block_bytes + 2
    gpu = FakeGpu(total, monkeypatch)
    assert build_on(gpu, folder, kv_cache_memory=1 << 20).core.pool.num_blocks == 170
    assert "measured" not in gpu.order


@pytest.mark.parametrize("moment", ["random_model", "warm_up", "pool"])
def test_a_full_gpu_is_one_clear_error(
    moment: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu(8 * GIB, monkeypatch, fails_at=moment)
    with pytest.raises(ConfigError) as caught:
        build_on(gpu, folder)
    words = caught.value.message
    for word in ("Fake H100", "8 GiB in all", "free", "--gpu-memory-utilization", "0.9"):
        assert word in words
    assert "\n" not in words


def test_a_full_gpu_may_have_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> GpuMemory:
        raise RuntimeError("CUDA error: out of memory")

    device = Device(CPU, "sm90", "Fake H100", broken)
    ran_out = pytest.raises(ConfigError, match="Fake H100: GPU memory ran out")
    with ran_out, memory_errors(device, 0.9):
        device.memory()  # type: ignore[misc]


def test_other_errors_stay_what_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(8 * GIB, monkeypatch)
    with pytest.raises(RuntimeError, match="illegal"), memory_errors(gpu.device, 0.9):
        raise RuntimeError("an illegal memory access was encountered")
    for words in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling"):
        ran_out = pytest.raises(ConfigError, match="GPU memory ran out")
        with ran_out, memory_errors(gpu.device, 0.9):
            raise RuntimeError(words)


def test_the_profile_names_the_gpu_and_its_kernels(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another architecture, or other kernels, round otherwise: such workers are refused."""
    gpu = FakeGpu(8 * GIB, monkeypatch)
    engine = build_on(gpu, folder)
    version = torch.__version__.partition("+")[0]
    profile = f" kv=bfloat16 device=cuda arch=sm90 attention=torch-{version}"
    assert engine.identity.numeric_profile.endswith(profile)
    gpu.device = replace(gpu.device, arch="sm80")
    other = build_on(gpu, folder)
    assert other.identity.digest != engine.identity.digest
    assert build(folder, "", drafter="none").identity.numeric_profile.endswith("kv=float32")


def test_a_gpu_has_the_budgets_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(8 * GIB, monkeypatch).device
    budgets = pick_budgets(StepOptions(), gpu)
    assert (budgets.prompt_tokens, budgets.num_seqs, budgets.num_logits) == (8192, 256, 1024)
    budgets = pick_budgets(StepOptions(max_batched_tokens=100, max_num_seqs=700), gpu)
    assert (budgets.prompt_tokens, budgets.num_seqs, budgets.num_logits) == (100, 700, 1400)
    budgets = pick_budgets(StepOptions(), Device(CPU))
    assert (budgets.prompt_tokens, budgets.num_seqs) == (256, 64)


SELF_TEST = [([24], 1), ([1], 1), ([25], 2)]


def steps_run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int], int]]:
    """Of each step: the runner, the tokens of its rows, its logits."""
    seen: list[tuple[int, list[int], int]] = []
    run = Runner.run

    def noting(self: Runner, rows: Any) -> torch.Tensor:
        logits = run(self, rows)
        seen.append((id(self), [len(row.token_ids) for row in rows], len(logits)))
        return logits

    monkeypatch.setattr(Runner, "run", noting)
    return seen


def test_every_kind_of_step_is_run_before_a_worker_is_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = steps_run(monkeypatch)
    with structlog.testing.capture_logs() as lines:
        build_on(FakeGpu(8 * GIB, monkeypatch), folder)
    shown = [x["step"] for x in lines if (x["event"], x["log_level"]) == ("warm-up begins", "info")]
    assert shown == ["prompt chunk", "decode", "verify", "mixed", "largest"]
    (choice,) = (x for x in lines if x["event"] == "attention backend")
    assert choice["backend"].startswith("torch-") and choice["reason"]
    assert [(rows, num_logits) for _, rows, num_logits in seen] == [
        ([64], 1),
        ([1] * 3, 3),
        ([17] * 3, 51),
        ([32, 17, 1], 19),
        ([64, *[17] * 3], 64 + 51),
        *SELF_TEST,
    ]


def test_a_cpu_runs_one_short_step_of_all_kinds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the target and by the model that drafts for it."""
    seen = steps_run(monkeypatch)
    build(folder, "first:2")
    steps = [([2, 2, 1], 4)] * 2 + SELF_TEST * 2
    assert [(rows, num_logits) for _, rows, num_logits in seen] == steps
    assert seen[0][0] != seen[1][0]


def test_a_model_that_fails_its_self_test_is_not_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Runner.run

    def no_numbers(self: Runner, rows: Any) -> torch.Tensor:
        return torch.full_like(run(self, rows), torch.nan)

    monkeypatch.setattr(Runner, "run", no_numbers)
    with pytest.raises(SelfTestFailed, match=r"self-test of the model failed.*not finite"):
        build(folder, "first:2")


def test_impossible_options_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="needs --draft-model"):
        build(folder, "")
    config = folder / "small" / "config.json"
    config.write_text(json.dumps(CONFIG | {"vocab_size": 99}))
    with pytest.raises(ConfigError, match="vocabulary of 99 tokens, big of 101"):
        build(folder, str(folder / "small"))
