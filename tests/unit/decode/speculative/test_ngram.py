"""Prompt lookup against a plain rescan of the history."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decode.speculative import ngram
from decode.speculative.base import NoDrafter
from decode.speculative.ngram import MAX_MATCH, NgramDrafter
from engine.scheduling.speculation import NO_DRAFT, Draft, Drafter

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


@settings(max_examples=300)
@given(
    alphabet=st.integers(1, 6),
    steps=st.lists(st.lists(st.integers(0, 5), max_size=9), min_size=1, max_size=8),
    max_tokens=st.integers(0, 20),
)
def test_equals_a_rescan_at_every_step(
    alphabet: int, steps: list[list[int]], max_tokens: int
) -> None:
    drafter: Drafter = NgramDrafter()
    tokens: list[int] = []
    for step in steps:
        tokens += [token % alphabet for token in step]
        assert drafter.propose("r", tokens, max_tokens) == rescan(tokens, max_tokens)


def test_equals_a_rescan_on_long_histories() -> None:
    """Longer than a search walks and than a match is measured, where that cannot matter."""
    rng = random.Random(1)
    drafter = NgramDrafter()
    passage = [rng.randrange(1000) for _ in range(60)]
    tokens = []
    num_drafts = 0
    for _ in range(40):
        tokens += rng.choice([passage, [rng.randrange(1000) for _ in range(30)]])
        draft = drafter.propose("r", tokens, 8)
        assert draft == rescan(tokens, 8)
        num_drafts += bool(draft.tokens)
    assert num_drafts > 20


def test_what_followed_last_time() -> None:
    def propose(tokens: list[int], max_tokens: int) -> list[int]:
        return NgramDrafter().propose("r", tokens, max_tokens).tokens

    assert propose([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], 3) == [8, 1, 2]
    assert propose([1, 2, 3, 4, 9, 3, 4, 7, 2, 3, 4], 2) == [9, 3]  # longest before latest
    assert propose([1, 2, 3, 4], 4) == []
    assert propose([4, 1, 4], 2) == [1, 4]  # one token is a match where there is no longer one
    assert propose([], 4) == []
    assert propose([5, 6, 5, 6, 5], 6) == [6, 5, 6, 5, 6, 5]


def test_buckets_follow_the_support_of_a_token() -> None:
    def buckets(tokens: list[int], max_tokens: int) -> list[int]:
        return NgramDrafter().propose("r", tokens, max_tokens).buckets

    assert buckets([1, 2, 7, 8, 1, 2], 3) == [bucket(ALONE, n) for n in (2, 3, 4)]
    # The two matches of (1, 2) agree on 7 and differ after it.
    tokens = [1, 2, 7, 5, 0, 1, 2, 7, 6, 9, 1, 2]
    assert buckets(tokens, 3) == [bucket(AGREE, 2), bucket(DIFFER, 3), bucket(ALONE, 4)]


def test_every_bucket_has_a_prior() -> None:
    chances = NgramDrafter.acceptance
    assert len(chances) == 3 * len(ngram._LENGTHS)
    assert all(0 < chance < 1 for chance in chances)
    assert len(NgramDrafter().propose("r", [1] * 100, 10**6).buckets) == ngram.MAX_DRAFT


def test_pairs_are_not_confused() -> None:
    """Only equal tokens are a match, also at the ends of the token range."""
    big = 2**32 - 1
    assert NgramDrafter().propose("r", [1, big, 7, 0, big], 1).buckets == [bucket(ALONE, 1)]
    assert NgramDrafter().propose("s", [big, 0, 7, big, 0], 1).buckets == [bucket(ALONE, 2)]


def test_requests_do_not_see_each_other() -> None:
    drafter = NgramDrafter()
    drafter.propose("a", [1, 2, 3, 4, 1, 2], 2)
    assert drafter.propose("b", [1, 2], 2) == NO_DRAFT
    drafter.finish("a")
    drafter.finish("never seen")
    assert drafter.propose("a", [1, 2], 2) == NO_DRAFT


def test_finish_frees_the_memory() -> None:
    drafter = NgramDrafter()
    for i in range(5):
        drafter.propose(f"r{i}", [1, 2, 3, 1, 2], 2)
    for i in range(5):
        drafter.finish(f"r{i}")
    assert not drafter._indices


def test_a_request_may_come_back() -> None:
    """Preempted and resumed with the same tokens, or reused after finish with others: no stale
    end."""
    drafter = NgramDrafter()
    tokens = [1, 2, 3, 1, 2, 3, 1, 2]
    first = drafter.propose("r", tokens, 4)
    assert drafter.propose("r", list(tokens), 4) == first
    assert drafter.propose("r", [7, 8], 4) == NO_DRAFT
    assert drafter.propose("r", [7, 8, 9, 7, 8], 2).tokens == [9, 7]
    drafter.finish("r")
    assert drafter.propose("r", [4, 5, 6, 4, 5], 1).tokens == [6]


def test_tokens_of_an_earlier_attempt_are_history() -> None:
    """After failover the request begins with prompt and delivered tokens at once."""
    whole = [1, 2, 3, 4, 9, 1, 2, 3]
    stepwise = NgramDrafter()
    for size in range(1, len(whole) + 1):
        last = stepwise.propose("r", whole[:size], 3)
    assert NgramDrafter().propose("again", whole, 3) == last


@pytest.mark.parametrize("alphabet", [50_000, 300, 2])
def test_a_step_does_not_cost_the_history(alphabet: int) -> None:
    rng = random.Random(3)
    tokens = [rng.randrange(alphabet) for _ in range(50_000)]
    drafter = NgramDrafter()
    drafter.propose("r", tokens, 16)
    start_s = time.process_time()
    for _ in range(300):
        tokens.append(rng.randrange(alphabet))
        drafter.propose("r", tokens, 16)
    per_step_s = (time.process_time() - start_s) / 300
    assert per_step_s < 5e-4  # 1 to 30 microseconds; indexing anew takes some ten milliseconds


def test_none_proposes_nothing() -> None:
    drafter: Drafter = NoDrafter()
    assert drafter.propose("r", [1, 2, 1, 2], 4) == NO_DRAFT
    drafter.finish("r")
    assert (drafter.name, NgramDrafter().name) == ("none", "ngram")
