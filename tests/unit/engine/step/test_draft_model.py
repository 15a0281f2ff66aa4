"""The drafter `model` in the step loop, with tiny random models in fp32: what it drafts never
changes a token, its KV is there for every named block, and an equal model's drafts all stand.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from decode.speculative.draft_model import ModelDrafter
from decode.speculative.step_cost import StepCost
from decode.speculative.verify import verify
from engine.attention import select_backend
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
from engine.scheduling.request import EngineRequest, State
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.speculation import Draft, DraftLengthController, Speculation
from engine.step.core import EngineCore
from engine.telemetry.metrics import WorkerMetrics
from tests.support.paged import CPU, layout_of, tiny_config
from tests.support.plain_loop import PlainLoop

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
        pace: DraftLengthController | None = None,
        size: int = SIZE,
        backend_of: Callable[[KVCache, int, int], AttentionBackend[Any]] = select_backend,
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
            backend = backend_of(view, model.config.num_heads, 0)
            runners.append(Runner(model, view, backend))
        sampler = Sampler(VOCAB, CPU)
        speculation = None
        if draft_tokens:
            drafter = ModelDrafter(runners[1], sampler, StepCost(), lambda: 0.0)
            speculation = Speculation(drafter, verify, draft_tokens, pace)
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(self.pool, size, Budgets(prompt_tokens, 8), speculation, MAX_LEN)
        metrics = WorkerMetrics(CollectorRegistry(), "draft")
        self.core = EngineCore(
            self.scheduler, runners[0], sampler, metrics, lambda: 0.0, runners[1]
        )
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
            request.check(self.size)
        for event in self.core.take_events():
            if isinstance(event, TokensEvent):
                self.answers[event.key] += event.token_ids
            elif isinstance(event, FinishedEvent):
                self.reasons[event.key] = event.reason

    def run(self) -> None:
        while len(self.reasons) < len(self.answers):
            self.step()
        self.pool.check()
        assert self.pool.num_held == 0

    def check_named_blocks(self, works: list[EngineRequest], draft: TorchModel) -> int:
        """Every named block of these histories holds the KV that each model gives; how many."""
        num_checked = 0
        for work in works:
            probe = PairedWorker(TARGET, draft, draft_tokens=0)
            whole = work.prompt[: len(work.prompt) // SIZE * SIZE]
            key = probe.add(dataclasses.replace(work, prompt=whole, sampling=None, stop=None))
            names = probe.core._requests[key].whole_hashes(SIZE)
            probe.run()
            for mine, theirs in zip(self.pool.match(names), probe.pool.match(names), strict=False):
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


class Moody:
    """A pace that drafts now and then, of any length."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def choose(self, drafts: list[tuple[str, Draft]], num_rows: int, num_answers: int) -> list[int]:
        if self._rng.random() < 0.5:
            return [0] * len(drafts)
        return [self._rng.randint(0, len(draft.tokens)) for _, draft in drafts]

    def produced(self, request_id: str, tokens: list[int]) -> None: ...
    def stepped(self, num_rows: int, seconds: float) -> None: ...
    def finish(self, request_id: str) -> None: ...


def judge(works: list[EngineRequest], keys: list[int], panel: PairedWorker) -> None:
    oracle = PlainLoop(TARGET, MAX_LEN)
    for work, key, (answer, reason) in zip(works, keys, oracle.answers(works), strict=True):
        verdict = oracle.judge(work, answer, panel.answers[key])
        assert verdict.ok, verdict.detail
        assert verdict.at is not None or panel.reasons[key] is reason


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_target_as_its_own_draft_is_accepted_whole(temperature: float) -> None:
    """Greedy and sampled: one noise for both."""
    panel = PairedWorker(TARGET, TARGET)
    works = []
    for i in range(6):
        sampling = SamplingParams(temperature=temperature, top_p=0.95, seed=i)
        prompt = tuple((7 * i + j * j) % VOCAB for j in range(5 + 9 * i))
        works.append(EngineRequest(f"r{i}", prompt, SALT, sampling, StopParams(max_tokens=41)))
    keys = [panel.add(work) for work in works]
    panel.run()
    judge(works, keys, panel)
    totals = panel.core.totals
    assert totals.accepted_tokens == totals.draft_tokens > 0
    # 41 tokens: one by the prompt's step, then 5 a step.
    assert totals.draft_tokens == 6 * 8 * 4
    assert panel.check_named_blocks(works, TARGET) > 20


