"""The step loop against a plain loop: no batch, draft, hit, preemption or abort changes a token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from engine.attention.batch import Row
from engine.base.errors import InvalidRequest
from engine.base.types import FinishReason, SamplingParams, StopParams
from engine.scheduling.events import FetchEvent
from engine.scheduling.request import EngineRequest, State
from tests.support.core_bench import SALT, SIZE, Bench, check_answers, oracle, random_work
from tests.support.history_model import VOCAB

# Windows of the columns of block tables, and blocks of a pool that preempts for them.
COLUMNS = [((0,), 24), ((0, 6, 6), 52), ((9,), 18), ((0, 5, 17), 52)]


@pytest.mark.parametrize("draft_tokens", [0, 4])
@pytest.mark.parametrize(("windows", "num_blocks"), [*COLUMNS, ((0,), 64), ((0, 6, 6), 150)])
@pytest.mark.parametrize("seed", range(4))
def test_answers_equal_the_plain_loop(
    seed: int, windows: tuple[int, ...], num_blocks: int, draft_tokens: int
) -> None:
    rng = random.Random(seed)
    prompt_tokens = rng.choice([5, 16])
    bench = Bench(num_blocks, prompt_tokens, draft_tokens=draft_tokens, windows=windows)
    shared = [rng.randrange(VOCAB) for _ in range(24)]
    works = {}
    for _ in range(24):
        work = random_work(rng, shared=shared)
        works[bench.add(work)] = work
        for _ in range(rng.randrange(3)):
            bench.step()
    bench.run()
    check_answers(bench, works)
    bench.at_rest()
    if (windows, num_blocks) in COLUMNS:
        assert bench.scheduler.num_preemptions > 0, "the scenario is meant to preempt"
    if draft_tokens:
        assert bench.core.totals.accepted_tokens > 0, "the scenario is meant to accept drafts"


def test_resumed_output_counts_and_is_not_sent_again() -> None:
    rng = random.Random(5)
    for _ in range(20):
        work = random_work(rng)
        whole, reason = oracle(work)
        cut = rng.randrange(len(whole) + 1)
        bench = Bench(draft_tokens=3)
        key = bench.add(replace(work, output=tuple(whole[:cut])))
        bench.run()
        assert bench.tokens[key] == whole[cut:]
        assert bench.finished[key].reason is reason
        bench.at_rest()


@pytest.mark.parametrize("seed", range(3))
def test_aborts_at_any_moment_leave_nothing(seed: int) -> None:
    rng = random.Random(seed)
    bench = Bench(24, draft_tokens=3)
    works = {}
    for _ in range(30):
        work = random_work(rng)
        works[bench.add(work)] = work
        bench.step()
        if rng.random() < 0.4:
            bench.core.abort(rng.choice(list(works)))
    bench.run()
    for key, work in works.items():
        if bench.finished[key].reason is FinishReason.ABORTED:
            assert bench.tokens[key] == oracle(work)[0][: len(bench.tokens[key])]
        else:
            assert bench.tokens[key] == oracle(work)[0]
    bench.at_rest()


def test_eight_long_answers_in_a_pool_for_two_all_finish() -> None:
    rng = random.Random(1)
    bench = Bench(num_blocks=2 * 30, prompt_tokens=32, max_model_len=120)
    works = {}
    for i in range(8):
        prompt = tuple(rng.randrange(VOCAB) for _ in range(90))
        work = EngineRequest(f"long{i}", prompt, SALT, SamplingParams(), StopParams(max_tokens=25))
        works[bench.add(work)] = work
    bench.run()
    for key, work in works.items():
        assert bench.tokens[key] == oracle(work, 120)[0]
    bench.at_rest()


def whole_prompt(rng: random.Random, num_blocks: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCAB) for _ in range(num_blocks * SIZE))


def test_eight_long_prompts_to_announce_in_a_pool_for_two() -> None:
    rng = random.Random(2)
    bench = Bench(num_blocks=40, prompt_tokens=24)
    works = {}
    for i in range(8):
        work = EngineRequest(f"p{i}", whole_prompt(rng, 20), SALT, announce_from=0)
        works[bench.add(work)] = work
    for _ in range(500):
        bench.step()
        for events in bench.announced.values():
            for event in events:  # the peer reads and releases at once
                bench.core.unpin(event.block_ids)
            events.clear()
        if len(bench.finished) == 8:
            break
    assert len(bench.finished) == 8
    bench.at_rest()


def test_announced_blocks_are_complete_pinned_and_in_order() -> None:
    rng = random.Random(3)
    bench = Bench(num_blocks=40, prompt_tokens=11)
    prompt = whole_prompt(rng, 12)
    key = bench.add(EngineRequest("p", prompt, SALT, announce_from=2))
    num_seen = 2
    while key not in bench.finished:
        bench.step()
        events = bench.announced.pop(key, [])
        for event in events:
            assert event.first_block == num_seen
            assert event.generations == [int(bench.pool.generations[b]) for b in event.block_ids]
            for block in event.block_ids:
                start = num_seen * SIZE
                assert bench.runner.memory[block] == list(prompt[start : start + SIZE])
                num_seen += 1
    assert num_seen == 12
    assert bench.pool.num_held == 10, "announced blocks stay pinned for their leases"
    assert bench.runner.num_tokens == len(prompt)
    # The same prompt again is one announcement and no computation.
    again = bench.add(EngineRequest("q", prompt, SALT, announce_from=0))
    bench.step()
    assert bench.finished[again].counts.num_cached_tokens == len(prompt)
    assert [len(e.block_ids) for e in bench.announced[again]] == [12]
    assert bench.runner.num_tokens == len(prompt)


def test_four_equal_prompts_at_once_compute_their_prefix_once() -> None:
    rng = random.Random(4)
    prompt = (*whole_prompt(rng, 10), 1, 2)
    bench = Bench(prompt_tokens=16)
    works = {}
    for i in range(4):
        work = EngineRequest(f"w{i}", prompt, SALT, SamplingParams(), StopParams(max_tokens=4))
        works[bench.add(work)] = work
    bench.run()
    check_answers(bench, works)
    assert bench.core.totals.prompt_tokens_computed == 10 * SIZE + 4 * 2
    bench.at_rest()


def test_a_waiter_takes_over_when_the_producer_is_aborted_or_too_slow() -> None:
    rng = random.Random(6)
    prompt = (*whole_prompt(rng, 10), 1)
    for aborted in (True, False):
        bench = Bench()
        work = EngineRequest(
            "producer", prompt, SALT, SamplingParams(), StopParams(max_tokens=3), fetch=True
        )
        producer = bench.add(work)
        waiter = bench.add(replace(work, request_id="waiter", fetch=False))
        for _ in range(5):
            bench.step()
        assert not bench.tokens[waiter]
        assert len(bench.scheduler.waiting) == 1
        if aborted:
            bench.core.abort(producer)
        else:
            bench.now_s += 6.0
        for _ in range(50):
            bench.step()
        assert bench.tokens[waiter] == oracle(work)[0]
        bench.core.abort(producer)
        bench.step()
        bench.at_rest()


def deliver(bench: Bench, event: FetchEvent, count: int) -> None:
    """Write the first `count` wanted blocks as a peer's would be, and say so."""
    for ahead, block in enumerate(event.block_ids[:count]):
        start = (event.first_block + ahead) * SIZE
        bench.runner.memory[block] = list(event.token_ids[start : start + SIZE])
        bench.core.blocks_arrived(event.key, event.first_block + ahead + 1)


