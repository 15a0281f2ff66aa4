"""A constraint that costs much costs its own answer; the others keep their speed and tokens."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from engine.base.errors import InvalidRequest
from engine.base.types import FinishReason, SamplingParams, StopParams
from engine.constraints import Matcher
from engine.constraints.masks import SLOW_S
from engine.scheduling.request import EngineRequest
from tests.support.constrained_loop import PERSON, plain_loop
from tests.support.core_bench import SALT, Bench, oracle, random_work
from tests.support.tiny_grammar import EOS, lark, matcher_of, regex

AMBIGUOUS = lark('start: s\ns: s s | "a" | s s s')
LETTERS = regex("[a-f]+")


class Library:
    """llguidance's matcher with something before each of its masks."""

    def __init__(self, inner: object, before: Callable[[], None]) -> None:
        self._inner, self._before = inner, before

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def unsafe_compute_mask_ptr(self, address: int, num_bytes: int) -> None:
        self._before()
        self._inner.unsafe_compute_mask_ptr(address, num_bytes)


def with_(matcher: Matcher, before: Callable[[], None]) -> Matcher:
    matcher.library = Library(matcher.library, before)
    return matcher


def burn(seconds: float) -> None:
    end_s = time.thread_time() + seconds
    while time.thread_time() < end_s:
        pass


def answer(name: str, max_tokens: int = 30) -> EngineRequest:
    stop = StopParams(max_tokens, stop_token_ids=frozenset([EOS]))
    return EngineRequest(name, (3, 4, 5), SALT, SamplingParams(), stop)


def test_a_late_mask_keeps_its_own_answer_out_and_changes_no_token() -> None:
    bench, gate = Bench(), threading.Event()
    late, other = answer("late"), answer("other")
    first = bench.add(replace(late, matcher=with_(matcher_of(LETTERS), gate.wait)))
    beside = bench.add(replace(other, matcher=matcher_of(LETTERS)))
    plain = bench.add(random_work(random.Random(1)))
    while len(bench.finished) < 2:
        bench.step()
    assert {*bench.finished} == {beside, plain}
    assert bench.tokens[first] == []
    assert bench.core._metrics.constraint_masks_late._value.get() > 0
    gate.set()
    bench.run()
    assert bench.tokens[first] == plain_loop(late, LETTERS)[0]
    assert bench.tokens[beside] == plain_loop(other, LETTERS)[0]
    bench.at_rest()


def test_an_answer_that_is_aborted_while_its_mask_is_late_holds_nothing() -> None:
    bench, gate = Bench(), threading.Event()
    key = bench.add(replace(answer("late"), matcher=with_(matcher_of(LETTERS), gate.wait)))
    bench.step()
    bench.core.abort(key)
    bench.step()
    assert bench.finished[key].reason is FinishReason.ABORTED
    bench.at_rest()
    gate.set()


def test_an_ambiguous_grammar_ends_alone() -> None:
    rng = random.Random(2)
    bench = Bench(num_blocks=400, draft_tokens=4, max_model_len=1200)
    endless = SamplingParams(logit_bias=((EOS, -1000.0),))
    work = replace(answer("ambiguous"), sampling=endless, stop=StopParams(1000))
    costly = bench.add(replace(work, matcher=matcher_of(AMBIGUOUS)))
    works = {bench.add(work): work for work in (random_work(rng) for _ in range(6))}
    bench.run()
    error = bench.finished[costly].error
    assert isinstance(error, InvalidRequest)
    assert error.field == "constraint"
    assert "processor time" in error.description
    assert 20 < len(bench.tokens[costly]) < 1000
    assert bench.core._metrics.constraints_too_costly._value.get() == 1
    for key, work in works.items():
        assert (bench.tokens[key], bench.finished[key].reason) == oracle(work, 1200)
    bench.at_rest()


def test_a_slow_grammar_is_not_waited_for_until_it_is_quick_again() -> None:
    bench, kinds = Bench(), [answer("slow", 60), answer("quick", 60)]
    slow, quick = (matcher_of(LETTERS) for _ in kinds)
    num_costly = 3

    def before() -> None:
        nonlocal num_costly
        num_costly -= 1
        if num_costly >= 0:
            burn(8 * SLOW_S)

    slow = with_(slow, before)
    keys = [
        bench.add(replace(kinds[0], matcher=slow)),
        bench.add(replace(kinds[1], matcher=quick)),
    ]
    was_slow = False
    while len(bench.finished) < 2:
        bench.step()
        was_slow = was_slow or slow.shared.is_slow
        assert not quick.shared.is_slow
    assert was_slow
    assert not slow.shared.is_slow
    for key, work in zip(keys, kinds, strict=True):
        assert bench.tokens[key] == plain_loop(work, LETTERS)[0]
    bench.at_rest()


def test_answers_with_costly_constraints_take_turns() -> None:
    bench = Bench(num_seqs=16)
    works = [answer(f"{i}", 12) for i in range(8)]
    costly = {i: with_(matcher_of(LETTERS), lambda: burn(0.004)) for i in range(4)}
    keys = [
        bench.add(replace(work, matcher=costly.get(i) or matcher_of(PERSON)))
        for i, work in enumerate(works)
    ]
    most = 0
    while len(bench.finished) < len(works):
        before = {key: len(bench.tokens[key]) for key in keys[:4]}
        bench.step()
        most = max(most, sum(len(bench.tokens[key]) > n for key, n in before.items()))
    assert most == 1
    for i, (key, work) in enumerate(zip(keys, works, strict=True)):
        assert bench.tokens[key] == plain_loop(work, LETTERS if i < 4 else PERSON)[0]
    bench.at_rest()


def test_tokens_of_an_earlier_attempt_are_taken_within_the_same_bound() -> None:
    matcher = matcher_of(AMBIGUOUS)
    begun_s = time.thread_time()
    assert not matcher.advance([1] * 5000)
    assert time.thread_time() - begun_s < 30
    assert "processor time" in matcher.error
