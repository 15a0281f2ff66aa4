"""The state of one output in its grammar. Owned by its compiler, then by the engine thread.

Its cost is bounded. llguidance holds the GIL while it takes a token, but not while it computes a
mask, and both cost about the same. So a mask is computed first, on another thread
(`compute_masks`), and its CPU time decides what may follow. Ordinary schemas take 0.02 ms a mask on
average and 1.2 ms at most (115 schemas of schemastore.org, 5,700 masks).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray

from engine.constraints.numbers import NumberScanner, NumberTokens

_GOOD_ENDS = ("NoExtension", "EndOfSentence")
# CPU time budget of an output, masks and tokens together: BURST_S + TOKEN_S * tokens.
BURST_S = 0.2
TOKEN_S = 0.002
# Weight of a mask that forces a text: llguidance tokenizes the text again, which blocks nothing.
_FORCED_SHARE = 0.1
_CHEAP_S = 0.002  # a mask below this allows drafts and forced tokens after it
_NUM_CHEAP = 8  # consecutive cheap masks after which a slow grammar counts as quick again
Rows = NDArray[np.int32]  # [positions, words]: bit t % 32 of word t // 32 is token t


class SharedCost:
    """The cost record that all copies of one grammar share."""

    __slots__ = ("_num_cheap", "is_slow", "num_late")

    def __init__(self) -> None:
        self.num_late = 0  # copies whose masks are late; guarded by the lock of `Masks`
        self.is_slow = False
        self._num_cheap = 0

    def slow_down(self) -> None:
        """Record that a mask took too long."""
        self.is_slow, self._num_cheap = True, 0

    def record_mask(self, cost_s: float) -> None:
        """Record the CPU time of a finished mask."""
        self._num_cheap = self._num_cheap + 1 if cost_s < _CHEAP_S else 0
        self.is_slow = self.is_slow and self._num_cheap < _NUM_CHEAP


class Matcher:
    """A function of the tokens that it has taken, whether one by one, as a draft or all at once."""

    __slots__ = (
        *("_cost_s", "_fault", "_forced", "_num_taken", "_numbers", "_scanner", "_spent_s"),
        *("busy", "draft_was_late", "shared", "library", "mask", "num_steps_skipped"),
    )

    def __init__(
        self,
        library: LLMatcher,
        numbers: NumberTokens | None = None,
        scanner: NumberScanner | None = None,
        shared: SharedCost | None = None,
    ) -> None:
        """Take ownership of `library` and `scanner`; without a scanner no number is bounded."""
        self.library = library
        self.shared = shared or SharedCost()
        self.busy = False  # a mask thread owns it: call nothing else
        self.mask: Rows | None = None  # [1, words], of the next token; None: not computed
        self.draft_was_late = False  # no further draft before the next token
        self.num_steps_skipped = 0  # consecutive steps that it missed because of its cost
        self._numbers, self._scanner = numbers, scanner
        self._forced: list[int] | None = None
        self._cost_s = self._spent_s = 0.0  # of the newest mask, of all of them
        self._num_taken = 0
        self._fault = ""

    @property
    def is_ready(self) -> bool:
        """Whether the next mask is computed, and no copy of the grammar is late."""
        return self.mask is not None and not self.busy and not self.shared.num_late

    @property
    def ended(self) -> bool:
        """Whether no token can follow: the grammar is complete, or it has failed."""
        return self.library.is_stopped()

    @property
    def error(self) -> str:
        """Why no token can follow before the grammar is complete; or ""."""
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
            return short_message(self.library.get_error())
        reason = self.library.stop_reason()
        return "" if reason in _GOOD_ENDS else f"no token can follow ({reason})"

    @property
    def is_too_costly(self) -> bool:
        """Whether it has exceeded the CPU time budget of an output."""
        return self._spent_s > BURST_S + TOKEN_S * self._num_taken

    @property
    def advance_cost_s(self) -> float:
        """Estimated time for which taking the next token holds the GIL."""
        return 0.0 if self._forced else self._cost_s

    def advance(self, tokens: Sequence[int]) -> bool:
        """Take the next tokens; False: they do not fit, and the matcher is unusable.

        An end-of-sequence token also fits after the grammar is complete.
        """
        return all(self._take(token) and not self.is_too_costly for token in tokens)

    def _take(self, token: int) -> bool:
        self.mask = self._forced = None
        self.draft_was_late = False
        self._num_taken += 1
        if self._numbers and self._scanner:
            self._scanner.feed(self._numbers.text(token))
        begun_s = time.thread_time()
        fits = self.library.consume_token(token)
        self._spent_s += time.thread_time() - begun_s
        return fits

    def compute_masks(self, num_words: int, draft: Sequence[int], executor: LLExecutor) -> Rows:
        """Masks after each prefix of `draft`, which must fit: [1 + len(draft), num_words].

        Without a draft it also finds the forced tokens, and keeps both for the next step.
        """
        rows = np.full((1 + len(draft), num_words), -1, np.int32)
        try:
            if draft:
                guess = [(self.library, 0, list(draft))]
                executor.unsafe_compute_mask_ptr_with_draft_token(
                    guess, rows.ctypes.data, 4 * num_words, len(rows)
                )
            else:
                self._compute_next_mask(rows[0])
            if self._numbers and self._scanner:
                self._numbers.bound(rows, self._scanner, draft)
        except Exception as error:  # llguidance raises many kinds
            self._fault = short_message(str(error)) or type(error).__name__
        if not draft:
            self.mask = rows
        return rows

    def _compute_next_mask(self, row: NDArray[np.int32]) -> None:
        begun_s = time.thread_time()
        self.library.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._cost_s = time.thread_time() - begun_s
        self.shared.record_mask(self._cost_s)
        words = row[row != 0]
        is_forced = len(words) == 1 and int(words[0]) & (int(words[0]) - 1) == 0
        self._spent_s += self._cost_s * (_FORCED_SHARE if is_forced else 1)
        self._forced = []
        if is_forced and self._cost_s < _CHEAP_S:  # costs about as much as the mask
            self._forced = self.library.compute_ff_tokens()

    def num_valid(self, tokens: Sequence[int]) -> int:
        """How many of these tokens may come next; it checks no more than is cheap."""
        if not self._may_speculate:
            return 0
        if self.advance_cost_s > 0:
            tokens = tokens[: int(_CHEAP_S / self.advance_cost_s)]
        return self.library.validate_tokens(list(tokens))

    def forced(self) -> list[int]:
        """Tokens that must come next, whatever the logits are; often none."""
        if self._forced is None:
            self._forced = self.library.compute_ff_tokens()
        return self._forced if self._may_speculate else []

    @property
    def _may_speculate(self) -> bool:
        return not self.shared.is_slow and not self.draft_was_late


def short_message(message: str) -> str:
    """A message of llguidance in one short line, without states and backtraces."""
    text = message
    for mark in ("<state>", "<backtrace>", "<non-verbose/>"):
        text = text.split(mark, 1)[0]
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:200]} ... {line[-95:]}"
