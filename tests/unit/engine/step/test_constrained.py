"""Constrained answers out of the step loop equal a plain loop's that makes its masks anew."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from decode.speculative.acceptance import Acceptance
from engine.base.errors import InvalidRequest
from engine.base.types import FinishReason, SamplingParams, StopParams
from engine.constraints import Masks
from engine.constraints.masks import MaskRequest
from engine.scheduling.drafts import fitted
from engine.scheduling.request import EngineRequest, State
from engine.scheduling.speculation import FORCED, PENDING, Draft
from tests.support.constrained_loop import PERSON, plain_loop
from tests.support.core_bench import SALT, Bench, random_work
from tests.support.drafting import learn, survival
from tests.support.history_model import VOCAB
from tests.support.tiny_grammar import (
    EOS,
    encode,
    lark,
    matcher_of,
    regex,
    schema,
    text_of,
)

GRAMMARS = [
    PERSON,
    schema({"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 5}),
    regex(r"[a-f]{4,12}\."),
    regex(r"[0-9]+"),
    lark('start: "true" | "false" | "null, and age: " /[0-9]{1,3}/'),
    lark('start: "[" start "]" | "a"'),
]


def constrained(work: EngineRequest, grammar: str) -> EngineRequest:
    return replace(work, matcher=matcher_of(grammar, work.output))


def some_work(rng: random.Random, shared: Sequence[int] = ()) -> EngineRequest:
    work = random_work(rng, shared=shared)
    assert work.stop
    stop = replace(work.stop, stop_token_ids=frozenset([EOS]))
    if rng.random() < 0.2:  # ignore_eos
        stop = replace(stop, stop_token_ids=frozenset())
    return replace(work, stop=stop)


@pytest.mark.parametrize("draft_tokens", [0, 4, 12])
@pytest.mark.parametrize("num_blocks", [24, 64])
@pytest.mark.parametrize("seed", range(4))
def test_equal_to_the_plain_loop(seed: int, num_blocks: int, draft_tokens: int) -> None:
    rng = random.Random(seed)
    bench = Bench(num_blocks, prompt_tokens=16, draft_tokens=draft_tokens)
    shared = [rng.randrange(VOCAB) for _ in range(24)]
    works: dict[int, tuple[EngineRequest, str]] = {}
    plain: dict[int, EngineRequest] = {}
    for _ in range(24):
        work = some_work(rng, shared)
        if rng.random() < 0.2:
            plain[bench.add(work)] = work
            continue
        grammar = rng.choice(GRAMMARS)
        works[bench.add(constrained(work, grammar))] = (work, grammar)
        for _ in range(rng.randrange(3)):
            bench.step()
    bench.run()
    num_stopped = 0
    for key, (work, grammar) in works.items():
        expected, reason = plain_loop(work, grammar)
        assert bench.tokens[key] == expected
        assert bench.finished[key].reason is reason
        assert bench.finished[key].error is None
        num_stopped += reason is FinishReason.STOP
    assert num_stopped > 3
    bench.at_rest()
    if num_blocks == 24:
        assert bench.scheduler.num_preemptions > 0, "the scenario is meant to preempt"
    if draft_tokens:
        assert bench.core.totals.accepted_tokens > 0, "the scenario is meant to accept drafts"


def test_a_resumed_answer_goes_on_in_its_grammar() -> None:
    rng = random.Random(7)
    for _ in range(30):
        work, grammar = some_work(rng), rng.choice(GRAMMARS)
        whole, reason = plain_loop(work, grammar)
        cut = rng.randrange(len(whole) + 1)
        bench = Bench(draft_tokens=3)
        resumed = replace(work, output=tuple(whole[:cut]))
        key = bench.add(constrained(resumed, grammar))
        bench.run()
        assert bench.tokens[key] == whole[cut:]
        assert bench.finished[key].reason is reason
        bench.at_rest()


def test_finished_answers_are_of_the_grammar() -> None:
    rng = random.Random(8)
    bench = Bench(256, num_seqs=32, draft_tokens=8)
    keys = []
    for i in range(32):
        sampling = SamplingParams(temperature=1.5, seed=i)
        stop = StopParams(max_tokens=60, stop_token_ids=frozenset([EOS]))
        work = EngineRequest(f"p{i}", (rng.randrange(VOCAB),), SALT, sampling, stop)
        keys.append((bench.add(constrained(work, PERSON)), i))
    bench.run()
    texts = set()
    for key, _ in keys:
        if bench.finished[key].reason is FinishReason.LENGTH:  # a long number
            continue
        value = json.loads(text_of(bench.tokens[key]))
        assert isinstance(value["name"], str)
        assert isinstance(value["age"], int)
        texts.add(text_of(bench.tokens[key]))
    assert len(texts) > 20, "they differ by their seeds"


def test_what_is_forced_comes_in_one_step() -> None:
    """Jump-ahead: a text without choices takes a step, not one a token."""
    text = "null, and age: 7. ab, cd, ef, gh."
    work = EngineRequest(
        "f",
        (1,),
        SALT,
        SamplingParams(),
        StopParams(max_tokens=60, stop_token_ids=frozenset([EOS])),
    )
    grammar = lark(f"start: {json.dumps(text)}")
    steps = []
    for draft_tokens in (0, 40):
        bench = Bench(draft_tokens=draft_tokens)
        key = bench.add(constrained(work, grammar))
        bench.run()
        assert text_of(bench.tokens[key]) == text
        assert bench.finished[key].reason is FinishReason.STOP
        assert bench.finished[key].matched_stop is None
        steps.append(len(bench.runner.steps))
    assert steps[0] == len(encode(text))
    assert steps[1] <= 3


def test_neither_min_tokens_nor_ignore_eos_outlives_the_grammar() -> None:
    for grammar, least, stops, expected in (
        (regex("ab"), 20, {EOS}, "ab"),  # complete: nothing can follow
        (regex("ab"), 0, set(), "ab"),
        (regex("[0-9]{1,4}"), 3, {EOS}, None),  # could end before, may not
        (regex("(ab)?"), 9, {EOS}, "ab"),
    ):
        stop = StopParams(max_tokens=30, min_tokens=least, stop_token_ids=frozenset(stops))
        bench = Bench(draft_tokens=3)
        work = EngineRequest("m", (3, 4), SALT, SamplingParams(temperature=1.0, seed=2), stop)
        key = bench.add(constrained(work, grammar))
        bench.run()
        assert bench.finished[key].reason is FinishReason.STOP
        if expected is not None:
            assert text_of(bench.tokens[key]) == expected
        else:
            assert re.fullmatch("[0-9]{3,4}", text_of(bench.tokens[key]))


def test_a_stop_token_that_is_all_the_grammar_allows_is_sampled_in_spite_of_min_tokens() -> None:
    comma = encode(",")[0]
    stop = StopParams(max_tokens=9, min_tokens=4, stop_token_ids=frozenset([comma, EOS]))
    bench = Bench(draft_tokens=3)
    work = EngineRequest("m", (3, 4), SALT, SamplingParams(temperature=1.0), stop)
    key = bench.add(constrained(work, regex("a,b")))
    bench.run()
    assert text_of(bench.tokens[key]) == "a,b"
    assert bench.finished[key].error is None


def test_a_grammar_that_fails_ends_its_own_request_only() -> None:
    work = EngineRequest(
        "good", (1, 2), SALT, SamplingParams(), StopParams(12, stop_token_ids=frozenset([EOS]))
    )
    bench = Bench(draft_tokens=3)
    bad = constrained(replace(work, request_id="bad"), PERSON)
    keys = [bench.add(constrained(work, PERSON)), bench.add(bad)]
    bench.step()
    assert bad.matcher is not None
    bad.matcher.advance(encode("}}"))
    bench.run()
    expected, reason = plain_loop(work, PERSON)
    assert bench.tokens[keys[0]] == expected
    assert bench.finished[keys[0]].reason is reason
    error = bench.finished[keys[1]].error
    assert isinstance(error, InvalidRequest)
    assert error.field == "constraint"
    bench.at_rest()


# -- drafts ----------------------------------------------------------------------------------------


def test_an_answer_whose_blocks_are_fetched_holds_up_nothing() -> None:
    """It has no mask yet and needs none: the engine waits for messages, not for a mask."""
    bench = Bench(64, prompt_tokens=16, draft_tokens=0)
    prompt = tuple(range(33))
    work = EngineRequest("f", prompt, SALT, SamplingParams(), StopParams(max_tokens=6), fetch=True)
    bench.add(constrained(work, PERSON))
    late = bench.core._metrics.constraint_masks_late
    assert not bench.core.step()
    assert bench.scheduler.active[0].state is State.FETCHING
    assert bench.core.idle
    assert late._value.get() == 0
    assert not bench.core.step()


def test_drafts_are_cut_where_the_grammar_forbids_them() -> None:
    matcher = matcher_of(regex("[a-f]{3}[0-9]"))
    tokens = encode("abcd")
    assert fitted(Draft(tokens, [5, 6, 7, 8]), matcher, 9) == Draft(tokens[:3], [5, 6, 7])
    assert fitted(Draft([], []), matcher, 9) == Draft([], [])
    promised = Draft([PENDING] * 3, [0] * 3)
    assert fitted(promised, matcher, 3) is promised


def test_forced_tokens_are_drafted_and_the_drafter_goes_on_behind_them() -> None:
    matcher = matcher_of(regex("true, [a-f]+"))
    forced = matcher.forced()
    assert text_of(forced) == "true, "
    sure = [FORCED] * len(forced)
    assert fitted(Draft(encode("ab"), [1, 2]), matcher, 9) == Draft(forced, sure)
    assert fitted(Draft([], []), matcher, 2) == Draft(forced[:2], sure[:2])
    longer = [*forced, *encode("e0")]
    proposed = Draft(longer, list(range(len(longer))))
    cut = len(longer) - 1
    assert fitted(proposed, matcher, 20) == Draft(
        longer[:cut], sure + proposed.buckets[len(forced) : cut]
    )
    promised = Draft([PENDING] * 5, [0] * 5)
    assert fitted(promised, matcher, 5) == Draft(forced, sure)


def test_forced_tokens_are_certain_and_teach_nothing() -> None:
    acceptance = Acceptance([0.5, 0.25])
    assert survival(acceptance, 0, [FORCED, FORCED, 0], 0.01) == [1.0, 1.0, 0.5]
    before = survival(acceptance, 0, [0, 1], 0.01)
    learn(acceptance, 0, Draft([7, 8], [FORCED, FORCED]), [7, 8, 9])
    learn(acceptance, 0, Draft([7, 8], [FORCED, 0]), [3])
    assert survival(acceptance, 0, [0, 1], 0.01) == before
    learn(acceptance, 0, Draft([7, 8], [FORCED, 0]), [7, 8])
    assert survival(acceptance, 0, [0, 1], 0.01)[0] > before[0]


def test_masks_are_one_buffer_that_grows() -> None:
    masks = Masks(VOCAB)
    matcher = matcher_of(regex("[a-f]+"))
    small = masks.wait(masks.begin({7: MaskRequest(matcher, [])}))
    assert list(small) == [7]
    assert small[7].shape == (1, 2)
    draft = encode("abc") * 40
    large = masks.wait(
        masks.begin({1: MaskRequest(matcher, draft), 2: MaskRequest(matcher_of(PERSON), [])})
    )
    assert large[1].shape == (121, 2)
    assert large[2].shape == (1, 2)
    assert torch.from_numpy(large[1]).unique(dim=0).shape[0] <= 2
