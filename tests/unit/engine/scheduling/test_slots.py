"""Plain answers as arrays: the slots agree with their requests, and no token depends on them."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.base.types import SamplingParams, StopParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.block_table import BlockTable
from engine.scheduling.request import NO_SLOT, EngineRequest, Request, State
from engine.scheduling.slots import MAX_STOPS, DecodeSlots, is_plain
from tests.support.core_bench import SALT, Bench, check_answers, random_work
from tests.support.drafting import ints, padded
from tests.support.history_model import VOCAB
from tests.support.tiny_grammar import matcher_of, regex

STOP = StopParams(max_tokens=9, stop_token_ids=frozenset({3, 4}))
POOL = BlockPool(4000)


def answer(key: int, num_tokens: int = 6, **changes: Any) -> Request:
    """A request with a prompt of 5 tokens, and what follows it."""
    tokens = tuple(range(10, 10 + num_tokens))
    work = EngineRequest(f"r{key}", tokens[:5], SALT, SamplingParams(), STOP, tokens[5:])
    request = Request(key, dataclasses.replace(work, **changes), BlockTable(POOL, 4), 0.0)
    request.table.reserve(len(request.tokens))
    return request


def append(slots: DecodeSlots, tokens: list[list[int]]) -> list[Request]:
    """Advance the slots by so many tokens each; returns the requests whose answer ends."""
    counts = ints([len(row) for row in tokens])
    before = [len(history) for history in slots.histories]
    new, ended = slots.append(padded(tokens, max(map(len, tokens), default=1)), counts)
    for history, known, more in zip(slots.histories, before, new, strict=True):
        assert history[known:] == more
    return [slots.requests[slot] for slot in ended]


def agree(slots: DecodeSlots) -> None:
    for slot, request in enumerate(slots.requests):
        assert request.slot == slot
        assert slots.histories[slot] is request.tokens
        assert slots.tables[slot] is request.table.ids
        assert slots.params[slot] is request.work.sampling
        assert slots.length[slot] == len(request.tokens)
        assert slots.newest[slot] == request.tokens[-1]


def test_slots_agree_with_their_requests_whatever_enters_and_leaves() -> None:
    rng, slots, requests = random.Random(1), DecodeSlots(200), []
    for key in range(300):
        if rng.random() < 0.7:
            requests.append(answer(key, stop=StopParams(max_tokens=1000)))
            slots.enter(requests[-1])
        elif requests:
            request = requests.pop(rng.randrange(len(requests)))
            slots.leave(request)
            slots.leave(request)  # without a slot: no error
            assert request.slot == NO_SLOT
        if rng.random() < 0.2:
            append(slots, [[rng.randrange(50)] for _ in slots.requests])
            for request in slots.without_room():
                assert len(request.tokens) > request.table.num_positions
                request.table.reserve(len(request.tokens))
                slots.got_blocks(request)
            assert not slots.without_room()
        assert set(slots.requests) == set(requests)
        agree(slots)
    assert len(slots) > 50


def test_an_answer_ends_at_a_stop_token_at_its_length_and_at_the_models() -> None:
    slots = DecodeSlots(max_model_len=8)
    stopped, short, long, goes_on = (answer(k) for k in range(4))
    short.work = dataclasses.replace(short.work, stop=StopParams(max_tokens=2))
    for request in (stopped, short, goes_on):
        slots.enter(request)
    assert append(slots, [[4], [5], [5]]) == [stopped, short]
    assert [r.num_computed for r in slots.requests] == [6, 6, 6]
    slots.leave(stopped)
    slots.leave(short)
    slots.enter(long)
    assert append(slots, [[5], [3]]) == [goes_on, long]  # 8 tokens; a stop token


def test_an_answer_takes_no_token_after_the_one_that_ends_it() -> None:
    slots = DecodeSlots(max_model_len=50)
    stopped, short, goes_on = (answer(k) for k in range(3))
    short.work = dataclasses.replace(short.work, stop=StopParams(max_tokens=3))
    for request in (stopped, short, goes_on):
        slots.enter(request)
    assert append(slots, [[7, 4, 7, 4], [7, 7], [7, 7, 7]]) == [stopped, short]
    assert [request.tokens[6:] for request in slots.requests] == [[7, 4], [7, 7], [7, 7, 7]]
    assert [request.num_computed for request in slots.requests] == [7, 7, 8]
    agree(slots)


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": SamplingParams(presence_penalty=0.1)},
        {"sampling": SamplingParams(frequency_penalty=-0.1)},
        {"sampling": SamplingParams(repetition_penalty=1.1)},
        {"sampling": SamplingParams(logit_bias=((1, 2.0),))},
        {"stop": dataclasses.replace(STOP, min_tokens=2)},
        {"stop": StopParams(9, stop_token_ids=frozenset(range(MAX_STOPS + 1)))},
        {"num_logprobs": 0},
        {"num_prompt_logprobs": 0},
        {"announce_from": 0},
        {"matcher": object()},
        {"output": ()},
    ],
)
def test_an_uncommon_answer_has_no_slot(changes: dict[str, Any]) -> None:
    assert is_plain(answer(1))
    assert is_plain(answer(1, sampling=SamplingParams(0.7, 0.9, 5, 0.1, seed=3)))
    assert not is_plain(answer(1, **changes))


def mostly_plain(rng: random.Random) -> EngineRequest:
    work = random_work(rng, shared=range(12))
    assert work.sampling
    if rng.random() < 0.25:
        return work
    plain = SamplingParams(work.sampling.temperature, work.sampling.top_p, seed=work.sampling.seed)
    return dataclasses.replace(work, sampling=plain)


@pytest.mark.parametrize("draft_tokens", [0, 3])
@pytest.mark.parametrize("seed", range(3))
def test_no_token_depends_on_slots(seed: int, draft_tokens: int) -> None:
    """Few blocks, so that answers are preempted; some are aborted."""
    rng = random.Random(seed)
    bench = Bench(num_blocks=22, draft_tokens=draft_tokens)
    works, aborted, num_slots = {}, set(), 0
    for _ in range(20):
        work = mostly_plain(rng)
        works[bench.add(work)] = work
        for _ in range(rng.choice([0, 1, 2])):
            bench.step()
            agree(bench.scheduler.slots)
            num_slots += len(bench.scheduler.slots)
        if rng.random() < 0.2 and bench.scheduler.slots.requests:
            request = rng.choice(bench.scheduler.slots.requests)
            bench.core.abort(request.key)
            aborted.add(request.key)
            agree(bench.scheduler.slots)
    while len(bench.finished) < len(works):
        bench.step()
        agree(bench.scheduler.slots)
        num_slots += len(bench.scheduler.slots)
    check_answers(bench, {key: work for key, work in works.items() if key not in aborted})
    assert num_slots > 50 and aborted and bench.scheduler.num_preemptions
    assert not bench.scheduler.slots.requests
    bench.at_rest()


def mixed(rng: random.Random, kinds: list[str]) -> list[EngineRequest]:
    """Answers of these kinds; their matchers serve one run."""
    works = []
    for kind in kinds:
        work = random_work(rng, longest=12, shared=range(12))
        assert work.sampling
        plain = SamplingParams(work.sampling.temperature, seed=work.sampling.seed)
        if kind != "penalized":
            work = dataclasses.replace(work, sampling=plain)
        if kind == "logprobs":
            work = dataclasses.replace(work, num_logprobs=2)
        if kind == "constrained":
            work = dataclasses.replace(work, matcher=matcher_of(regex("[a-f]{4,30}")))
        works.append(work)
    return works


@settings(max_examples=15, deadline=None)
@given(
    kinds=st.lists(
        st.sampled_from(["plain", "plain", "penalized", "logprobs", "constrained"]),
        min_size=1,
        max_size=9,
    ),
    seed=st.integers(0, 1000),
    draft_tokens=st.integers(1, 6),
    max_logits=st.sampled_from([9, 14, 1 << 30]),
)
def test_drafts_of_mixed_answers_change_no_token(
    kinds: list[str], seed: int, draft_tokens: int, max_logits: int
) -> None:
    """Few blocks, so that answers are preempted, against one token a step with room for all."""
    runs = []
    for drafts, num_blocks in ((draft_tokens, 20), (0, 200)):
        bench = Bench(num_blocks=num_blocks, draft_tokens=drafts)
        budgets = bench.scheduler.budgets
        bench.scheduler.budgets = dataclasses.replace(budgets, num_logits=max_logits)
        for work in mixed(random.Random(seed), kinds):
            bench.add(work)
        bench.run()
        bench.at_rest()
        reasons = {key: event.reason for key, event in bench.finished.items()}
        runs.append((bench.tokens, reasons, bench.logprobs))
    assert runs[0] == runs[1]


def test_a_step_that_ends_the_last_answer_has_computed() -> None:
    """Its slots are empty afterwards."""
    bench = Bench()
    works = {}
    for key in range(2):
        stop = StopParams(max_tokens=4)
        work = EngineRequest(f"r{key}", (key, 5), SALT, SamplingParams(), stop)
        works[bench.add(work)] = work
    assert [bench.step() for _ in range(5)] == [True] * 4 + [False]
    check_answers(bench, works)


def test_a_number_that_is_not_finite_in_a_slot_ends_its_answer_alone() -> None:
    bench = Bench()
    works = {}
    for key in range(3):
        sampling = SamplingParams(temperature=1.0, seed=key)
        prompt = (key, 1 + key, 2)
        work = EngineRequest(f"r{key}", prompt, SALT, sampling, StopParams(max_tokens=12))
        works[bench.add(work)] = work
    while len(bench.scheduler.slots) < 3:
        bench.step()
    sick, compute = bench.scheduler.slots.requests[1], bench.runner.compute

    def poisoned(rows: Any) -> Any:
        logits = compute(rows)
        logits[sick.slot, VOCAB // 2] = np.nan
        return logits

    bench.runner.compute = poisoned  # type: ignore[method-assign]
    bench.step()
    bench.runner.compute = compute  # type: ignore[method-assign]
    assert sick.state is State.FINISHED and bench.core.load().num_running == 2
    bench.run()
    check_answers(bench, {key: work for key, work in works.items() if key != sick.key})
    bench.at_rest()
