"""A step loop with a target and a draft model in one set of blocks."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from decode.speculative.draft_model import ModelDrafter
from decode.speculative.step_cost import StepCost
from decode.speculative.verify import verify
from engine.attention.base import AttentionBackend
from engine.base.kv_layout import hash_salt
from engine.base.types import FinishReason, SamplingParams, StopParams
from engine.cache.kv_cache import KVCache
from engine.runner.loader import random_model
from engine.runner.runner import Runner
from engine.runner.torch_model import TorchModel
from engine.sampling import Sampler
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.events import FinishedEvent, TokensEvent
from engine.scheduling.plan import Budgets
from engine.scheduling.request import EngineRequest
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.speculation import DraftLengthController, Speculation
from engine.step.core import EngineCore
from engine.telemetry.metrics import WorkerMetrics
from tests.support.backends import select_backend
from tests.support.invariants import check_pool, check_request
from tests.support.paged import CPU, layout_of, tiny_config

SIZE, VOCAB, MAX_LEN = 4, 101, 200
SALT = hash_salt(digest="draft")
TARGET = random_model(tiny_config(), 1)
OTHER = random_model(tiny_config(num_layers=1, num_kv_heads=3, head_dim=12, hidden_size=36), 2)
DEEPER = random_model(tiny_config(num_layers=4), 3)


class PairedWorker:
    """A decode worker's core with two models in its blocks."""

    def __init__(
        self,
        target: TorchModel,
        draft: TorchModel,
        *,
        num_blocks: int = 128,
        draft_tokens: int = 4,
        prompt_tokens: int = 16,
        draft_length: DraftLengthController | None = None,
        size: int = SIZE,
        backend_of: Callable[[KVCache, int, int], AttentionBackend[Any]] | None = None,
    ) -> None:
        dtype = str(target.dtype).removeprefix("torch.")
        layout = dataclasses.replace(
            layout_of(target.config, size, dtype), draft=layout_of(draft.config, size, dtype)
        )
        self.size = size
        self.kv_cache = KVCache(layout, num_blocks, CPU)
        assert self.kv_cache.draft
        views = (self.kv_cache, self.kv_cache.draft)
        runners = []
        for model, view in zip((target, draft), views, strict=True):
            view.pool.fill_(float("nan"))
            if backend_of is None:
                backend = select_backend(view, model.config)
            else:
                backend = backend_of(view, model.config.num_heads, 0)
            runners.append(Runner(model, view, backend))
        sampler = Sampler(VOCAB, CPU)
        drafter = ModelDrafter(runners[1], sampler, size, StepCost(), lambda: 0.0)
        speculation = Speculation(drafter, verify, draft_tokens, draft_length)
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(self.pool, size, Budgets(prompt_tokens, 8), speculation, MAX_LEN)
        metrics = WorkerMetrics(CollectorRegistry(), "draft")
        self.core = EngineCore(self.scheduler, runners[0], sampler, metrics, lambda: 0.0)
        self.answers: dict[int, list[int]] = {}
        self.reasons: dict[int, FinishReason] = {}
        self.num_steps = 0

    def add(self, work: EngineRequest) -> int:
        key = len(self.answers) + 1
        self.answers[key] = []
        self.core.add(key, work)
        return key

    def step(self) -> None:
        self.core.step()
        self.num_steps += 1
        for request in self.scheduler.active:
            check_request(request, self.size)
        for event in self.core.take_events():
            if isinstance(event, TokensEvent):
                self.answers[event.key] += event.token_ids
            elif isinstance(event, FinishedEvent):
                self.reasons[event.key] = event.reason

    def run(self) -> None:
        while len(self.reasons) < len(self.answers):
            self.step()
        check_pool(self.pool)
        assert self.pool.num_held == 0

    def check_hashed_blocks(self, works: list[EngineRequest], draft: TorchModel) -> int:
        """Compare the KV of all hashed blocks of these histories with each model's; how many."""
        num_checked = 0
        for work in works:
            probe = PairedWorker(TARGET, draft, draft_tokens=0)
            whole = work.prompt[: len(work.prompt) // SIZE * SIZE]
            key = probe.add(dataclasses.replace(work, prompt=whole, sampling=None, stop=None))
            hashes = probe.core._requests[key].whole_hashes(SIZE)
            probe.run()
            for mine, theirs in zip(
                self.pool.match(hashes), probe.pool.match(hashes), strict=False
            ):
                assert self.kv_cache.draft and probe.kv_cache.draft
                for a, b in (
                    (self.kv_cache, probe.kv_cache),
                    (self.kv_cache.draft, probe.kv_cache.draft),
                ):
                    torch.testing.assert_close(a.pool[mine], b.pool[theirs], rtol=1e-4, atol=1e-4)
                num_checked += 1
        return num_checked


def random_works(rng: random.Random, count: int) -> list[EngineRequest]:
    shared = [rng.randrange(VOCAB) for _ in range(24)]
    works = []
    for i in range(count):
        prompt = shared[: rng.choice([0, 8, 24])]
        prompt = [*prompt, *(rng.randrange(VOCAB) for _ in range(rng.randint(1, 20)))]
        sampling = SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 20]),
            min_p=rng.choice([0.0, 0.1]),
            presence_penalty=rng.choice([0.0, 0.7]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            seed=rng.getrandbits(64),
            logit_bias=rng.choice([(), ((7, -100.0), (28, 3.0))]),
        )
        stop = StopParams(
            max_tokens=rng.randint(1, 40),
            min_tokens=rng.choice([0, 6]),
            stop_token_ids=frozenset(rng.sample(range(VOCAB), 3)),
        )
        works.append(EngineRequest(f"r{i}", tuple(prompt), SALT, sampling, stop))
    return works
