"""Drafts of measured length in the step loop: room, preemption, failover, what is forgotten."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from decode.speculative.draft_length import MeasuredDraftLength
from decode.speculative.ngram import NgramDrafter
from engine.base.types import SamplingParams, StopParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.plan import Budgets
from engine.scheduling.request import EngineRequest
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.speculation import Speculation
from tests.support.core_bench import SALT, SIZE, Bench, check_answers, oracle, random_work
from tests.support.drafting import fixed, measured
from tests.support.history_model import VOCAB


class TimedBench(Bench):
    """A bench whose steps take a time that its clock shows."""

    def __init__(self, speculation: Speculation | None, row_s: float = 0.001, **room: int) -> None:
        super().__init__(**room)
        self.scheduler.speculation = speculation
        compute = self.runner.compute

        def run(rows):  # type: ignore[no-untyped-def]
            self.now_s += 0.005 + row_s * sum(len(row.token_ids) for row in rows)
            return compute(rows)

        self.runner.compute = run  # type: ignore[method-assign]

    def forgotten(self) -> bool:
        """Whether nothing is kept about any request."""
        speculation = self.scheduler.speculation
        assert speculation is not None
        assert isinstance(speculation.drafter, NgramDrafter)
        draft_length = speculation.draft_length
        assert isinstance(draft_length, MeasuredDraftLength)
        return not (
            len(speculation.drafter._lookup)
            or draft_length._row_of.any()
            or draft_length._acceptance._requests.any()
        )


def repeating_work(name: str, max_tokens: int, output: tuple[int, ...] = ()) -> EngineRequest:
    """Greedy, and the model's short memory makes a loop of it."""
    stop = StopParams(max_tokens=max_tokens)
    return EngineRequest(name, (3, 1, 4, 1, 5), SALT, SamplingParams(), stop, output=output)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_blocks", [24, 64])
def test_measured_lengths_change_no_token(seed: int, num_blocks: int) -> None:
    """Also under preemption, in a pool that does not hold all of them."""
    rng = random.Random(seed)
    bench = TimedBench(measured(), rng.choice([0.0, 0.001, 0.01]), num_blocks=num_blocks)
    shared = [rng.randrange(VOCAB) for _ in range(20)]
    works = {}
    for _ in range(12):
        work = random_work(rng, shared=shared)
        works[bench.add(work)] = work
    bench.run()
    check_answers(bench, works)
    bench.at_rest()
    assert bench.forgotten()


def test_what_ends_early_is_forgotten() -> None:
    bench = TimedBench(measured())
    keys = [bench.add(repeating_work(f"r{i}", 60)) for i in range(3)]
    for _ in range(8):
        bench.step()
    bench.core.abort(keys[0])
    bench.core.abort(keys[0])  # unknown by now
    bench.runner.fail_next = 1  # ends the others
    bench.step()
    bench.step()
    assert len(bench.finished) == 3
    bench.at_rest()
    assert bench.forgotten()


def test_a_failed_step_teaches_no_cost() -> None:
    bench = TimedBench(measured())
    bench.add(repeating_work("r", 60))
    bench.step()
    draft_length = bench.scheduler.speculation.draft_length  # type: ignore[union-attr]
    assert isinstance(draft_length, MeasuredDraftLength)
    known = draft_length._cost._num_steps
    bench.runner.fail_next = 1
    bench.step()
    assert draft_length._cost._num_steps == known


def test_cheap_rows_are_used_and_costly_ones_are_not() -> None:
    steps = []
    for row_s in (0.0, 0.5):
        bench = TimedBench(measured(), row_s, max_model_len=400, num_blocks=128)
        bench.add(repeating_work("r", 250))
        bench.run()
        steps.append(len(bench.runner.steps))
    cheap, costly = steps
    assert cheap < 100
    assert costly > 200


def test_after_failover_the_delivered_tokens_are_drafted_from() -> None:
    whole = repeating_work("r", 120)
    answer, _ = oracle(whole)
    bench = TimedBench(measured())
    key = bench.add(replace(whole, output=tuple(answer[:60])))
    bench.run()
    assert bench.tokens[key] == answer[60:]
    assert bench.core.totals.accepted_tokens > 30


def test_a_longer_draft_reserves_no_more_than_a_block() -> None:
    def scheduler(draft_tokens: int) -> Scheduler:
        speculation = fixed(draft_tokens)
        return Scheduler(BlockPool(8), SIZE, Budgets(16, 8), speculation, 100)

    assert scheduler(2).limits.room_needed(7) == 3
    assert scheduler(SIZE).limits.room_needed(8) == 3
    assert scheduler(64).limits.room_needed(8) == 3


@pytest.mark.parametrize("seed", range(4))
def test_drafts_preempt_no_request(seed: int) -> None:
    """Drafts of 64 in a pool that is too small: not one preemption more for it."""
    preemptions = []
    for speculation in (None, fixed(64)):
        rng = random.Random(seed)
        bench = TimedBench(speculation, num_blocks=26)
        works = {}
        for _ in range(10):
            work = random_work(rng)
            works[bench.add(work)] = work
        bench.run()
        check_answers(bench, works)
        preemptions.append(bench.scheduler.num_preemptions)
    # A draft window is reserved at admission, so fewer run at once: there may be even less.
    assert preemptions[0] > 0
    assert preemptions[1] <= preemptions[0]


def test_drafts_leave_the_room_that_the_first_in_the_queue_needs() -> None:
    """It is admitted as soon as it would be without drafts, and drafts are cut to their blocks."""
    bench = TimedBench(fixed(64), num_blocks=12, num_seqs=2)
    first = bench.add(repeating_work("a", 30))
    bench.add(repeating_work("b", 2))
    for _ in range(3):
        bench.step()
    waiting = EngineRequest("c", tuple(range(20)), SALT, SamplingParams(), StopParams(max_tokens=3))
    bench.add(waiting)
    bench.scheduler.budgets = replace(bench.scheduler.budgets, num_seqs=1)  # holds it back
    for _ in range(3):
        bench.step()
        assert bench.pool.num_available >= bench.scheduler.limits.room_needed(20)
    bench.scheduler.budgets = replace(bench.scheduler.budgets, num_seqs=2)
    bench.step()
    assert not bench.scheduler.waiting
    bench.run()
    assert bench.tokens[first] == oracle(repeating_work("a", 30))[0]
