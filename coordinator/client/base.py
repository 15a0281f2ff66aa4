"""What both clients share: connections to the coordinators, and requests from options."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from coordinator.client.attempts import RetryPolicy
from coordinator.client.coordinators import Coordinators
from coordinator.client.messages import chat_request, generate_request
from coordinator.client.stream import Call, Stream
from engine.pb.diptych.v1 import admin_pb2_grpc, inference_pb2_grpc

Events = TypeVar("Events")  # an iterator of OutputEvent, blocking or not


class BaseClient(Generic[Events]):
    """A client over gRPC's channels of one kind; a subclass makes the calls and waits."""

    def __init__(
        self,
        address: str | Sequence[str],
        retry_policy: RetryPolicy,
        rng: random.Random | None,
        clock: Callable[[], float],
        open_channel: Callable[..., Any],
    ) -> None:
        self._coordinators = Coordinators(address, retry_policy, clock=clock, rng=rng)
        options = self._coordinators.options
        self._channels = [open_channel(a, options=options) for a in self._coordinators.addresses]
        self._inference: list[Any] = [
            inference_pb2_grpc.InferenceServiceStub(c) for c in self._channels
        ]
        self._admin: list[Any] = [admin_pb2_grpc.AdminServiceStub(c) for c in self._channels]

    @property
    def num_resumed(self) -> int:
        """How many calls continued an output that another call had begun."""
        return self._coordinators.num_resumed

    def generate(
        self, prompt: str | Sequence[int], *, timeout_s: float | None = None, **options: Any
    ) -> Events:
        """Stream a completion; closing the iterator cancels it.

        `options`: fields of the API by name (`temperature`, `stop`, `json_schema`, `n`, ...).
        """
        request = generate_request(prompt, **options)
        return self._events(self._coordinators.stream(request, timeout_s))

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
        request = chat_request(messages, **options)
        return self._events(self._coordinators.stream(request, timeout_s))

    @abstractmethod
    def _events(self, stream: Stream) -> Events:
        """The events of an output."""

    def _call(self, stream: Stream, plan: Call) -> Any:
        if self._coordinators.closed:
            raise stream.interrupted("the client was closed")
        self._coordinators.called(plan.coordinator)
        method = getattr(self._inference[plan.coordinator], stream.method)
        return method(plan.request, timeout=stream.remaining_s(self._coordinators.clock()))