def test_fetched_blocks_look_like_a_local_prefix_hit() -> None:
    rng = random.Random(7)
    prompt = (*whole_prompt(rng, 6), 9, 9, 9)
    work = EngineRequest("f", prompt, SALT, SamplingParams(), StopParams(max_tokens=6), fetch=True)
    bench = Bench(draft_tokens=3)
    key = bench.add(work)
    bench.step()
    (event,) = bench.fetches
    assert event.first_block == 0
    assert event.token_ids == list(prompt[: 6 * SIZE])
    assert len(event.block_ids) == 6
    deliver(bench, event, 6)
    bench.core.fetch_ended(key, 0)
    bench.run()
    assert bench.tokens[key] == oracle(work)[0]
    assert bench.core.totals.prompt_tokens_computed == 3
    # A second one with the same prefix fetches only what is new.
    longer = replace(work, request_id="g", prompt=(*prompt[: 6 * SIZE], *whole_prompt(rng, 2), 5))
    bench.add(longer)
    bench.step()
    assert bench.fetches[-1].first_block == 6
    assert len(bench.fetches[-1].block_ids) == 2
    bench.core.abort(bench.fetches[-1].key)
    bench.step()
    bench.at_rest()


def test_a_fetch_that_ends_early_is_completed_here() -> None:
    rng = random.Random(8)
    prompt = (*whole_prompt(rng, 6), 9)
    work = EngineRequest("f", prompt, SALT, SamplingParams(), StopParams(max_tokens=6), fetch=True)
    bench = Bench()
    key = bench.add(work)
    bench.step()
    deliver(bench, bench.fetches[0], 2)
    bench.core.fetch_ended(key, 0)
    bench.run()
    assert bench.tokens[key] == oracle(work)[0]
    assert bench.core.totals.prompt_tokens_computed == 4 * SIZE + 1
    bench.at_rest()


