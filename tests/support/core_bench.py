"""A step loop over a model that is a function of its history, and the plain loop it must equal."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from prometheus_client import CollectorRegistry

from decode.speculative.ngram import NgramDrafter
from decode.speculative.verify import verify
from engine.base.kv_columns import FULL
from engine.base.kv_layout import hash_salt
from engine.base.types import FinishReason, SamplingParams, StopParams, TokenLogprobs
from engine.sampling import Sampler, SampleRow
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.events import AnnouncedEvent, FetchEvent, FinishedEvent, TokensEvent
from engine.scheduling.plan import Budgets
from engine.scheduling.request import EngineRequest
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.speculation import Speculation
from engine.step.core import EngineCore
from engine.telemetry.metrics import WorkerMetrics
from tests.support.history_model import VOCAB, HistoryRunner, logits_of, seen
from tests.support.invariants import check_pool, check_request

SIZE = 4
SALT = hash_salt(digest="test")


class Bench:
    """A core over a HistoryRunner, and what came out of it."""

    def __init__(
        self,
        num_blocks: int = 64,
        prompt_tokens: int = 16,
        num_seqs: int = 8,
        draft_tokens: int = 0,
        max_model_len: int = 200,
        windows: tuple[int, ...] = FULL,
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.windows = windows
        self.runner = HistoryRunner(num_blocks, SIZE, windows)
        self.now_s = 0.0
        self.clock: Callable[[], float] = lambda: self.now_s
        speculation = Speculation(NgramDrafter(), verify, draft_tokens) if draft_tokens else None
        budgets = Budgets(prompt_tokens, num_seqs, 5.0)
        self.scheduler = Scheduler(self.pool, SIZE, budgets, speculation, max_model_len, windows)
        sampler = Sampler(VOCAB, torch.device("cpu"))
        metrics = WorkerMetrics(CollectorRegistry(), "test")
        self.core = EngineCore(self.scheduler, self.runner, sampler, metrics, lambda: self.clock())
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[TokenLogprobs]] = {}
        self.finished: dict[int, FinishedEvent] = {}
        self.fetches: list[FetchEvent] = []
        self.announced: dict[int, list[AnnouncedEvent]] = {}

    def add(self, work: EngineRequest) -> int:
        key = len(self.tokens) + 1
        self.scheduler.limits.check_fits(work)
        self.core.add(key, work)
        self.tokens[key] = []
        return key

    def step(self) -> bool:
        self.now_s += 0.01
        busy = self.core.step()
        for event in self.core.take_events():
            assert event.key not in self.finished, "an event after the last one"
            if isinstance(event, TokensEvent):
                self.tokens[event.key] += event.token_ids
                self.logprobs.setdefault(event.key, []).extend(event.logprobs)
            elif isinstance(event, FinishedEvent):
                self.finished[event.key] = event
            elif isinstance(event, FetchEvent):
                self.fetches.append(event)
            else:
                self.announced.setdefault(event.key, []).append(event)
        check_pool(self.pool)
        for request in [*self.scheduler.active, *self.scheduler.waiting]:
            check_request(request, SIZE)
        return busy

    def write(self, block_ids: Sequence[int], values: Sequence[object]) -> None:
        """What a read over NIXL does."""
        for block in block_ids:
            self.runner.memory[block][:] = values

    def run(self, max_steps: int = 3000) -> None:
        for _ in range(max_steps):
            if len(self.finished) == len(self.tokens):
                return
            self.step()
        raise AssertionError("no end in sight")

    def at_rest(self) -> None:
        assert self.pool.num_held == 0
        assert self.pool.num_free + self.pool.num_cached == self.pool.num_blocks
        assert not self.scheduler._producers
        assert not self.core._requests


def oracle(
    work: EngineRequest, max_model_len: int = 200, windows: Sequence[int] = FULL
) -> tuple[list[int], FinishReason]:
    """The plain loop: one token at a time, no cache, no batch."""
    assert work.sampling
    assert work.stop
    sampler = Sampler(VOCAB, torch.device("cpu"))
    tokens, new = [*work.prompt, *work.output], []
    while True:
        num_output = len(tokens) - len(work.prompt)
        banned = work.stop.stop_token_ids if num_output < work.stop.min_tokens else frozenset()
        row = SampleRow(work.sampling, len(tokens), tokens, len(work.prompt), [], banned)
        token = sampler.sample(logits_of(seen(tokens, windows))[None], [row])[0]
        tokens.append(token)
        new.append(token)
        if token in work.stop.stop_token_ids and num_output + 1 >= work.stop.min_tokens:
            return new, FinishReason.STOP
        if num_output + 1 >= work.stop.max_tokens or len(tokens) >= max_model_len:
            return new, FinishReason.LENGTH


def random_work(rng: random.Random, longest: int = 40, shared: Sequence[int] = ()) -> EngineRequest:
    prompt = [*shared[: rng.randrange(len(shared) + 1)]] if rng.random() < 0.6 else []
    prompt += [rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))]
    sampling = SamplingParams(
        temperature=rng.choice([0.0, 0.0, 0.4, 1.0]),
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 8]),
        min_p=rng.choice([0.0, 0.05]),
        frequency_penalty=rng.choice([0.0, 0.5]),
        presence_penalty=rng.choice([0.0, -0.4]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        seed=rng.getrandbits(64),
        logit_bias=rng.choice([(), ((3, 5.0), (7, -100.0))]),
    )
    stop = StopParams(
        max_tokens=rng.randint(1, 40),
        min_tokens=rng.choice([0, 0, 5]),
        stop_token_ids=frozenset(rng.sample(range(VOCAB), rng.choice([0, 2]))),
    )
    return EngineRequest(f"r{rng.random()}", tuple(prompt), SALT, sampling, stop)


def check_answers(bench: Bench, works: dict[int, EngineRequest]) -> None:
    for key, work in works.items():
        expected, reason = oracle(work, windows=bench.windows)
        assert bench.tokens[key] == expected
        assert bench.finished[key].reason is reason
