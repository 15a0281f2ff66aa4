"""Stop strings, which may straddle tokens: what may be released, and where an answer ends.

The answer ends where a stop string is first *complete* (of two completed by the same character, the
longer one), as if it had been read character by character; so neither the cut between tokens nor
their grouping into messages changes the result. Text that could still become a stop string is held
back:

    released                      | held: longest suffix that begins a stop string |
    ------------------------------+------------------------------------------------+--> next token

Each stop string has its Knuth-Morris-Pratt automaton (Knuth, Morris, Pratt 1977), whose state is
the length of that suffix: a character costs O(1) a stop string, and no text is searched twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """The stop string that ended an answer."""

    text: str
    num_tokens: int  # tokens up to and including the one whose text completed it


class StopChecker:
    """One answer's stop strings. Fed one token's text at a time, in order.

    A stop string counts only if its last character belongs to a token after the first
    `min_tokens` (its first may not, as in vLLM).
    """

    __slots__ = (
        "_failures",
        "_held",
        "_include",
        "_min_tokens",
        "_num_tokens",
        "_states",
        "_stops",
        "match",
    )

    def __init__(
        self, stops: Sequence[str], include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = sorted(set(stops), key=len, reverse=True)  # the longer one wins
        self._failures = [_failure(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._held = ""
        self._include = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self.match: StopMatch | None = None  # set once; nothing is released after it

    def push(self, text: str) -> str:
        """Text that may be released after one more token, whose own text is `text`."""
        if self.match is not None:
            return ""
        self._num_tokens += 1
        if not self._stops:
            return text
        counts = self._num_tokens > self._min_tokens
        window = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            stop = self._advance(char)
            if stop is not None and counts:
                self.match = StopMatch(stop, self._num_tokens)
                self._held = ""
                return window[: end if self._include else end - len(stop)]
        keep = max(self._states)
        self._held = window[len(window) - keep :]
        return window[: len(window) - keep]

    def flush(self, text: str = "") -> str:
        """The rest of an answer that ended otherwise; `text` is what the detokenizer still had."""
        rest, self._held = ("" if self.match else self._held + text), ""
        return rest

    def _advance(self, char: str) -> str | None:
        """Feed one character to every automaton; the longest stop string that it completes."""
        found = None
        for i, stop in enumerate(self._stops):
            failure, state = self._failures[i], self._states[i]
            while state and stop[state] != char:
                state = failure[state]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                found = found or stop
                state = failure[state]  # whole, it begins nothing but what overlaps it
            self._states[i] = state
        return found


def _failure(stop: str) -> list[int]:
    """[len + 1]: for each prefix length, the longest proper prefix that is also its suffix."""
    failure = [0] * (len(stop) + 1)
    state = 0
    for i in range(1, len(stop)):
        while state and stop[state] != stop[i]:
            state = failure[state]
        if stop[state] == stop[i]:
            state += 1
        failure[i + 1] = state
    return failure
