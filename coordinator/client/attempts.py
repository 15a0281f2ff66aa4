"""Decides which coordinator gets the next call of an output, and when. Pure: no clock, no I/O.

    a coordinator   call --- lost |<- its retry time ->|<- backoff, doubled ->| may be called
    next            the one that may be called soonest; among equals the next in order
    None            none may be called before the client gives up

So after a broken call another coordinator is called at once, and after a refusal with a retry time
the others are called first. A backoff takes at most half of the remaining time, so that the last
calls come near its end.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

_MAX_SILENCE_S = 20.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When a client retries, and when it gives up."""

    # No call begins later than this after the first lost call; if a coordinator has waited for a
    # worker in vain, after the beginning of that call.
    give_up_s: float = 60.0
    backoff_s: float = 0.2  # before the second call to the same coordinator; doubled each time
    max_backoff_s: float = 5.0
    # A call without a message for so long is lost, as coordinators send `Alive` each second. Each
    # such loss doubles the limit of the next call there, up to 20 s. inf: never.
    silence_s: float = 2.5
    ping_s: float = 3.0  # silence before a connection is pinged, and from there to its end

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if not self.silence_s > 0:
            raise ValueError(f"silence_s: expected a number above 0, or inf; got {self.silence_s}")


RETRY_POLICY = RetryPolicy()


@dataclass(eq=False)
class Attempts:
    """The calls of one output. Owned by its stream."""

    num_coordinators: int
    at: int  # the coordinator that was called last, or is called first
    retry_policy: RetryPolicy
    rng: random.Random

    def __post_init__(self) -> None:
        self._num_lost = [0] * self.num_coordinators
        self._num_silent = [0] * self.num_coordinators  # of those, lost by silence
        self._asked_s = [-math.inf] * self.num_coordinators  # end of the retry time it asked for
        self._ready_s = [-math.inf] * self.num_coordinators

    @property
    def silence_s(self) -> float:
        """The silence limit of the current call; it grows for a slow coordinator."""
        first_s = self.retry_policy.silence_s
        return max(first_s, min(first_s * 2.0 ** self._num_silent[self.at], _MAX_SILENCE_S))

    def progressed(self) -> None:
        """Reset the backoffs after progress. Silences stay counted, because a coordinator that is
        silent again is slow, and each new call adds work to it.
        """
        self._num_lost = [0] * len(self._num_lost)

    def lost(self, retry_after_s: float, now_s: float, *, silent: bool = False) -> None:
        """Record that the current call is lost, with the coordinator's retry time."""
        self._num_lost[self.at] += 1
        self._num_silent[self.at] += silent
        doubled = self.retry_policy.backoff_s * 2.0 ** min(self._num_lost[self.at] - 1, 30)
        backoff_s = min(doubled, self.retry_policy.max_backoff_s)
        self._asked_s[self.at] = now_s + retry_after_s
        wait_s = retry_after_s + self.rng.uniform(backoff_s / 2, backoff_s)
        self._ready_s[self.at] = now_s + wait_s

    def next(self, now_s: float, ends_s: float = math.inf) -> tuple[int, float] | None:
        """(coordinator, seconds to wait before the call); None: `ends_s` comes first."""
        latest_s = now_s + max((ends_s - now_s) / 2, self.retry_policy.backoff_s)

        def ready_s(at: int) -> float:
            return max(self._asked_s[at], min(self._ready_s[at], latest_s), now_s)

        num = len(self._num_lost)
        at = min(((self.at + i) % num for i in range(num)), key=ready_s)
        if ready_s(at) >= ends_s:
            return None
        self.at = at
        return at, ready_s(at) - now_s
