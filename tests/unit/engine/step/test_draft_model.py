"""The drafter `model` in the step loop, with tiny random models in fp32.

Its drafts never change a token, every block with a hash holds its KV, and the drafts of an equal
model are all accepted.
"""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from engine.base.types import SamplingParams, StopParams
from engine.runner.loader import random_model
from engine.runner.torch_model import TorchModel
from engine.scheduling.request import EngineRequest, State
from engine.scheduling.speculation import Drafts, Ints, Tokens
from tests.support.draft_bench import (
    DEEPER,
    MAX_LEN,
    OTHER,
    SALT,
    SIZE,
    TARGET,
    VOCAB,
    PairedWorker,
    random_works,
)
from tests.support.paged import tiny_config
from tests.support.plain_loop import PlainLoop


class RandomLength:
    """Drafts now and then, of any length."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def choose(self, ids: Ints, drafts: Drafts, num_rows: int, num_answers: int) -> Ints:
        if self._rng.random() < 0.5:
            return np.zeros_like(drafts.lengths)
        lengths = [self._rng.randint(0, length) for length in drafts.lengths.tolist()]
        return np.array(lengths, np.int64)

    def produced(self, ids: Ints, tokens: Tokens, counts: Ints) -> None: ...
    def stepped(self, num_rows: int, seconds: float) -> None: ...
    def finish(self, draft_id: int) -> None: ...


def judge(works: list[EngineRequest], keys: list[int], worker: PairedWorker) -> None:
    oracle = PlainLoop(TARGET, MAX_LEN)
    for work, key, (answer, reason) in zip(works, keys, oracle.answers(works), strict=True):
        verdict = oracle.judge(work, answer, worker.answers[key])
        assert verdict.ok, verdict.detail
        assert verdict.at is not None or worker.reasons[key] is reason


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_target_as_its_own_draft_is_accepted_whole(temperature: float) -> None:
    """Greedy and sampled: one noise for both."""
    worker = PairedWorker(TARGET, TARGET)
    works = []
    for i in range(6):
        sampling = SamplingParams(temperature=temperature, top_p=0.95, seed=i)
        prompt = tuple((7 * i + j * j) % VOCAB for j in range(5 + 9 * i))
        works.append(EngineRequest(f"r{i}", prompt, SALT, sampling, StopParams(max_tokens=41)))
    keys = [worker.add(work) for work in works]
    worker.run()
    judge(works, keys, worker)
    totals = worker.core.totals
    assert totals.accepted_tokens == totals.draft_tokens > 0
    # 41 tokens: one by the prompt's step, then 5 a step.
    assert totals.draft_tokens == 6 * 8 * 4
    assert worker.check_hashed_blocks(works, TARGET) > 20


@pytest.mark.parametrize(
    "draft", [OTHER, DEEPER, TARGET.first_layers(1)], ids=["other", "deeper", "first"]
)
@pytest.mark.parametrize("seed", range(3))
def test_no_draft_changes_a_token(draft: TorchModel, seed: int) -> None:
    """Small pools (preemption, hits), chunked prompts, and arbitrary draft lengths."""
    rng = random.Random(seed)
    works = random_works(rng, 14)
    worker = PairedWorker(
        TARGET,
        draft,
        num_blocks=rng.choice([30, 60]),
        prompt_tokens=rng.choice([5, 16]),
        draft_tokens=rng.choice([1, 4, 9]),
        draft_length=None if seed == 0 else RandomLength(seed),
    )
    if seed == 2:  # a step on a GPU has a limit: here 8 answers and 3 tokens of drafts
        worker.scheduler.budgets = dataclasses.replace(worker.scheduler.budgets, num_logits=11)
    keys = []
    for work in works:
        keys.append(worker.add(work))
        for _ in range(rng.choice([0, 0, 1, 3])):
            worker.step()
    worker.run()
    judge(works, keys, worker)
    assert worker.core.totals.draft_tokens > 20
    whole = [
        dataclasses.replace(work, prompt=(*work.prompt, *worker.answers[key]))
        for work, key in zip(works, keys, strict=True)
    ]
    assert worker.check_hashed_blocks(whole, draft) > 5


def test_a_block_gets_its_hash_when_it_has_both_models_kv() -> None:
    """Steps without drafts let the draft model lag, but never by a block."""
    worker = PairedWorker(TARGET, OTHER, draft_tokens=0)
    work = EngineRequest("r", tuple(range(6)), SALT, SamplingParams(), StopParams(max_tokens=40))
    key = worker.add(work)
    request = worker.core._requests[key]
    lags = []
    while request.state is not State.FINISHED:
        worker.step()
        lags.append(request.draft_lag)
        assert request.num_hashed == (request.num_computed - request.draft_lag) // SIZE
    assert max(lags) == SIZE - 1
    history = dataclasses.replace(work, prompt=(*work.prompt, *worker.answers[key]))
    assert worker.check_hashed_blocks([history], OTHER) >= 10


def test_a_draft_longer_than_the_window_uses_spare_blocks_and_ends_with_the_answer() -> None:
    worker = PairedWorker(TARGET, TARGET, draft_tokens=30)
    work = EngineRequest("r", (1, 2, 3), SALT, SamplingParams(), StopParams(max_tokens=20))
    key = worker.add(work)
    worker.run()
    judge([work], [key], worker)
    assert worker.core.totals.draft_tokens == 18
    assert worker.num_steps == 2


def test_an_answer_goes_on_elsewhere_with_the_same_tokens() -> None:
    """Failover: another worker gets the tokens so far, and continues with drafts."""
    work = random_works(random.Random(5), 1)[0]
    work = dataclasses.replace(work, stop=StopParams(max_tokens=30))
    first = PairedWorker(TARGET, OTHER)
    key = first.add(work)
    first.run()
    for num_tokens in (1, 7, 29):
        again = PairedWorker(TARGET, OTHER)
        rest = again.add(dataclasses.replace(work, output=tuple(first.answers[key][:num_tokens])))
        again.run()
        assert first.answers[key][:num_tokens] + again.answers[rest] == first.answers[key]


def test_logits_that_are_no_numbers_end_drafts_and_nothing_else() -> None:
    sick = random_model(tiny_config(), 4)
    sick.weights["norm"].fill_(float("nan"))
    worker = PairedWorker(TARGET, sick)
    works = random_works(random.Random(6), 3)
    keys = [worker.add(work) for work in works]
    worker.run()
    judge(works, keys, worker)
    assert worker.core.totals.draft_tokens == 0