def test_blocks_of_an_aborted_fetch_stay_as_a_prefix() -> None:
    rng = random.Random(9)
    prompt = (*whole_prompt(rng, 6), 9)
    work = EngineRequest("f", prompt, SALT, SamplingParams(), StopParams(max_tokens=6), fetch=True)
    bench = Bench()
    bench.add(work)
    bench.step()
    deliver(bench, bench.fetches[0], 4)
    bench.core.abort(bench.fetches[0].key)
    bench.step()
    bench.at_rest()
    bench.add(replace(work, request_id="again"))
    bench.step()
    assert bench.fetches[1].first_block == 4


def test_a_running_request_is_never_stuck_behind_fetching_ones() -> None:
    """Room held by fetches that never end: the running one gives way and finishes after them."""
    bench = Bench(num_blocks=12, max_model_len=44)
    runner = EngineRequest("a", (1, 2, 3, 4), SALT, SamplingParams(), StopParams(max_tokens=38))
    key = bench.add(runner)
    bench.step()
    fetcher = EngineRequest(
        "b", tuple(range(33)), SALT, SamplingParams(), StopParams(max_tokens=2), fetch=True
    )
    other = bench.add(fetcher)
    for _ in range(60):
        bench.step()
    assert bench.scheduler.waiting[0].key == key
    assert bench.scheduler.active[0].state is State.FETCHING
    bench.core.abort(other)
    bench.run()
    assert bench.tokens[key] == oracle(runner, 44)[0]
    bench.at_rest()


def test_what_can_never_fit_is_refused() -> None:
    bench = Bench(num_blocks=8, max_model_len=200)
    with pytest.raises(InvalidRequest, match="needs 9 KV blocks; this worker has 8"):
        bench.add(EngineRequest("p", tuple([1] * 9 * SIZE), SALT, announce_from=0))
    with pytest.raises(InvalidRequest, match="this worker has 8"):
        bench.add(EngineRequest("d", (1, 2), SALT, SamplingParams(), StopParams(max_tokens=100)))
    with pytest.raises(InvalidRequest, match="expected fewer than 200"):
        bench.add(
            EngineRequest("d", tuple([1] * 200), SALT, SamplingParams(), StopParams(max_tokens=1))
        )


def test_a_failed_step_ends_its_requests_only() -> None:
    bench = Bench()
    work = EngineRequest("a", (1, 2, 3), SALT, SamplingParams(), StopParams(max_tokens=5))
    key = bench.add(work)
    bench.runner.fail_next = 1
    bench.step()
    assert "the device said no" in str(bench.finished[key].error)
    after = bench.add(replace(work, request_id="b"))
    bench.run()
    assert bench.tokens[after] == oracle(work)[0]
    bench.at_rest()
    bench.add(work)
    bench.runner.fail_next = 2
    bench.step()
    bench.add(work)
    with pytest.raises(RuntimeError, match="the device said no"):
        bench.step()


