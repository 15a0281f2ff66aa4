"""One output over any number of calls, without gaps or repetitions.

Pure: it decides what to call and how long to wait; a client does both.

    next -> Call ---> take, take, take ... a Finished of each choice: done
     ^                  '-- the call ends before: lost
     |                              |
     '----- retry ------------------+----- final error, or no coordinator is left ---> raises

The delivered tokens of each choice go into the next call as `resume`. The sampler is a function of
seed and position, and the text is a function of the tokens, so both continue exactly there (see
choice.py).

    InvalidRequest, NotFound, NotOffered, Mismatch, DeadlineExceeded, a bug    final
    Overloaded, Unavailable from a coordinator    others first; this one after its retry time
    no connection, a broken one, an incomplete stream, silence                 others first
"""

from __future__ import annotations

import copy
import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from coordinator.client.attempts import Attempts, RetryPolicy
from coordinator.client.choice import Choice
from coordinator.client.events import OutputEvent, done
from coordinator.client.messages import Request
from engine.base.errors import DeadlineExceeded, DiptychError, Overloaded, Unavailable
from engine.pb.diptych.v1 import inference_pb2
from engine.rpc.status import DETAILS_KEY, from_rpc_error
from engine.telemetry.log import library_logger

_EVENTS = ("delta", "finished", "prompt")
_BROKEN = (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)


@dataclass(frozen=True, slots=True)
class Call:
    """The next call, and the wait before it."""

    coordinator: int
    request: Request
    wait_s: float
    silence_s: float  # without a message for so long it is lost


@dataclass(eq=False)
class Stream:
    """The state of one output. Owned by the iterator that yields its events."""

    request: Request
    attempts: Attempts
    retry_policy: RetryPolicy
    addresses: Sequence[str]
    ends_s: float = math.inf  # time of the client's clock
    on_resumed: Callable[[], None] = lambda: None
    _choices: dict[int, Choice] = field(default_factory=dict)
    _has_prompt: bool = False
    _num_resumed: int = 0
    _resuming: bool = False  # the current call resumes, and has sent nothing yet
    _silence_s: float = math.inf  # of the current call
    _loss: Unavailable | Overloaded | None = None  # since the last progress
    _first_call_s: float = math.inf
    _gives_up_s: float = math.inf
    done: bool = False

    def __post_init__(self) -> None:
        # An unset seed is a hash of the request id, which is equal in all calls.
        self.request.request_id = self.request.request_id or uuid.uuid4().hex
        if not math.isinf(self.retry_policy.silence_s):
            self.request.alive = True
        self._num_open = self.request.n if self.request.HasField("n") else 1  # unfinished choices

    @property
    def method(self) -> str:
        """The method of InferenceService to call."""
        chat = isinstance(self.request, inference_pb2.ChatRequest)
        return "Chat" if chat else "Generate"

    def remaining_s(self, now_s: float) -> float | None:
        """The remaining seconds, None if unlimited. Raises DeadlineExceeded."""
        if math.isinf(self.ends_s):
            return None
        if now_s >= self.ends_s:
            raise DeadlineExceeded("the call's time ran out")
        return self.ends_s - now_s

    def next(self, now_s: float) -> Call:
        """The next call. Raises Unavailable or Overloaded if no coordinator may be called."""
        begun = self._has_prompt or any(choice.begun for choice in self._choices.values())
        ends_s = min(self._gives_up_s, self.ends_s) if self._loss else math.inf
        found = self.attempts.next(now_s, ends_s)
        if found is None:
            raise self._spent()
        coordinator, wait_s = found
        self._first_call_s = min(self._first_call_s, now_s)
        self._resuming = begun
        request = copy.deepcopy(self.request)
        for _, choice in sorted(self._choices.items()):
            if resume := choice.call_again():
                request.resume.append(resume)
        self._silence_s = self.attempts.silence_s
        return Call(coordinator, request, wait_s, self._silence_s)

    def take(self, response: inference_pb2.GenerateResponse) -> OutputEvent | None:
        """The new event of a message, or None."""
        if response.WhichOneof("event") not in _EVENTS:  # Alive, or an event of a later version
            return None
        if self._resuming:
            self._resuming = False
            self._num_resumed += 1
            self.on_resumed()
        event = self._new(response)
        if event is not None:
            self.attempts.progressed()
            self._loss = None
        return event

    def _new(self, response: inference_pb2.GenerateResponse) -> OutputEvent | None:
        if response.HasField("prompt"):
            known, self._has_prompt = self._has_prompt, True
            return None if known else response.prompt
        choice = self._choices.setdefault(response.index, Choice(response.index))
        if response.HasField("delta"):
            return choice.take(response.delta)
        if choice.finished:
            return None
        choice.finished = True
        self._num_open -= 1
        self.done = self._num_open <= 0
        return done(response, self._num_resumed)

    def lost(self, error: grpc.RpcError | None, now_s: float) -> None:
        """Record that the call ended before the output, with `error` or without one.

        Raises a final error.
        """
        loss, waits = _loss(error)
        self._lost(loss, waits, now_s)

    def silent(self, now_s: float) -> None:
        """Record that the call was cancelled after `silence_s` without a message."""
        loss = Unavailable(f"no message for {self._silence_s:g} s")
        self._lost(loss, False, now_s, silent=True)

    def _lost(
        self, loss: Unavailable | Overloaded, waits: bool, now_s: float, *, silent: bool = False
    ) -> None:
        self.attempts.lost(loss.retry_after_s if waits else 0.0, now_s, silent=silent)
        library_logger("coordinator.client").warning(
            "call lost",
            request_id=self.request.request_id,
            coordinator=self.addresses[self.attempts.at],
            reason=loss.message,
            num_tokens=self._num_tokens,
        )
        if self._loss is None:
            # The time in which a coordinator waited for a worker in vain counts too.
            since_s = self._first_call_s if waits and not self._num_tokens else now_s
            self._gives_up_s = since_s + self.retry_policy.give_up_s
        if waits or self._loss is None:  # a coordinator's error tells more than a dead connection
            self._loss = loss

    def interrupted(self, reason: str, retry_after_s: float = 1.0) -> Unavailable:
        """The error of an incomplete output, with the number of delivered tokens."""
        num = self._num_tokens
        message = f"the output broke off after {num} tokens: {reason}" if num else reason
        return Unavailable(message, retry_after_s, num_emitted=num)

    @property
    def _num_tokens(self) -> int:
        """Delivered tokens of all choices."""
        return sum(len(choice.token_ids) for choice in self._choices.values())

    def _spent(self) -> DiptychError:
        assert self._loss is not None, "the first call is always allowed"
        if isinstance(self._loss, Overloaded) and not self._num_tokens:
            return self._loss
        return self.interrupted(self._loss.message, self._loss.retry_after_s)


def _loss(error: grpc.RpcError | None) -> tuple[Unavailable | Overloaded, bool]:
    """(reason of a lost call, whether it came from the coordinator). Raises a final error."""
    if error is None:
        return Unavailable("the stream ended before the output"), False
    call: Any = error
    code = call.code()
    is_servers = DETAILS_KEY in dict(call.trailing_metadata() or ())  # else gRPC's own status
    meaning = from_rpc_error(error)
    if isinstance(meaning, Unavailable) or (is_servers and isinstance(meaning, Overloaded)):
        return meaning, is_servers
    if code in _BROKEN and not is_servers:
        return Unavailable(f"{code.name}: {call.details()}"), False
    raise (meaning or error) from None
