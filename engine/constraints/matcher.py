"""One answer's place in its grammar. One owner at a time: who made it, then the engine thread."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from engine.constraints.numbers import NumberScanner, NumberTokens

_GOOD_ENDS = ("NoExtension", "EndOfSentence")


class Matcher:
    """A function of the tokens that it was given so far.

    What it allows does not depend on how they came: one by one, guessed first, or all at once.
    """

    __slots__ = ("_numbers", "_scanner", "library")

    def __init__(
        self,
        library: LLMatcher,
        numbers: NumberTokens | None = None,
        scanner: NumberScanner | None = None,
    ) -> None:
        """`library` and `scanner` are its own; without a scanner no number is bounded."""
        self.library = library
        self._numbers, self._scanner = numbers, scanner

    @property
    def ended(self) -> bool:
        """Whether nothing more can follow: the grammar is complete, or it has failed."""
        return self.library.is_stopped()

    @property
    def error(self) -> str:
        """Why it can say no more, although it has not come to its end; or ""."""
        if not self.library.is_stopped():
            return ""
        if self.library.is_error():
            return brief(self.library.get_error())
        reason = self.library.stop_reason()
        return "" if reason in _GOOD_ENDS else f"no token can follow ({reason})"

    def advance(self, tokens: Sequence[int]) -> bool:
        """Take the next tokens; False: they do not fit, and it is of no use any more.

        An end of sequence fits also where the grammar has ended by itself.
        """
        return all(self._take(token) for token in tokens)

    def _take(self, token: int) -> bool:
        if self._numbers and self._scanner:
            self._scanner.feed(self._numbers.text(token))
        return self.library.consume_token(token)

    def bound_numbers(self, rows: NDArray[np.int32], draft: Sequence[int]) -> None:
        """Take from the masks behind each beginning of `draft` what makes a number too long."""
        if self._numbers and self._scanner:
            self._numbers.bound(rows, self._scanner, draft)

    def num_valid(self, tokens: Sequence[int]) -> int:
        """How many of these tokens could come next."""
        return self.library.validate_tokens(list(tokens))

    def forced(self) -> list[int]:
        """Tokens that come next whatever the model says; often none."""
        return self.library.compute_ff_tokens()


def brief(message: str) -> str:
    """A library's message in one line, of a length for people; states and traces left out."""
    text = message
    for mark in ("<state>", "<backtrace>", "<non-verbose/>"):
        text = text.split(mark, 1)[0]
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:200]} ... {line[-95:]}"
