"""The coordinators that one client follows: how it connects, which it calls first, what it counts.

A client stays with one coordinator, the first named, until a call to it is lost. A DNS name may
stand for several: gRPC then connects to all of them and gives each the next call.

A call that is lost is tried again by `Stream`, before the first token too. gRPC's own retry policy
is not used: it waits for the coordinator that asked for it while others are free, and it knows no
time at which a caller gives up (five calls that each wait for a worker took two minutes).
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
from coordinator.client.silence import Ticks
from coordinator.client.stream import Stream
from engine.base.errors import DeadlineExceeded, DiptychError, Unavailable
from engine.rpc.channel import CHANNEL_OPTIONS, Option
from engine.rpc.status import from_rpc_error


def addresses_of(address: str | Sequence[str]) -> tuple[str, ...]:
    """The coordinators meant by "HOST:PORT,HOST:PORT" or a sequence of such. Raises ValueError."""
    texts = (address,) if isinstance(address, str) else address
    found = [part.strip() for text in texts for part in text.split(",")]
    if not found or not all(found):
        raise ValueError(f"address: expected HOST:PORT[,HOST:PORT...], got {address!r}")
    return tuple(dict.fromkeys(found))


class Coordinators:
    """What the calls of one client share; from any thread."""

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
        self.ticks = Ticks(retry_policy.silence_s)
        self._patience = retry_policy
        self._dice = rng or random.Random()
        self._at = 0
        self._lock = threading.Lock()

    @property
    def options(self) -> tuple[Option, ...]:
        """Of a channel to each."""
        ping_ms = round(self._patience.ping_s * 1000)
        ours: dict[str, int | str] = {
            "grpc.keepalive_time_ms": ping_ms,
            "grpc.keepalive_timeout_ms": ping_ms,
            "grpc.http2.ping_timeout_ms": ping_ms,
            "grpc.dns_min_time_between_resolutions_ms": 2_000,
            "grpc.service_config": '{"loadBalancingConfig": [{"round_robin": {}}]}',
        }
        return tuple({**dict(CHANNEL_OPTIONS), **ours}.items())

    def chat_messages(self, timeout_s: float) -> Iterator[tuple[int, float]]:
        """Each once for a short question, the one called last first, with a share of the time."""
        ends_s, first, num = self.clock() + timeout_s, self._at, len(self.addresses)
        for i in range(num):
            if (left_s := ends_s - self.clock()) > 0:
                yield (first + i) % num, left_s / (num - i)

    def stream(self, request: Request, timeout_s: float | None) -> Stream:
        """A new answer, which is to be complete within `timeout_s`."""
        retry_policy = self._patience
        return Stream(
            request,
            Attempts(len(self.addresses), self._at, retry_policy, self._dice),
            retry_policy,
            self.addresses,
            ends_s=math.inf if timeout_s is None else self.clock() + timeout_s,
            on_resumed=self._resumed,
        )

    def called(self, at: int) -> None:
        """A call of an answer goes to coordinator `at`, and so will the next answer's first."""
        self._at = at

    def _resumed(self) -> None:
        with self._lock:
            self.num_resumed += 1


def unreachable(error: grpc.RpcError) -> DiptychError:
    """The failure of a short question that another coordinator may answer. Raises any other."""
    meaning = from_rpc_error(error)
    if isinstance(meaning, Unavailable | DeadlineExceeded):
        return meaning
    raise (meaning or error) from None
