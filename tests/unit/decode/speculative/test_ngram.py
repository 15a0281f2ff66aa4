"""Prompt lookup against a plain rescan of the history."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decode.speculative import ngram
from decode.speculative.native import NativeLookup
from decode.speculative.ngram import MAX_MATCH, NgramDrafter
from engine.scheduling.speculation import Draft, Drafter, DraftInputs
from tests.support.drafting import ints, padded, propose

NO_DRAFT = Draft([], [])
ALONE, DIFFER, AGREE = range(3)


def bucket(kind: int, length: int) -> int:
    bucket = max(i for i, least in enumerate(ngram._LENGTHS) if least <= max(1, length))
    return kind * len(ngram._LENGTHS) + bucket


def rescan(tokens: list[int], max_tokens: int) -> Draft:
    """By definition: the longest suffix that occurred before, its most recent end."""
    matches = []
    for end in range(len(tokens) - 1, 0, -1):
        length = 0
        while length < min(end, MAX_MATCH) and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        matches.append((length, end))
    best = max((length for length, _ in matches), default=0)
    if not best or max_tokens <= 0:
        return NO_DRAFT
    ends = [end for length, end in matches if length == best]

    def after(end: int) -> list[int]:
        period = tokens[end:]
        return [period[i % len(period)] for i in range(max_tokens)]

    draft, kinds = after(ends[0]), [ALONE] * max_tokens
    if len(ends) > 1:
        other = after(ends[1])
        for i in range(max_tokens):
            kinds[i] = AGREE if draft[i] == other[i] else DIFFER
            if kinds[i] == DIFFER:
                break
    return Draft(draft, [bucket(kind, best + i) for i, kind in enumerate(kinds)])


@pytest.mark.parametrize("native", [True, False])
@settings(max_examples=300)
@given(
    alphabet=st.integers(1, 6),
    steps=st.lists(st.lists(st.integers(0, 5), max_size=9), min_size=1, max_size=8),
    max_tokens=st.integers(0, 20),
)
def test_equals_a_rescan_at_every_step(
    native: bool, alphabet: int, steps: list[list[int]], max_tokens: int
) -> None:
    drafter: Drafter = NgramDrafter(native=native)
    tokens: list[int] = []
    for step in steps:
        tokens += [token % alphabet for token in step]
        assert propose(drafter, 0, tokens, max_tokens) == rescan(tokens, max_tokens)


@pytest.mark.parametrize("native", [True, False])
def test_equals_a_rescan_on_long_histories(native: bool) -> None:
    """Longer than a search walks and than a match is measured, where that cannot matter."""
    rng = random.Random(1)
    drafter = NgramDrafter(native=native)
    passage = [rng.randrange(1000) for _ in range(60)]
    tokens = []
    num_drafts = 0
    for _ in range(40):
        tokens += rng.choice([passage, [rng.randrange(1000) for _ in range(30)]])
        draft = propose(drafter, 0, tokens, 8)
        assert draft == rescan(tokens, 8)
        num_drafts += bool(draft.tokens)
    assert num_drafts > 20


@pytest.mark.parametrize("alphabet", [2, 7, 300])
def test_kernels_draft_what_python_drafts(alphabet: int) -> None:
    """Rows come and go, and grow by what a step produces, or behind the drafter's back; histories
    are longer than a search walks.
    """
    rng = random.Random(alphabet)
    drafters = NgramDrafter(native=True), NgramDrafter(native=False)
    assert isinstance(drafters[0]._lookup, NativeLookup)
    histories: dict[int, list[int]] = {}
    num_drafts = 0
    for _ in range(150):
        if len(histories) < 6:
            histories[rng.randrange(60)] = [
                rng.randrange(alphabet) for _ in range(rng.choice([0, 1, 2, 400]))
            ]
        ids = rng.sample(list(histories), rng.randint(1, len(histories)))
        limits = ints([rng.choice([0, 1, 5, 30]) for _ in ids])
        tokens = [histories[i] for i in ids]
        inputs = DraftInputs(ints(ids), tokens, ints([len(t) for t in tokens]), limits)
        native, python = (drafter.propose(inputs) for drafter in drafters)
        drafts = [native[row] for row in range(len(ids))]
        assert drafts == [python[row] for row in range(len(ids))]
        num_drafts += sum(bool(draft.tokens) for draft in drafts)
        new = [[rng.randrange(alphabet) for _ in range(rng.randint(1, 40))] for _ in ids]
        for history, draft, more in zip(tokens, drafts, new, strict=True):
            more[:0] = draft.tokens[: rng.randint(0, 30)]
            history += more
        if rng.random() < 0.8:
            counts = ints([len(more) for more in new])
            for drafter in drafters:
                drafter.produced(inputs.ids, padded(new, int(counts.max())), counts)
        if rng.random() < 0.2:
            gone = rng.choice(list(histories))
            del histories[gone]
            for drafter in drafters:
                drafter.finish(gone)
    assert num_drafts > 100
    assert len(drafters[0]._lookup) == len(drafters[1]._lookup) <= 6


def test_what_followed_last_time() -> None:
    def after(tokens: list[int], max_tokens: int) -> list[int]:
        return propose(NgramDrafter(), 0, tokens, max_tokens).tokens

    assert after([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], 3) == [8, 1, 2]
    assert after([1, 2, 3, 4, 9, 3, 4, 7, 2, 3, 4], 2) == [9, 3]  # longest before latest
    assert after([1, 2, 3, 4], 4) == []
    assert after([4, 1, 4], 2) == [1, 4]  # one token is a match where there is no longer one
    assert after([], 4) == []
    assert after([5, 6, 5, 6, 5], 6) == [6, 5, 6, 5, 6, 5]


def test_buckets_follow_the_support_of_a_token() -> None:
    def buckets(tokens: list[int], max_tokens: int) -> list[int]:
        return propose(NgramDrafter(), 0, tokens, max_tokens).buckets

    assert buckets([1, 2, 7, 8, 1, 2], 3) == [bucket(ALONE, n) for n in (2, 3, 4)]
    # The two matches of (1, 2) agree on 7 and differ after it.
    tokens = [1, 2, 7, 5, 0, 1, 2, 7, 6, 9, 1, 2]
    assert buckets(tokens, 3) == [bucket(AGREE, 2), bucket(DIFFER, 3), bucket(ALONE, 4)]


def test_every_bucket_has_a_prior() -> None:
    chances = NgramDrafter.acceptance
    assert len(chances) == 3 * len(ngram._LENGTHS)
    assert all(0 < chance < 1 for chance in chances)
    assert len(propose(NgramDrafter(), 0, [1] * 100, 10**6).buckets) == ngram.MAX_DRAFT


def test_pairs_are_not_confused() -> None:
    """Only equal tokens are a match, also at the ends of the token range."""
    big = 2**31 - 1
    assert propose(NgramDrafter(), 0, [1, big, 7, 0, big], 1).buckets == [bucket(ALONE, 1)]
    assert propose(NgramDrafter(), 0, [big, 0, 7, big, 0], 1).buckets == [bucket(ALONE, 2)]


def test_requests_do_not_see_each_other() -> None:
    drafter = NgramDrafter()
    propose(drafter, 0, [1, 2, 3, 4, 1, 2], 2)
    assert propose(drafter, 1, [1, 2], 2) == NO_DRAFT
    drafter.finish(0)
    drafter.finish(10**6)
    assert propose(drafter, 0, [1, 2], 2) == NO_DRAFT


def test_finish_frees_the_memory() -> None:
    drafter = NgramDrafter()
    for i in range(5):
        propose(drafter, i, [1, 2, 3, 1, 2], 2)
    for i in range(5):
        drafter.finish(i)
    assert not len(drafter._lookup)


def test_a_request_may_come_back() -> None:
    """Preempted and resumed with the same tokens, or reused after finish with others: no stale
    end."""
    drafter = NgramDrafter()
    tokens = [1, 2, 3, 1, 2, 3, 1, 2]
    first = propose(drafter, 0, tokens, 4)
    assert propose(drafter, 0, list(tokens), 4) == first
    assert propose(drafter, 0, [7, 8], 4) == NO_DRAFT
    assert propose(drafter, 0, [7, 8, 9, 7, 8], 2).tokens == [9, 7]
    drafter.finish(0)
    assert propose(drafter, 0, [4, 5, 6, 4, 5], 1).tokens == [6]


def test_tokens_of_an_earlier_attempt_are_history() -> None:
    """After failover the request begins with prompt and delivered tokens at once."""
    whole = [1, 2, 3, 4, 9, 1, 2, 3]
    stepwise = NgramDrafter()
    for size in range(1, len(whole) + 1):
        last = propose(stepwise, 0, whole[:size], 3)
    assert propose(NgramDrafter(), 0, whole, 3) == last


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("alphabet", [50_000, 300, 2])
def test_a_step_does_not_cost_the_history(alphabet: int, native: bool) -> None:
    rng = random.Random(3)
    tokens = [rng.randrange(alphabet) for _ in range(50_000)]
    drafter = NgramDrafter(native=native)
    propose(drafter, 0, tokens, 16)
    start_s = time.process_time()
    for _ in range(300):
        tokens.append(rng.randrange(alphabet))
        propose(drafter, 0, tokens, 16)
    per_step_s = (time.process_time() - start_s) / 300
    assert per_step_s < 5e-4  # 1 to 30 microseconds; indexing anew takes some ten milliseconds
