"""StopChecker against a naive search of the whole text, one character at a time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.stops import StopChecker, StopMatch


def oracle(
    texts: list[str], stops: list[str], include: bool, min_tokens: int
) -> tuple[str, StopMatch | None]:
    """(the answer's text, its stop), read character by character."""
    seen = ""
    for number, text in enumerate(texts, start=1):
        for char in text:
            seen += char
            done = [stop for stop in stops if seen.endswith(stop)]
            if done and number > min_tokens:
                stop = max(done, key=len)
                kept = seen if include else seen[: len(seen) - len(stop)]
                return kept, StopMatch(stop, number)
    return seen, None


def held_back(text: str, stops: list[str]) -> int:
    """Length of the longest suffix that begins a stop string without being one whole."""
    return max(
        (n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0
    )


words = st.text("ab\u4e2d", max_size=4)


@settings(max_examples=800, deadline=None, derandomize=True)
@given(
    st.lists(words, max_size=14),
    st.lists(st.text("ab\u4e2d", min_size=1, max_size=5), max_size=4),
    st.booleans(),
    st.integers(0, 6),
)
def test_equals_the_oracle(
    texts: list[str], stops: list[str], include: bool, min_tokens: int
) -> None:
    checker = StopChecker(stops, include, min_tokens)
    released: list[str] = []
    for number, text in enumerate(texts, start=1):
        released.append(checker.push(text))
        kept, match = oracle(texts[:number], stops, include, min_tokens)
        assert checker.match == match
        if match:
            assert "".join(released) == kept
            break
        # Nothing more is held than may still become a stop, nothing less either.
        seen = "".join(texts[:number])
        waiting = len(seen) - len("".join(released))
        assert waiting == held_back(seen, stops)
        assert "".join(released) == seen[: len(seen) - waiting]
    rest = checker.flush()
    assert "".join(released) + rest == oracle(texts, stops, include, min_tokens)[0]
    assert checker.push("aaaa" if checker.match else "") == ""


@given(st.text("ab", max_size=30), st.lists(st.integers(0, 30), max_size=8), st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_cut_between_tokens_changes_nothing(text: str, cuts: list[int], include: bool) -> None:
    def run(parts: list[str]) -> tuple[str, str | None]:
        checker = StopChecker(["abba", "bb", "aab"], include)
        out = "".join([checker.push(part) for part in parts])
        return out + checker.flush(), checker.match and checker.match.text

    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    parts = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert run(parts) == run(list(text)) == run([text])


def test_straddling_stop() -> None:
    checker = StopChecker(["\n\nUser:"])
    assert [checker.push(t) for t in ["Hi", " there", "\n", "\nUs", "er", ": x"]] == [
        "Hi",
        " there",
        "",
        "",
        "",
        "",
    ]
    assert checker.match == StopMatch("\n\nUser:", 6)
    assert checker.flush("tail") == ""


def test_false_alarm_is_released() -> None:
    checker = StopChecker(["STOP"])
    assert [checker.push(t) for t in ["S", "T", "AND"]] == ["", "", "STAND"]
    assert checker.push("ST") == ""
    assert checker.flush("\ufffd") == "ST\ufffd"
    assert checker.match is None


def test_stop_may_begin_within_the_first_tokens_but_not_end_there() -> None:
    checker = StopChecker(["ab", "c"], min_tokens=2)
    assert [checker.push(t) for t in ["ab", "a", "b"]] == ["ab", "", ""]
    assert checker.match == StopMatch("ab", 3)


def test_nothing_to_stop_at() -> None:
    checker = StopChecker([])
    assert checker.push("text") == "text"
    with pytest.raises(ValueError, match="empty"):
        StopChecker(["a", ""])


def test_long_stop_strings_cost_no_more_a_character() -> None:
    stop = "a" * 5000 + "b"
    checker = StopChecker([stop])
    out = "".join([checker.push("a") for _ in range(20_000)])
    assert out == "a" * 15_000
    assert checker.push("b") == ""
    assert checker.match == StopMatch(stop, 20_001)
