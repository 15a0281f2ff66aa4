"""Scanners of a client's text take one pass: four times the text is four times the work."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from engine.constraints import grammar, numbers, special_tokens, writable


class _Tokenizer:
    def tokenize_str(self, text: str) -> list[int]:
        return [1]


def numbered(text: str) -> object:
    return special_tokens.numbered(text, _Tokenizer())  # type: ignore[arg-type]


SCANNERS = (grammar._in_ascii, writable._control_in, numbered, numbers.step_of)
PIECES = (
    *("[^", "[a-", "[^]", "[", "[a-[^", "[\\]", "\\[", "\\", "[^\\]", "[a-z-"),
    *('"', '"\\"', '\\"', "/\\/", "/", "/a", "<", "<a", "<a\n", '"a\n', "//"),
    *('"multipleOf"', '"multipleOf" ', '"multipleOf": 1', "1e", "\\x", "\\u00", "]", "-]"),
)
ENDS = ("", "\\", "]", "\n", '"', "/", ">")


def best_s(scan: Callable[[str], object], text: str) -> float:
    def once() -> float:
        begun_s = time.thread_time()
        scan(text)
        return time.thread_time() - begun_s

    return min(once() for _ in range(3))


@pytest.mark.parametrize("scan", SCANNERS)
@pytest.mark.parametrize("piece", PIECES)
def test_time_grows_with_the_text(scan: Callable[[str], object], piece: str) -> None:
    """A second pass a piece would take 16 times as long, from some milliseconds on."""
    for end in ENDS:
        short = best_s(scan, "a" + 2000 * piece + end)
        long = best_s(scan, "a" + 8000 * piece + end)
        assert long < 10 * short + 0.02, (piece, end)
