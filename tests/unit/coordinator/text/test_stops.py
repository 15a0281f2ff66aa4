"""StopChecker against a naive search of the whole text, one character at a time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.text.stops import StopChecker, StopMatch, StopSet


def oracle(
    texts: list[str], stops: list[str], include: bool, min_tokens: int
) -> tuple[str, StopMatch | None]:
    """(text of the output, its stop), read character by character."""
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
    """Length of the longest suffix that is a proper prefix of a stop string."""
    return max(
        (n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0
    )


words = st.text("ab\u4e2d", max_size=4)


@settings(max_examples=800)
@given(
    st.lists(words, max_size=14),
    st.lists(st.text("ab\u4e2d", min_size=1, max_size=5), max_size=4),
    st.booleans(),
    st.integers(0, 6),
)
def test_equals_the_oracle(
    texts: list[str], stops: list[str], include: bool, min_tokens: int
) -> None:
    checker = StopChecker(StopSet(stops), include, min_tokens)
    released: list[str] = []
    for number, text in enumerate(texts, start=1):
        released.append(checker.push(text))
        kept, match = oracle(texts[:number], stops, include, min_tokens)
        assert checker.match == match
        if match:
            assert "".join(released) == kept
            break
        # Exactly the text that may still become a stop is held.
        seen = "".join(texts[:number])
        waiting = len(seen) - len("".join(released))
        assert waiting == held_back(seen, stops)
        assert "".join(released) == seen[: len(seen) - waiting]
    rest = checker.flush()
    assert "".join(released) + rest == oracle(texts, stops, include, min_tokens)[0]
    assert checker.push("aaaa" if checker.match else "") == ""


SPECIAL = ["<e>", "<s>"]
pieces = st.lists(st.one_of(words, st.sampled_from(SPECIAL)), max_size=12)


def tape_oracle(
    tokens: list[str], stops: list[str], include: bool, hidden: bool
) -> tuple[str, StopMatch | None]:
    """The same for texts and special tokens, read event by event.

    A stop string is found in the shown text, and in the text with special tokens as symbols,
    which match only themselves.
    """
    shown = ""
    tape: list[tuple[str, str]] = []  # (symbol, its shown text)
    for number, token in enumerate(tokens, start=1):
        special = token in SPECIAL
        visible = ("" if hidden else token) if special else token
        events = [(char, char, False) for char in visible] or ([("", "", True)] if special else [])
        if special:
            events[-1] = (events[-1][0], token, True)
        for char, symbol, is_special in events:
            shown += char
            if not special or is_special:
                tape.append((symbol, visible if is_special else char))
            done = []
            for stop in stops:
                if char and shown.endswith(stop):
                    done.append((len(stop), len(stop), stop))
                for start in range(len(tape)):
                    if is_special or not special:
                        text = "".join(s for s, _ in tape[start:])
                        named = any(s in SPECIAL for s, _ in tape[start:])
                        if named and text == stop:
                            done.append((len(stop), sum(len(v) for _, v in tape[start:]), stop))
            if done:
                _, size, stop = max(done)
                kept = shown[: len(shown) - size] + (stop if include else "")
                return kept, StopMatch(stop, number)
    return shown, None


@settings(max_examples=800)
@given(
    pieces,
    st.lists(
        st.lists(st.sampled_from(["a", "b", *SPECIAL]), min_size=1, max_size=3).map("".join),
        max_size=3,
    ),
    st.booleans(),
    st.booleans(),
)
def test_special_tokens_match_whether_shown_or_not(
    tokens: list[str], stops: list[str], include: bool, hidden: bool
) -> None:
    checker = StopChecker(StopSet(stops, SPECIAL), include)
    released = []
    for number, token in enumerate(tokens, start=1):
        if token in SPECIAL:
            released.append(checker.push("", token, "" if hidden else token))
        else:
            released.append(checker.push(token))
        kept, match = tape_oracle(tokens[:number], stops, include, hidden)
        assert checker.match == match
        assert kept.startswith("".join(released))
        if match:
            break
    expected = tape_oracle(tokens, stops, include, hidden)[0]
    assert "".join(released) + checker.flush() == expected


def test_a_special_token_matches_as_a_whole() -> None:
    for stop in ("im", ">", "<|im", "|im_end|>x"):
        checker = StopChecker(StopSet([stop], ["<|im_end|>"]))
        assert [checker.push("a"), checker.push("", "<|im_end|>"), checker.push("b")] == [
            *"a",
            "",
            "b",
        ]
        assert checker.match is None
    checker = StopChecker(StopSet(["\n<|im_end|>"], ["<|im_end|>"]))
    assert [checker.push("Yes"), checker.push("\n"), checker.push("", "<|im_end|>")] == [
        "Yes",
        "",
        "",
    ]
    assert checker.match == StopMatch("\n<|im_end|>", 3)
    assert checker.names("<|im_end|>")
    assert not checker.names("<|im_start|>")


@given(st.text("ab", max_size=30), st.lists(st.integers(0, 30), max_size=8), st.booleans())
@settings(max_examples=300)
def test_the_split_into_tokens_changes_nothing(text: str, cuts: list[int], include: bool) -> None:
    def run(parts: list[str]) -> tuple[str, str | None]:
        checker = StopChecker(StopSet(["abba", "bb", "aab"]), include)
        out = "".join([checker.push(part) for part in parts])
        return out + checker.flush(), checker.match and checker.match.text

    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    parts = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert run(parts) == run(list(text)) == run([text])


def test_a_stop_across_tokens() -> None:
    checker = StopChecker(StopSet(["\n\nUser:"]))
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
    checker = StopChecker(StopSet(["STOP"]))
    assert [checker.push(t) for t in ["S", "T", "AND"]] == ["", "", "STAND"]
    assert checker.push("ST") == ""
    assert checker.flush("\ufffd") == "ST\ufffd"
    assert checker.match is None


def test_stop_may_begin_within_the_first_tokens_but_not_end_there() -> None:
    checker = StopChecker(StopSet(["ab", "c"]), min_tokens=2)
    assert [checker.push(t) for t in ["ab", "a", "b"]] == ["ab", "", ""]
    assert checker.match == StopMatch("ab", 3)


def test_no_stop_strings() -> None:
    checker = StopChecker(StopSet([]))
    assert checker.push("text") == "text"
    with pytest.raises(ValueError, match="empty"):
        StopSet(["a", ""])


def test_the_cost_of_a_character_does_not_depend_on_stop_lengths() -> None:
    stop = "a" * 5000 + "b"
    checker = StopChecker(StopSet([stop]))
    out = "".join([checker.push("a") for _ in range(20_000)])
    assert out == "a" * 15_000
    assert checker.push("b") == ""
    assert checker.match == StopMatch(stop, 20_001)
