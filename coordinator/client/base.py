"""What both clients share: connections to the coordinators, the order of calls, and counts.

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
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import grpc

from coordinator.client.attempts import RETRY_POLICY, Attempts, RetryPolicy
from coordinator.client.messages import Request, chat_request, generate_request
from coordinator.client.silence_monitor import SilenceMonitor
from coordinator.client.stream import Call, Stream
from engine.base.errors import DeadlineExceeded, DiptychError, Unavailable
from engine.pb.diptych.v1 import admin_pb2_grpc, inference_pb2_grpc
from engine.rpc.channel import CHANNEL_OPTIONS, Option
from engine.rpc.status import from_rpc_error

Events = TypeVar("Events")  # an iterator of OutputEvent, blocking or not


class BaseClient(Generic[Events]):
    """A client over gRPC's channels of one kind; a subclass makes the calls and waits."""

    _open_channel: Callable[..., Any]

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        retry_policy: RetryPolicy = RETRY_POLICY,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_resumed = 0  # calls that continued an output that another call had begun
        self._addresses = addresses_of(address)
        self._retry_policy = retry_policy
        self._rng = rng or random.Random()
        self._clock = clock
        self._monitor = SilenceMonitor(retry_policy.silence_s)
        self._closed = False
        self._at = 0  # the coordinator that the next output calls first
        self._lock = threading.Lock()
        options = channel_options(retry_policy)
        self._channels = [self._open_channel(a, options=options) for a in self._addresses]
        self._inference: list[Any] = [
            inference_pb2_grpc.InferenceServiceStub(c) for c in self._channels
        ]
        self._admin: list[Any] = [admin_pb2_grpc.AdminServiceStub(c) for c in self._channels]

    def generate(
        self, prompt: str | Sequence[int], *, timeout_s: float | None = None, **options: Any
    ) -> Events:
        """Stream a completion; closing the iterator cancels it.

        `options`: fields of the API by name (`temperature`, `stop`, `json_schema`, `n`, ...).
        """
        return self._events(self._stream(generate_request(prompt, **options), timeout_s))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Events:
        """Stream the next message of a conversation; closing the iterator cancels it.

        `options`: as for `generate`, and `tools`, `tool_choice`, `parallel_tool_calls`.
        """
        return self._events(self._stream(chat_request(messages, **options), timeout_s))

    @abstractmethod
    def _events(self, stream: Stream) -> Events:
        """The events of an output."""

    def _stream(self, request: Request, timeout_s: float | None) -> Stream:
        """A new output, which must be complete within `timeout_s`."""
        return Stream(
            request,
            Attempts(len(self._addresses), self._at, self._retry_policy, self._rng),
            self._retry_policy,
            self._addresses,
            ends_s=math.inf if timeout_s is None else self._clock() + timeout_s,
            on_resumed=self._resumed,
        )

    def _resumed(self) -> None:
        with self._lock:
            self.num_resumed += 1

    def _call(self, stream: Stream, plan: Call) -> Any:
        if self._closed:
            raise stream.interrupted("the client was closed")
        self._at = plan.coordinator
        method = getattr(self._inference[plan.coordinator], stream.method)
        return method(plan.request, timeout=stream.remaining_s(self._clock()))

    def _each_with_timeout(self, timeout_s: float) -> Iterator[tuple[int, float]]:
        """(coordinator, timeout) for a unary call to each once, the last called one first."""
        ends_s, first, num = self._clock() + timeout_s, self._at, len(self._addresses)
        for i in range(num):
            if (left_s := ends_s - self._clock()) > 0:
                yield (first + i) % num, left_s / (num - i)


def addresses_of(address: str | Sequence[str]) -> tuple[str, ...]:
    """The addresses in "HOST:PORT,HOST:PORT" or a sequence of such. Raises ValueError."""
    texts = (address,) if isinstance(address, str) else address
    found = [part.strip() for text in texts for part in text.split(",")]
    if not found or not all(found):
        raise ValueError(f"address: expected HOST:PORT[,HOST:PORT...], got {address!r}")
    return tuple(dict.fromkeys(found))


def unreachable(error: grpc.RpcError) -> DiptychError:
    """The error of a unary call that another coordinator may serve. Raises other errors."""
    meaning = from_rpc_error(error)
    if isinstance(meaning, Unavailable | DeadlineExceeded):
        return meaning
    raise (meaning or error) from None


def channel_options(retry_policy: RetryPolicy) -> tuple[Option, ...]:
    """The options of connections to coordinators."""
    ping_ms = round(retry_policy.ping_s * 1000)
    own: dict[str, int | str] = {
        "grpc.keepalive_time_ms": ping_ms,
        "grpc.keepalive_timeout_ms": ping_ms,
        "grpc.http2.ping_timeout_ms": ping_ms,
        "grpc.dns_min_time_between_resolutions_ms": 2_000,
        "grpc.service_config": '{"loadBalancingConfig": [{"round_robin": {}}]}',
    }
    return tuple({**dict(CHANNEL_OPTIONS), **own}.items())