@pytest.mark.parametrize(
    "draft", [OTHER, DEEPER, TARGET.first_layers(1)], ids=["other", "deeper", "first"]
)
@pytest.mark.parametrize("seed", range(3))
def test_no_draft_changes_a_token(draft: TorchModel, seed: int) -> None:
    """Small pools (preemption, hits), chunked prompts, and a pace that does what it likes."""
    rng = random.Random(seed)
    works = random_works(rng, 14)
    panel = PairedWorker(
        TARGET,
        draft,
        num_blocks=rng.choice([30, 60]),
        prompt_tokens=rng.choice([5, 16]),
        draft_tokens=rng.choice([1, 4, 9]),
        pace=None if seed == 0 else Moody(seed),
    )
    if seed == 2:  # a step on a GPU has a limit: here 8 answers and 3 tokens of drafts
        panel.scheduler.budgets = dataclasses.replace(panel.scheduler.budgets, num_logits=11)
    keys = []
    for work in works:
        keys.append(panel.add(work))
        for _ in range(rng.choice([0, 0, 1, 3])):
            panel.step()
    panel.run()
    judge(works, keys, panel)
    assert panel.core.totals.draft_tokens > 20
    whole = [
        dataclasses.replace(work, prompt=(*work.prompt, *panel.answers[key]))
        for work, key in zip(works, keys, strict=True)
    ]
    assert panel.check_named_blocks(whole, draft) > 5


def test_a_block_is_named_when_it_has_both_models_kv() -> None:
    """Steps without drafts let the draft model lag, but never by a block."""
    panel = PairedWorker(TARGET, OTHER, draft_tokens=0)
    work = EngineRequest("r", tuple(range(6)), SALT, SamplingParams(), StopParams(max_tokens=40))
    key = panel.add(work)
    request = panel.core._requests[key]
    lags = []
    while request.state is not State.FINISHED:
        panel.step()
        lags.append(request.draft_lag)
        assert request.num_hashed == (request.num_computed - request.draft_lag) // SIZE
    assert max(lags) == SIZE - 1
    history = dataclasses.replace(work, prompt=(*work.prompt, *panel.answers[key]))
    assert panel.check_named_blocks([history], OTHER) >= 10


def test_a_draft_longer_than_the_window_uses_spare_blocks_and_ends_with_the_answer() -> None:
    panel = PairedWorker(TARGET, TARGET, draft_tokens=30)
    work = EngineRequest("r", (1, 2, 3), SALT, SamplingParams(), StopParams(max_tokens=20))
    key = panel.add(work)
    panel.run()
    judge([work], [key], panel)
    assert panel.core.totals.draft_tokens == 18
    assert panel.num_steps == 2


def test_an_answer_goes_on_elsewhere_with_the_same_tokens() -> None:
    """Failover: another worker gets what was given, and drafts on."""
    work = random_works(random.Random(5), 1)[0]
    work = dataclasses.replace(work, stop=StopParams(max_tokens=30))
    first = PairedWorker(TARGET, OTHER)
    key = first.add(work)
    first.run()
    for given in (1, 7, 29):
        again = PairedWorker(TARGET, OTHER)
        rest = again.add(dataclasses.replace(work, output=tuple(first.answers[key][:given])))
        again.run()
        assert first.answers[key][:given] + again.answers[rest] == first.answers[key]


def test_logits_that_are_no_numbers_end_drafts_and_nothing_else() -> None:
    sick = random_model(tiny_config(), 4)
    sick.weights["norm"].fill_(float("nan"))
    panel = PairedWorker(TARGET, sick)
    works = random_works(random.Random(6), 3)
    keys = [panel.add(work) for work in works]
    panel.run()
    judge(works, keys, panel)
    assert panel.core.totals.draft_tokens == 0
