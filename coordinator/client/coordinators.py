"""The coordinators of one client: connections, the order of calls, and counts.

A client calls the first coordinator until a call to it is lost. A DNS name may have several
addresses: gRPC then connects to all of them, and calls them in turn.

`Stream` retries lost calls, before the first token too. gRPC's retry policy is not used: it waits
for the coordinator that refused while others are free, and has no total time limit (five calls that
each wait for a worker took two minutes).
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import grpc

from coordinator.client.attempts import Attempts, RetryPolicy
from coordinator.client.messages import Request
from coordinator.client.silence_monitor import SilenceMonitor
from coordinator.client.stream import Stream
from engine.base.errors import DeadlineExceeded, DiptychError, Unavailable
from engine.rpc.channel import CHANNEL_OPTIONS, Option
from engine.rpc.status import from_rpc_error


def addresses_of(address: str | Sequence[str]) -> tuple[str, ...]:
    """The addresses in "HOST:PORT,HOST:PORT" or a sequence of such. Raises ValueError."""
    texts = (address,) if isinstance(address, str) else address
    found = [part.strip() for text in texts for part in text.split(",")]
    if not found or not all(found):
        raise ValueError(f"address: expected HOST:PORT[,HOST:PORT...], got {address!r}")
    return tuple(dict.fromkeys(found))


class Coordinators:
    """The state that the calls of one client share. Usable from any thread."""

    def __init__(
        self,
        address: str | Sequence[str],
        retry_policy: RetryPolicy,
        *,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.addresses = addresses_of(address)
        self.clock = clock
        self.num_resumed = 0
        self.closed = False
        self.monitor = SilenceMonitor(retry_policy.silence_s)
        self._retry_policy = retry_policy
        self._rng = rng or random.Random()
        self._at = 0
        self._lock = threading.Lock()

    @property
    def options(self) -> tuple[Option, ...]:
        """The options of the channels."""
        ping_ms = round(self._retry_policy.ping_s * 1000)
        own: dict[str, int | str] = {
            "grpc.keepalive_time_ms": ping_ms,
            "grpc.keepalive_timeout_ms": ping_ms,
            "grpc.http2.ping_timeout_ms": ping_ms,
            "grpc.dns_min_time_between_resolutions_ms": 2_000,
            "grpc.service_config": '{"loadBalancingConfig": [{"round_robin": {}}]}',
        }
        return tuple({**dict(CHANNEL_OPTIONS), **own}.items())

    def each_with_timeout(self, timeout_s: float) -> Iterator[tuple[int, float]]:
        """(coordinator, timeout) for a unary call to each once, the last called one first."""
        ends_s, first, num = self.clock() + timeout_s, self._at, len(self.addresses)
        for i in range(num):
            if (left_s := ends_s - self.clock()) > 0:
                yield (first + i) % num, left_s / (num - i)

    def stream(self, request: Request, timeout_s: float | None) -> Stream:
        """A new output, which must be complete within `timeout_s`."""
        retry_policy = self._retry_policy
        return Stream(
            request,
            Attempts(len(self.addresses), self._at, retry_policy, self._rng),
            retry_policy,
            self.addresses,
            ends_s=math.inf if timeout_s is None else self.clock() + timeout_s,
            on_resumed=self._resumed,
        )

    def called(self, at: int) -> None:
        """Record a call to coordinator `at`, which the next output calls first."""
        self._at = at

    def _resumed(self) -> None:
        with self._lock:
            self.num_resumed += 1


def unreachable(error: grpc.RpcError) -> DiptychError:
    """The error of a unary call that another coordinator may serve. Raises other errors."""
    meaning = from_rpc_error(error)
    if isinstance(meaning, Unavailable | DeadlineExceeded):
        return meaning
    raise (meaning or error) from None
