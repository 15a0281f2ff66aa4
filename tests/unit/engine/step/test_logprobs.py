"""Log-probabilities out of the step loop: of raw logits, whatever batch, draft or preemption."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from engine.attention.batch import Row
from engine.base.types import FinishReason, SamplingParams, StopParams, TokenLogprobs
from engine.scheduling.events import FinishedEvent, TokensEvent
from engine.scheduling.plan import MAX_SCORED
from engine.scheduling.request import EngineRequest
from tests.support.core_bench import SALT, SIZE, Bench, oracle, random_work
from tests.support.history_model import VOCAB, logits_of


class Scored(Bench):
    """A Bench that keeps the log-probabilities of prompts."""

    def __init__(self, **options: int) -> None:
        super().__init__(**options)
        self.prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        take = self.core.take_events

        def watched() -> list[object]:
            events = take()
            for event in events:
                if isinstance(event, TokensEvent) and event.prompt_logprobs:
                    assert event.key not in self.prompt_logprobs, "sent once"
                    assert not self.tokens[event.key], "with the first tokens"
                    self.prompt_logprobs[event.key] = event.prompt_logprobs
            return list(events)

        self.core.take_events = watched  # type: ignore[assignment, method-assign]


def expected_at(tokens: Sequence[int], chosen: int, num_top: int) -> TokenLogprobs:
    logprobs = logits_of(list(tokens)).double().log_softmax(-1)
    order = sorted(range(VOCAB), key=lambda t: (-float(logits_of(list(tokens))[t]), t))[:num_top]
    return TokenLogprobs(
        float(logprobs[chosen]), tuple(order), tuple(float(logprobs[t]) for t in order)
    )


def assert_close(got: TokenLogprobs, wanted: TokenLogprobs) -> None:
    assert got.token_ids == wanted.token_ids
    assert got.chosen == pytest.approx(wanted.chosen, abs=5e-6)
    assert got.logprobs == pytest.approx(wanted.logprobs, abs=5e-6)


def check(bench: Scored, key: int, work: EngineRequest) -> None:
    history = [*work.prompt, *work.output]
    answer = bench.tokens[key]
    got = bench.logprobs.get(key, [])
    if work.num_logprobs is None:
        assert got == []
    else:
        assert len(got) == len(answer)
        for i, scored in enumerate(got):
            wanted = expected_at([*history, *answer[:i]], answer[i], work.num_logprobs)
            assert_close(scored, wanted)
    told = bench.prompt_logprobs.get(key, [])
    if work.num_prompt_logprobs is None:
        assert told == []
    else:
        assert len(told) == len(work.prompt) - 1
        for i, scored in enumerate(told, 1):
            wanted = expected_at(work.prompt[:i], work.prompt[i], work.num_prompt_logprobs)
            assert_close(scored, wanted)


@pytest.mark.parametrize(("draft_tokens", "num_logits"), [(0, 1 << 30), (4, 1 << 30), (4, 10)])
@pytest.mark.parametrize("num_blocks", [24, 64])
@pytest.mark.parametrize("seed", range(3))
def test_equal_to_log_softmax_and_no_token_changes(
    seed: int, num_blocks: int, draft_tokens: int, num_logits: int
) -> None:
    """Also where drafts are cut to the logits that a GPU's step may have."""
    rng = random.Random(seed)
    bench = Scored(num_blocks=num_blocks, prompt_tokens=16, draft_tokens=draft_tokens)
    bench.scheduler.budgets = replace(bench.scheduler.budgets, num_logits=num_logits)
    shared = [rng.randrange(VOCAB) for _ in range(24)]
    works = {}
    for _ in range(24):
        work = replace(
            random_work(rng, shared=shared),
            num_logprobs=rng.choice([None, 0, 1, 5]),
            num_prompt_logprobs=rng.choice([None, None, 0, 3]),
        )
        works[bench.add(work)] = work
        for _ in range(rng.randrange(3)):
            bench.step()
    bench.run()
    for key, work in works.items():
        tokens, reason = oracle(work)
        assert bench.tokens[key] == tokens
        assert bench.finished[key].reason is reason
        check(bench, key, work)
    bench.at_rest()
    if num_blocks == 24:
        assert bench.scheduler.num_preemptions > 0, "the scenario is meant to preempt"
    if draft_tokens:
        assert bench.core.totals.accepted_tokens > 0, "the scenario is meant to accept drafts"


def test_resumed_tokens_are_not_reported_again() -> None:
    rng = random.Random(5)
    for _ in range(10):
        work = replace(random_work(rng), num_logprobs=2)
        whole, _ = oracle(work)
        work = replace(work, output=tuple(whole[: rng.randrange(len(whole) + 1)]))
        bench = Scored(draft_tokens=3)
        key = bench.add(work)
        bench.run()
        check(bench, key, work)


def prompt_of(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCAB) for _ in range(length))


@pytest.mark.parametrize("length", [1, 2, SIZE, SIZE + 1, 5 * SIZE, 5 * SIZE + 3])
def test_a_prompt_alone_is_scored_without_a_token(length: int) -> None:
    prompt = prompt_of(random.Random(length), length)
    work = EngineRequest(
        "p", prompt, SALT, SamplingParams(), StopParams(max_tokens=0), num_prompt_logprobs=2
    )
    bench = Scored(draft_tokens=3)
    key = bench.add(work)
    bench.run()
    assert bench.tokens[key] == []
    assert bench.finished[key].reason is FinishReason.LENGTH
    check(bench, key, work)
    bench.at_rest()


