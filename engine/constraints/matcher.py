"""One answer's place in its grammar. One owner at a time: its maker, then the engine thread.

What it may cost is bounded. The library holds the interpreter while it takes a token, which costs
about what the mask before it did, and not while it computes a mask: so a mask is computed first, on
another thread (`look`), and its processor time tells what may be done after it. Ordinary schemas
take 0.02 ms a mask on average and 1.2 ms at most (115 of schemastore.org, 5,700 masks).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray

from engine.constraints.numbers import NumberScanner, NumberTokens

_GOOD_ENDS = ("NoExtension", "EndOfSentence")
# Processor time of the masks and tokens of an answer: this much, and so much a token.
BURST_S = 0.2
TOKEN_S = 0.002
# A forced text is tokenized anew for each mask; that holds up nothing else, and counts less.
_FORCED_SHARE = 0.1
_CHEAP_S = 0.002  # of a mask behind which more may be tried
_NUM_CHEAP = 8  # in a row, after which a slow grammar counts as quick again
Rows = NDArray[np.int32]  # [positions, words]: bit t % 32 of word t // 32 is token t


class Kin:
    """What all copies of one grammar have in common."""

    __slots__ = ("_num_cheap", "is_slow", "num_late")

    def __init__(self) -> None:
        self.num_late = 0  # copies whose masks are not waited for; under the lock of `Masks`
        self.is_slow = False
        self._num_cheap = 0

    def slow_down(self) -> None:
        """A mask of a copy takes too long."""
        self.is_slow, self._num_cheap = True, 0

    def took(self, cost_s: float) -> None:
        """A mask of a copy is there."""
        self._num_cheap = self._num_cheap + 1 if cost_s < _CHEAP_S else 0
        self.is_slow = self.is_slow and self._num_cheap < _NUM_CHEAP


class Matcher:
    """A function of the tokens that it was given so far.

    What it allows does not depend on how they came: one by one, guessed first, or all at once.
    """

    __slots__ = (
        *("_cost_s", "_fault", "_forced", "_num_taken", "_numbers", "_scanner", "_spent_s"),
        *("busy", "guess_was_late", "kin", "library", "mask", "num_held"),
    )

    def __init__(
        self,
        library: LLMatcher,
        numbers: NumberTokens | None = None,
        scanner: NumberScanner | None = None,
        kin: Kin | None = None,
    ) -> None:
        """`library` and `scanner` are its own; without a scanner no number is bounded."""
        self.library = library
        self.kin = kin or Kin()
        self.busy = False  # a lane has it: nothing else may be asked of it
        self.mask: Rows | None = None  # [1, words], of the next token, once it was looked for
        self.guess_was_late = False  # no other one is made before the next token
        self.num_held = 0  # steps that it has been kept out of for its cost
        self._numbers, self._scanner = numbers, scanner
        self._forced: list[int] | None = None
        self._cost_s = self._spent_s = 0.0  # of the newest mask, of all of them
        self._num_taken = 0
        self._fault = ""

    @property
    def is_ready(self) -> bool:
        """Whether the next mask is there, and no copy is late."""
        return self.mask is not None and not self.busy and not self.kin.num_late

    @property
    def ended(self) -> bool:
        """Whether nothing more can follow: the grammar is complete, or it has failed."""
        return self.library.is_stopped()

    @property
    def error(self) -> str:
        """Why it can say no more, although it has not come to its end; or ""."""
        if self._fault:
            return self._fault
        if self.is_too_costly:
            return (
                f"took {self._spent_s:.2f} s of processor time in {self._num_taken} tokens; "
                f"expected at most {BURST_S:g} s and {1000 * TOKEN_S:g} ms a token: "
                "make it less ambiguous, or the texts that it leaves no choice about shorter"
            )
        if not self.library.is_stopped():
            return ""
        if self.library.is_error():
            return brief(self.library.get_error())
        reason = self.library.stop_reason()
        return "" if reason in _GOOD_ENDS else f"no token can follow ({reason})"

    @property
    def is_too_costly(self) -> bool:
        """Whether it has taken more time than an answer may."""
        return self._spent_s > BURST_S + TOKEN_S * self._num_taken

    @property
    def take_s(self) -> float:
        """About what taking the next token holds up everything else for."""
        return 0.0 if self._forced else self._cost_s

    def advance(self, tokens: Sequence[int]) -> bool:
        """Take the next tokens; False: they do not fit, and it is of no use any more.

        An end of sequence fits also where the grammar has ended by itself.
        """
        return all(self._take(token) and not self.is_too_costly for token in tokens)

    def _take(self, token: int) -> bool:
        self.mask = self._forced = None
        self.guess_was_late = False
        self._num_taken += 1
        if self._numbers and self._scanner:
            self._scanner.feed(self._numbers.text(token))
        begun_s = time.thread_time()
        fits = self.library.consume_token(token)
        self._spent_s += time.thread_time() - begun_s
        return fits

    def look(self, num_words: int, draft: Sequence[int], executor: LLExecutor) -> Rows:
        """The masks behind each beginning of `draft`, itself possible: [1 + len(draft), num_words].

        Without a draft what is forced is looked for as well, and all of it kept for the next step.
        """
        rows = np.full((1 + len(draft), num_words), -1, np.int32)  # none behind what cannot come
        try:
            if draft:
                guess = [(self.library, 0, list(draft))]
                executor.unsafe_compute_mask_ptr_with_draft_token(
                    guess, rows.ctypes.data, 4 * num_words, len(rows)
                )
            else:
                self._look(rows[0])
            if self._numbers and self._scanner:
                self._numbers.bound(rows, self._scanner, draft)
        except Exception as error:  # the library's own, of many kinds
            self._fault = brief(str(error)) or type(error).__name__
        if not draft:
            self.mask = rows
        return rows

    def _look(self, row: NDArray[np.int32]) -> None:
        begun_s = time.thread_time()
        self.library.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._cost_s = time.thread_time() - begun_s
        self.kin.took(self._cost_s)
        words = row[row != 0]
        is_forced = len(words) == 1 and int(words[0]) & (int(words[0]) - 1) == 0
        self._spent_s += self._cost_s * (_FORCED_SHARE if is_forced else 1)
        self._forced = []
        if is_forced and self._cost_s < _CHEAP_S:  # the mask took as long to find them
            self._forced = self.library.compute_ff_tokens()

    def num_valid(self, tokens: Sequence[int]) -> int:
        """How many of these tokens could come next; more are not tried than cost little."""
        if not self._may_guess:
            return 0
        if self.take_s > 0:
            tokens = tokens[: int(_CHEAP_S / self.take_s)]
        return self.library.validate_tokens(list(tokens))

    def forced(self) -> list[int]:
        """Tokens that come next whatever the model says; often none."""
        if self._forced is None:
            self._forced = self.library.compute_ff_tokens()
        return self._forced if self._may_guess else []

    @property
    def _may_guess(self) -> bool:
        return not self.kin.is_slow and not self.guess_was_late


def brief(message: str) -> str:
    """A library's message in one line, of a length for people; states and traces left out."""
    text = message
    for mark in ("<state>", "<backtrace>", "<non-verbose/>"):
        text = text.split(mark, 1)[0]
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:200]} ... {line[-95:]}"