def test_unusable_logits_end_their_own_request_only() -> None:
    bench = Bench()
    good = EngineRequest("good", (1, 2, 3), SALT, SamplingParams(), StopParams(max_tokens=9))
    bad = replace(good, request_id="bad", prompt=(4, 5))
    keys = [bench.add(good), bench.add(bad)]
    run = bench.runner.compute

    def poisoned(rows: Sequence[Row]) -> torch.Tensor:
        logits = run(rows)
        if len(rows) == 2 and rows[1].start > 3:
            logits[1] = torch.nan
        return logits

    bench.runner.compute = poisoned  # type: ignore[method-assign]
    bench.run()
    assert bench.tokens[keys[0]] == oracle(good)[0]
    assert bench.finished[keys[1]].error
    bench.at_rest()


def test_long_prompts_do_not_stop_running_answers() -> None:
    """Every step with a prompt chunk also carries every decode row."""
    rng = random.Random(10)
    bench = Bench(prompt_tokens=8)
    for i in range(3):
        stop = StopParams(max_tokens=30)
        bench.add(EngineRequest(f"d{i}", (i,), SALT, SamplingParams(), stop))
    bench.step()
    bench.add(
        EngineRequest(
            "long", whole_prompt(rng, 16), SALT, SamplingParams(), StopParams(max_tokens=1)
        )
    )
    for _ in range(5):
        bench.step()
        rows = bench.runner.steps[-1]
        assert sorted(len(row.token_ids) for row in rows) == [1, 1, 1, 8]
    bench.run()


class Peer:
    """Brings a fetching request's blocks, or torn bytes, at the times that the test sets."""

    def __init__(self, bench: Bench, event: FetchEvent) -> None:
        self.bench = bench
        self.event = event
        self.entry = event.first_block  # of the block table, the next to read
        bench.write(event.block_ids, ["torn"] * SIZE)

    def read(self, count: int) -> None:
        """The blocks of `count` more entries pass the fence."""
        event, end = self.event, min(self.event.end, self.entry + count)
        for entry in range(self.entry, end):
            blocks = event.block_ids[event.offset(entry) : event.offset(entry + 1)]
            first = entry * SIZE
            self.bench.write(blocks, event.token_ids[first : first + SIZE])
        self.entry = end
        self.bench.core.blocks_arrived(event.key, end)

    @property
    def done(self) -> bool:
        return self.entry == self.event.end


@pytest.mark.parametrize(("windows", "num_blocks"), [((0,), 26), ((0, 7, 7), 60), ((10,), 22)])
@pytest.mark.parametrize("seed", range(8))
def test_fetches_aborts_and_preemption_in_any_order(
    seed: int, windows: tuple[int, ...], num_blocks: int
) -> None:
    """Whole fetches, halves of one, none at all; blocks with torn bytes never reach a token."""
    rng = random.Random(seed)
    bench = Bench(num_blocks, 12, draft_tokens=3, max_model_len=90, windows=windows)
    shared = [rng.randrange(VOCAB) for _ in range(24)]
    works: dict[int, EngineRequest] = {}
    peers: dict[int, Peer] = {}
    num_fetches = 0
    for turn in range(4000):
        if len(works) < 40 and rng.random() < 0.2:
            work = replace(random_work(rng, shared=shared), fetch=rng.random() < 0.7)
            works[bench.add(work)] = work
        for event in bench.fetches:
            assert event.key not in peers, "one fetch at a time"
            peers[event.key] = Peer(bench, event)
            num_fetches += 1
        bench.fetches.clear()
        for key, peer in list(peers.items()):
            what = rng.random()
            if what < 0.4:
                peer.read(rng.randint(0, 3))
            if peer.done or what > 0.97:
                bench.core.fetch_ended(key, rng.choice([None, 0, 4]))
                del peers[key]
        if works and turn < 3000 and rng.random() < 0.02:
            key = rng.choice(list(works))
            peers.pop(key, None)
            bench.core.abort(key)
        bench.step()
        if len(works) == 40 and len(bench.finished) == 40:
            break
    assert len(bench.finished) == 40
    for key, work in works.items():
        expected, reason = oracle(work, 90, windows)
        got = bench.tokens[key]
        assert got == expected[: len(got)]
        assert bench.finished[key].reason in (reason, FinishReason.ABORTED)
    bench.at_rest()
    assert num_fetches > 10
