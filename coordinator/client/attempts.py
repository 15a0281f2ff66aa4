"""Where the next call of one answer goes, and when. Pure: the clock and the dice are handed in.

    a coordinator   call --- lost |<- what it asked for ->|<- backoff, doubled ->| may be called
    next            the one that may be called soonest; among equals the next in order
    nothing left    none may be called before the client gives up

So a call that broke off goes to another coordinator at once, and one that was told to come back in
five seconds goes to the others first. A wait that is the client's own is at most half of the time
that is left, so that the last calls come near its end.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

_MAX_SILENCE_S = 20.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a client goes on while nothing comes."""

    # No call begins later than this after the first one that was lost; where a coordinator has
    # waited in vain for a worker, after that call's beginning.
    give_up_s: float = 60.0
    backoff_s: float = 0.2  # before the second call to the same coordinator; then twice that ...
    max_backoff_s: float = 5.0
    # A call without a message for so long is lost, since a coordinator sends `Alive` each second.
    # Each such loss doubles it for the next call there, up to 20 s. inf: no call is lost so.
    silence_s: float = 2.5
    ping_s: float = 3.0  # silence after which a connection is tried, and given up as long after

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if not self.silence_s > 0:
            raise ValueError(f"silence_s: expected a number above 0, or inf; got {self.silence_s}")


RETRY_POLICY = RetryPolicy()


class Attempts:
    """The calls of one answer. Owned by its stream."""

    def __init__(
        self, num_coordinators: int, first: int, retry_policy: RetryPolicy, rng: random.Random
    ) -> None:
        self.at = first  # the coordinator that was called last
        self._patience = retry_policy
        self._dice = rng
        self._num_lost = [0] * num_coordinators
        self._num_silent = [0] * num_coordinators  # of those
        self._asked_s = [-math.inf] * num_coordinators  # until when it asked to be left alone
        self._ready_s = [-math.inf] * num_coordinators

    @property
    def silence_s(self) -> float:
        """Silence that ends the last call; it grows, so that a slow coordinator can answer."""
        first_s = self._patience.silence_s
        return max(first_s, min(first_s * 2.0 ** self._num_silent[self.at], _MAX_SILENCE_S))

    def progressed(self) -> None:
        """The answer has moved: backoffs begin anew. Silences stay counted: a coordinator that goes
        on and is silent again is slow, and each new call is more work for it.
        """
        self._num_lost = [0] * len(self._num_lost)

    def lost(self, retry_after_s: float, now_s: float, *, silent: bool = False) -> None:
        """The last call was; its coordinator asked to be left alone for `retry_after_s`."""
        self._num_lost[self.at] += 1
        self._num_silent[self.at] += silent
        doubled = self._patience.backoff_s * 2.0 ** min(self._num_lost[self.at] - 1, 30)
        backoff_s = min(doubled, self._patience.max_backoff_s)
        self._asked_s[self.at] = now_s + retry_after_s
        wait_s = retry_after_s + self._dice.uniform(backoff_s / 2, backoff_s)
        self._ready_s[self.at] = now_s + wait_s

    def next(self, now_s: float, ends_s: float = math.inf) -> tuple[int, float] | None:
        """(coordinator, how long to wait before it is called); None: all of it ends before."""
        latest_s = now_s + max((ends_s - now_s) / 2, self._patience.backoff_s)

        def ready_s(at: int) -> float:
            return max(self._asked_s[at], min(self._ready_s[at], latest_s), now_s)

        num = len(self._num_lost)
        at = min(((self.at + i) % num for i in range(num)), key=ready_s)
        if ready_s(at) >= ends_s:
            return None
        self.at = at
        return at, ready_s(at) - now_s
