"""Admission: a bound on the requests inside and on their prompt tokens.

    admit() -> Ticket -> set_tokens(n) -> release()
       |                    |
       +--- Overloaded -----+    retry_after_s: until there is room, at the last minute's rate

Owned by the event loop; a ticket is released exactly once, however its request ends.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.base.errors import Overloaded
from engine.base.holds import Hold
from engine.telemetry.coordinator_metrics import CoordinatorMetrics

_WINDOW_S = 60.0
_MIN_RETRY_S = 0.1
_MAX_RETRY_S = 60.0
_UNKNOWN_RETRY_S = 1.0  # nothing has completed lately: the rate is unknown


@dataclass(eq=False)
class Ticket:
    """One admitted request."""

    admission: Admission
    admitted_s: float
    request_id: str
    deadline_s: float
    num_requests: int
    activity: str = "is being tokenized"  # for /debug/holds; set by the owner
    num_tokens: int = 0  # 0: refused before it had a worker
    released: bool = False

    def set_tokens(self, num_tokens: int) -> None:
        """Claim room for the prompt; raises Overloaded where there is none."""
        self.admission._claim(self, num_tokens)

    def release(self) -> None:
        """Give the room back. Further calls do nothing."""
        if not self.released:
            self.released = True
            self.admission._release(self)


class _Endings:
    """Requests that left lately: sums and the earliest start, each in O(1) a request."""

    def __init__(self) -> None:
        # (left_s, admitted_s, choices, prompt tokens), oldest first.
        self._all: deque[tuple[float, float, int, int]] = deque()
        # (left_s, admitted_s) of those that no later one was admitted before: a monotonic queue.
        self._earliest: deque[tuple[float, float]] = deque()
        self.num_requests = 0
        self.num_tokens = 0

    @property
    def first_admitted_s(self) -> float:
        """The earliest admission of all. There has to be one."""
        return self._earliest[0][1]

    def add(self, now: float, admitted_s: float, num_requests: int, num_tokens: int) -> None:
        """A request has left at `now`, which never decreases."""
        self._all.append((now, admitted_s, num_requests, num_tokens))
        self.num_requests += num_requests
        self.num_tokens += num_tokens
        while self._earliest and self._earliest[-1][1] >= admitted_s:
            self._earliest.pop()
        self._earliest.append((now, admitted_s))

    def forget(self, horizon_s: float) -> None:
        """Drop those that left before `horizon_s`."""
        while self._all and self._all[0][0] < horizon_s:
            *_, num_requests, num_tokens = self._all.popleft()
            self.num_requests -= num_requests
            self.num_tokens -= num_tokens
        while self._earliest and self._earliest[0][0] < horizon_s:
            self._earliest.popleft()


@dataclass(eq=False)
class Admission:
    """Counts what is inside. A prompt larger than the bound is admitted when nothing else is."""

    max_requests: int
    max_tokens: int
    metrics: CoordinatorMetrics
    clock: Callable[[], float] = time.monotonic
    what: str = ""  # before the reasons of the counter; names the requests in messages
    _completed: _Endings = field(default_factory=_Endings)
    _tickets: set[Ticket] = field(default_factory=set)
    _promised_s: float = 0.0  # end of the last `retry_after_s`; monotonic
    num_requests: int = 0
    num_tokens: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)  # set while nothing is inside

    def __post_init__(self) -> None:
        self._adjective = f"{self.what} " if self.what else ""
        self._prefix = f"{self.what}_" if self.what else ""  # of reasons
        self.idle.set()

    def admit(
        self, request_id: str = "", deadline_s: float = math.inf, num_requests: int = 1
    ) -> Ticket:
        """Admit one request; `deadline_s` is a moment of the clock. Raises Overloaded.

        It counts as `num_requests`; one of more than the limit is admitted when nothing else is.
        """
        excess = self.num_requests + num_requests - self.max_requests
        if self.num_requests and excess > 0:
            self.metrics.admission_rejected(self._prefix + "requests")
            raise Overloaded(
                f"{self.num_requests} {self._adjective}requests are admitted and {num_requests}"
                f" more are above the limit of {self.max_requests}",
                self._retry_after_s(num_requests=min(excess, self.num_requests), num_tokens=0),
            )
        self.num_requests += num_requests
        self.idle.clear()
        ticket = Ticket(self, self.clock(), request_id, deadline_s, num_requests)
        self._tickets.add(ticket)
        return ticket

    def holds(self) -> list[Hold]:
        """Every request inside, for /debug/holds."""
        now = self.clock()
        return [
            Hold(
                kind="request",
                owner=ticket.request_id,
                reason=f"admitted; it {ticket.activity}",
                age_s=now - ticket.admitted_s,
                deadline_s=due_s if math.isfinite(due_s := ticket.deadline_s - now) else None,
                note="" if math.isfinite(due_s) else "none was given; it ends with its call",
                num_tokens=ticket.num_tokens,
            )
            for ticket in self._tickets
        ]

    def _claim(self, ticket: Ticket, num_tokens: int) -> None:
        if self.num_tokens and self.num_tokens + num_tokens > self.max_tokens:
            self.metrics.admission_rejected(self._prefix + "tokens")
            excess = self.num_tokens + num_tokens - self.max_tokens
            raise Overloaded(
                f"{self.num_tokens} {self._adjective}prompt tokens are admitted and {num_tokens}"
                f" more are above the limit of {self.max_tokens}",
                self._retry_after_s(num_requests=0, num_tokens=min(excess, self.num_tokens)),
            )
        ticket.num_tokens = num_tokens
        self.num_tokens += num_tokens

    def _release(self, ticket: Ticket) -> None:
        self._tickets.discard(ticket)
        self.num_requests -= ticket.num_requests
        self.num_tokens -= ticket.num_tokens
        if not self.num_requests:
            self.idle.set()
        if ticket.num_tokens:  # one that was refused at once shows nothing of the rate
            self._completed.add(
                self.clock(), ticket.admitted_s, ticket.num_requests, ticket.num_tokens
            )
        self._completed.forget(self.clock() - _WINDOW_S)

    def _retry_after_s(self, *, num_requests: int, num_tokens: int) -> float:
        """Time in which, at the recent rate, as much leaves as is in the way.

        It begins where the last promise ends, so that clients that are refused together do not
        come back together.
        """
        now = self.clock()
        self._completed.forget(now - _WINDOW_S)
        if not self._completed.num_requests:
            # The rate is unknown: as if all that may be inside took this long.
            share = max(num_requests / self.max_requests, num_tokens / self.max_tokens)
            promise_s = min(max(self._promised_s, now + _UNKNOWN_RETRY_S), now + _MAX_RETRY_S)
            self._promised_s = promise_s + share * _UNKNOWN_RETRY_S
            return promise_s - now
        begun_s = max(now - _WINDOW_S, self._completed.first_admitted_s)
        span = max(now - begun_s, 1e-3)
        wait = num_requests * span / self._completed.num_requests
        if num_tokens:
            wait = max(wait, num_tokens * span / max(1, self._completed.num_tokens))
        self._promised_s = min(max(self._promised_s, now) + wait, now + _MAX_RETRY_S)
        return max(self._promised_s - now, _MIN_RETRY_S)
