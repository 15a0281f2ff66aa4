"""Where the next call of one answer goes, and when. Pure: the clock and the dice are handed in.

    a coordinator   call --- lost |<- what it asked for ->|<- backoff, doubled ->| may be called
    next            the one that may be called soonest; among equals the next in order
    nothing left    each was lost `limit` times since the answer last moved

So a call that broke off goes to another coordinator at once, and one that was told to come back in
five seconds goes to the others first.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a client goes on while nothing comes."""

    first: int = 5  # calls to each coordinator before the first token
    resumed: int = 10  # and after it, since the last token
    backoff_s: float = 0.2  # before the second call to the same coordinator; then twice that ...
    max_backoff_s: float = 5.0
    # No call begins later than this after the first one that was lost; where a coordinator has
    # waited in vain for a worker, after that call's beginning.
    give_up_s: float = 60.0
    ping_s: float = 3.0  # silence after which a connection is tried, and given up as long after


PATIENCE = Patience()


class Attempts:
    """The calls of one answer. Owned by its stream."""

    def __init__(
        self, num_coordinators: int, first: int, patience: Patience, dice: random.Random
    ) -> None:
        self.at = first  # the coordinator that was called last
        self._patience = patience
        self._dice = dice
        self._num_lost = [0] * num_coordinators
        self._ready_s = [-math.inf] * num_coordinators

    def progressed(self) -> None:
        """The answer has moved: whatever was lost before does not count any more."""
        self._num_lost = [0] * len(self._num_lost)

    def lost(self, retry_after_s: float, now_s: float) -> None:
        """The last call was; its coordinator asked to be left alone for `retry_after_s`."""
        self._num_lost[self.at] += 1
        doubled = self._patience.backoff_s * 2.0 ** (self._num_lost[self.at] - 1)
        backoff_s = min(doubled, self._patience.max_backoff_s)
        wait_s = retry_after_s + self._dice.uniform(backoff_s / 2, backoff_s)
        self._ready_s[self.at] = now_s + wait_s

    def next(self, limit: int, now_s: float) -> tuple[int, float] | None:
        """(coordinator, how long to wait before it is called), or None."""
        num = len(self._num_lost)
        order = [(self.at + i) % num for i in range(num)]
        left = [i for i in order if self._num_lost[i] < limit]
        if not left:
            return None
        self.at = min(left, key=lambda i: max(self._ready_s[i], now_s))
        return self.at, max(0.0, self._ready_s[self.at] - now_s)
