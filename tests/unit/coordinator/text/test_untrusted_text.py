"""UntrustedText behaves like the plain text, and its characters stay marked."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from coordinator.text.untrusted_text import Marks, UntrustedText, is_marked, joined

MARKS = Marks(["<|im_end|>", "</s>", "<\uff5cEnd\uff5c>", "[INST]", "<|a b|>"])
texts = st.text(alphabet='<|im_end/s>[INST]\uff5c \n"\\bAa\ud800\u00df\u0130', max_size=12)


def plain(value: Any) -> Any:
    """The same value without marks."""
    if isinstance(value, str):
        return MARKS.plain(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    return value


CALLS: dict[str, Callable[[str, str], Any]] = {
    "in": lambda a, b: b in a,
    "equal": lambda a, b: (a == b, a != b, b == a, a < b, a >= b, hash(a) == hash(b)),
    "starts": lambda a, b: (a.startswith(b), a.endswith((b, "x")), a.find(b), a.rfind(b, 1)),
    "count": lambda a, b: (a.count(b), len(a), a.isspace(), a.isupper(), a.isdigit()),
    "strip": lambda a, b: (a.strip(), a.lstrip(), a.rstrip("\n>"), a.strip(b)),
    "split": lambda a, b: (a.split(), a.split(None, 1), a.rsplit(None, 1), a.splitlines()),
    "split by": lambda a, b: (a.split(b or "<"), a.rsplit(b or ">", 1), a.splitlines(True)),
    "partition": lambda a, b: (a.partition(b or "|"), a.rpartition(b or "|")),
    "replace": lambda a, b: (a.replace("<", b), a.replace(b or "i", "x", 1), a.replace(">", "")),
    "prefix": lambda a, b: (a.removeprefix(b), a.removesuffix(b)),
    "slice": lambda a, b: (a[1:], a[:-2], a[::-1], a[-1:], list(a)),
    "case": lambda a, b: (a.lower(), a.upper(), a.title(), a.capitalize(), a.casefold()),
    "add": lambda a, b: (a + b, "<|" + a + "|>", (a + "<|im_") + b, a.join([b, "|"])),
    "json": lambda a, b: json.dumps({a: [b]}, ensure_ascii=False),
    "format": lambda a, b: (f"{a}!{b}", "%s" % a, "{}".format(a)),  # noqa: UP031, UP032
    "joined": lambda a, b: joined(["<", a, b]),
    "safe": lambda a, b: str(Markup("<b>") + a),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@given(texts, texts)
def test_results_equal_those_of_plain_text(call: Callable[[str, str], Any], a: str, b: str) -> None:
    one, other = MARKS.mark(a), MARKS.mark(b)
    a, b = plain(one), plain(other)  # a lone surrogate became U+FFFD
    for found in (call(one, other), call(one, b)):
        assert plain(found) == call(a, b)


@given(texts, st.randoms(use_true_random=False))
def test_no_result_contains_a_special_token(text: str, r: random.Random) -> None:
    """No operation gives characters of a special token."""
    found: str = MARKS.mark(text)
    steps: list[Callable[[str], Any]] = [
        str.lower,
        lambda t: t.upper(),
        lambda t: t.strip(),
        lambda t: t.split("<")[-1],
        lambda t: t.replace(" ", ""),
        lambda t: t[1:],
        lambda t: joined([t, t]),
        lambda t: json.loads(json.dumps(t)),
        lambda t: "".join(t),
        lambda t: str(Markup(t)),
    ]
    for _ in range(4):
        found = r.choice(steps)(found)
    special = set("<|im_end/s>[INST]\uff5c")
    assert not special & set(str.__iter__(found))


def test_marks_are_one_for_one_and_in_no_valid_text() -> None:
    text = 'a "quoted" \\ <|im_end|> \udc3c \ud83d\ude00'
    marked = MARKS.mark(text)
    assert isinstance(marked, UntrustedText)
    assert MARKS.plain(marked) == 'a "quoted" \\ <|im_end|> \ufffd \U0001f600'
    assert len(marked) == len(MARKS.plain(marked))
    assert [is_marked(c) for c in str.__iter__(MARKS.mark("<x"))] == [True, False]
    value = MARKS.mark_all({"<": ["|", 1, None, True, {"s": 2.5}]})
    assert value == {"<": ["|", 1, None, True, {"s": 2.5}]}
    assert value["<"][4]["s"] == 2.5
    assert json.dumps(value, sort_keys=True, ensure_ascii=False) != json.dumps(
        {"<": ["|", 1, None, True, {"s": 2.5}]}
    )