def test_cached_positions_are_scored_and_hashed_blocks_are_not_written_again() -> None:
    """The second request finds all blocks cached; its own are others, the named ones are left."""
    prompt = prompt_of(random.Random(3), 6 * SIZE + 2)
    plain = EngineRequest("a", prompt, SALT, SamplingParams(), StopParams(max_tokens=2))
    bench = Scored()
    bench.add(plain)
    bench.run()
    named = dict(bench.pool._by_hash)
    written = bench.runner.num_tokens
    assert len(named) == 6
    rows: list[Row] = []
    run = bench.runner.compute

    def watched(step: Sequence[Row]) -> torch.Tensor:
        rows.extend(step)
        return run(step)

    bench.runner.compute = watched  # type: ignore[method-assign]
    scored = replace(plain, request_id="b", num_prompt_logprobs=4)
    key = bench.add(scored)
    bench.run()
    check(bench, key, scored)
    assert bench.tokens[key] == oracle(plain)[0]
    assert bench.runner.num_tokens - written >= len(prompt), "every position was computed"
    touched = {
        row.block_ids[p // SIZE]
        for row in rows
        for p in range(row.start, row.start + len(row.token_ids))
    }
    assert not touched & set(named.values())
    assert {n: b for n, b in bench.pool._by_hash.items() if n in named} == named
    # What it left behind serves the next one, which asks for nothing special.
    again = bench.add(replace(plain, request_id="c"))
    bench.run()
    assert bench.finished[again].counts.num_cached_tokens == 6 * SIZE
    bench.at_rest()


def test_it_is_not_fetched_and_waits_for_no_producer() -> None:
    prompt = prompt_of(random.Random(4), 4 * SIZE + 1)
    producer = EngineRequest(
        "m", prompt, SALT, SamplingParams(), StopParams(max_tokens=2), fetch=True
    )
    bench = Scored()
    first = bench.add(producer)
    bench.step()
    assert len(bench.fetches) == 1
    scored = replace(producer, request_id="s", num_prompt_logprobs=0)
    key = bench.add(scored)
    for _ in range(20):
        bench.step()
    assert len(bench.fetches) == 1
    assert key in bench.finished
    check(bench, key, scored)
    bench.core.abort(first)
    bench.step()
    bench.at_rest()


def test_one_step_scores_a_bounded_number_of_positions() -> None:
    rng = random.Random(6)
    bench = Scored(num_blocks=700, prompt_tokens=2000, max_model_len=1500)
    works = {}
    for i in range(2):
        stop = StopParams(max_tokens=1)
        works[
            bench.add(
                EngineRequest(
                    f"p{i}",
                    prompt_of(rng, 700),
                    SALT,
                    SamplingParams(),
                    stop,
                    num_prompt_logprobs=0,
                )
            )
        ] = 0
    plain = bench.add(
        EngineRequest("q", prompt_of(rng, 900), SALT, SamplingParams(), StopParams(max_tokens=1))
    )
    bench.step()
    assert sum(row.num_logits for row in bench.runner.steps[-1]) <= MAX_SCORED + 1
    assert plain in bench.finished, "a request without logits is not delayed"
    bench.run()
    assert max(sum(row.num_logits for row in step) for step in bench.runner.steps) <= MAX_SCORED + 2
    assert all(len(bench.prompt_logprobs[key]) == 699 for key in works)


@pytest.mark.parametrize("where", ["prompt", "answer"])
def test_unusable_logits_end_their_own_request_only(where: str) -> None:
    work = EngineRequest("good", (1, 2, 3, 4), SALT, SamplingParams(), StopParams(max_tokens=9))
    scored = replace(work, num_logprobs=1, num_prompt_logprobs=1)
    bench = Scored()
    keys = [bench.add(scored), bench.add(replace(scored, request_id="bad", prompt=(5, 6, 7)))]
    run = bench.runner.compute
    blocks: list[int] = []  # the first of the bad one

    def poisoned(rows: Sequence[Row]) -> torch.Tensor:
        logits = run(rows)
        first = 0
        for row in rows:
            if row.token_ids[0] == 5 and row.start == 0:
                blocks.append(row.block_ids[0])
            poison = row.start == 0 if where == "prompt" else row.start > 4
            if row.block_ids[0] in blocks and poison:
                logits[first] = torch.nan
            first += row.num_logits
        return logits

    bench.runner.compute = poisoned  # type: ignore[method-assign]
    bench.run()
    check(bench, keys[0], scored)
    assert isinstance(bench.finished[keys[1]], FinishedEvent)
    assert bench.finished[keys[1]].error
    bench.at_rest()


def test_sampled_tokens_have_the_logprobs_of_raw_logits() -> None:
    """Temperature, penalties, bias and bans change the token, not the numbers."""
    sampling = SamplingParams(
        temperature=1.5, top_k=4, repetition_penalty=1.5, seed=3, logit_bias=((2, 50.0),)
    )
    work = EngineRequest(
        "b", (1, 2, 3), SALT, sampling, StopParams(max_tokens=12), num_logprobs=VOCAB
    )
    bench = Scored(draft_tokens=3)
    key = bench.add(work)
    bench.run()
    check(bench, key, work)
    assert 2 in bench.tokens[key]
    for scored in bench.logprobs[key]:
        assert sum(math.exp(x) for x in scored.logprobs) == pytest.approx(1.0)
