"""One answer over as many calls as it takes; its caller sees no seam. Pure: it neither calls nor
waits, a client does what it says.

    next -> Call ---> take, take, take ... a Finished of each choice: done
     ^                  '-- the call ends otherwise: lost
     |                              |
     '----- another call helps -----+----- it was an answer, or nothing is left ---> raises

The tokens that the caller has of each choice go into the next call as `resume`; the sampler is a
function of seed and position and the text one of the tokens, so both go on exactly there (see
choice.py). What is an answer:

    InvalidRequest, NotFound, NotOffered, Mismatch, DeadlineExceeded, a bug   raised at once
    Overloaded, Unavailable (the coordinator's word)   others first; itself after what it asked for
    no connection, a broken one, a stream without an end, a silent one        others first
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from coordinator.client.attempts import Attempts, RetryPolicy
from coordinator.client.choice import Choice
from coordinator.client.events import OutputEvent, done
from coordinator.client.messages import Request, give_name, resumed
from engine.base.errors import DeadlineExceeded, DiptychError, Overloaded, Unavailable
from engine.pb.diptych.v1 import inference_pb2
from engine.rpc.status import DETAILS_KEY, from_rpc_error
from engine.telemetry.log import library_logger

_EVENTS = ("delta", "finished", "prompt")
_BROKEN = (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)


@dataclass(frozen=True, slots=True)
class Call:
    """What is to be called, and after what wait."""

    coordinator: int
    request: Request
    wait_s: float
    silence_s: float  # without a message: it is lost


class Stream:
    """One answer, as far as its caller has it. Owned by the iterator that yields it."""

    def __init__(
        self,
        request: Request,
        attempts: Attempts,
        retry_policy: RetryPolicy,
        addresses: Sequence[str],
        *,
        ends_s: float = math.inf,  # a moment of the client's clock
        on_resumed: Callable[[], None] = lambda: None,
    ) -> None:
        give_name(request)
        if not math.isinf(retry_policy.silence_s):
            request.alive = True
        self._request = request
        self._attempts = attempts
        self._patience = retry_policy
        self._addresses = addresses
        self._ends_s = ends_s
        self._on_resumed = on_resumed
        self._num_open = request.n if request.HasField("n") else 1  # choices without an end
        self._choices: dict[int, Choice] = {}  # of which something has come
        self._has_prompt = False
        self._num_resumed = 0
        self._resuming = False  # this call takes the answer up, and has said nothing yet
        self._silence_s = math.inf  # of the last call
        self._loss: Unavailable | Overloaded | None = None  # since the answer last moved
        self._first_call_s = math.inf
        self._gives_up_s = math.inf
        self.done = False

    @property
    def method(self) -> str:
        """The method of InferenceService that answers it."""
        chat = isinstance(self._request, inference_pb2.ChatRequest)
        return "Chat" if chat else "Generate"

    def remaining_s(self, now_s: float) -> float | None:
        """What is left of the caller's time, None for any. Raises DeadlineExceeded."""
        if math.isinf(self._ends_s):
            return None
        if now_s >= self._ends_s:
            raise DeadlineExceeded("the call's time ran out")
        return self._ends_s - now_s

    def next(self, now_s: float) -> Call:
        """The next call. Raises Unavailable or Overloaded where nothing is left to try."""
        begun = self._has_prompt or any(choice.begun for choice in self._choices.values())
        ends_s = min(self._gives_up_s, self._ends_s) if self._loss else math.inf
        found = self._attempts.next(now_s, ends_s)
        if found is None:
            raise self._spent()
        coordinator, wait_s = found
        self._first_call_s = min(self._first_call_s, now_s)
        self._resuming = begun
        delivered = []
        for _, choice in sorted(self._choices.items()):
            choice.call_again()
            delivered.append(choice.resume())
        request = resumed(self._request, delivered)
        self._silence_s = self._attempts.silence_s
        return Call(coordinator, request, wait_s, self._silence_s)

    def take(self, response: inference_pb2.GenerateResponse) -> OutputEvent | None:
        """The event that a message brings to the caller, if it brings one."""
        if response.WhichOneof("event") not in _EVENTS:  # Alive, or what later versions send
            return None
        if self._resuming:
            self._resuming = False
            self._num_resumed += 1
            self._on_resumed()
        event = self._new(response)
        if event is not None:
            self._attempts.progressed()
            self._loss = None
        return event

    def _new(self, response: inference_pb2.GenerateResponse) -> OutputEvent | None:
        """What the caller does not have yet."""
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
        """The call ended before the answer: by `error`, or as if all were well.

        Raises what the coordinator meant if that was an answer.
        """
        loss, waits = _loss(error)
        self._lost(loss, waits, now_s)

    def silent(self, now_s: float) -> None:
        """The call was cancelled: nothing came for its `silence_s`."""
        loss = Unavailable(f"nothing came for {self._silence_s:g} s")
        self._lost(loss, False, now_s, silent=True)

    def _lost(
        self, loss: Unavailable | Overloaded, waits: bool, now_s: float, *, silent: bool = False
    ) -> None:
        self._attempts.lost(loss.retry_after_s if waits else 0.0, now_s, silent=silent)
        library_logger("coordinator.client").warning(
            "call lost",
            request_id=self._request.request_id,
            coordinator=self._addresses[self._attempts.at],
            reason=loss.message,
            num_tokens=self._num_tokens,
        )
        if self._loss is None:
            # What a coordinator has waited for in vain (a worker) counts as ours.
            since_s = self._first_call_s if waits and not self._num_tokens else now_s
            self._gives_up_s = since_s + self._patience.give_up_s
        if waits or self._loss is None:  # a coordinator's word tells more than a dead connection
            self._loss = loss

    def broken_off(self, reason: str, retry_after_s: float = 1.0) -> Unavailable:
        """The end of an answer that did not end, with the number of tokens that its caller has."""
        num = self._num_tokens
        message = f"the answer broke off after {num} tokens: {reason}" if num else reason
        return Unavailable(message, retry_after_s, num_emitted=num)

    @property
    def _num_tokens(self) -> int:
        """What the caller has, of all choices."""
        return sum(len(choice.token_ids) for choice in self._choices.values())

    def _spent(self) -> DiptychError:
        assert self._loss is not None, "the first call is always left"
        if isinstance(self._loss, Overloaded) and not self._num_tokens:
            return self._loss
        return self.broken_off(self._loss.message, self._loss.retry_after_s)


def _loss(error: grpc.RpcError | None) -> tuple[Unavailable | Overloaded, bool]:
    """(why a call was lost, whether the coordinator said so itself). Raises what was an answer."""
    if error is None:
        return Unavailable("the stream ended before the answer"), False
    call: Any = error
    code = call.code()
    said = DETAILS_KEY in dict(call.trailing_metadata() or ())  # else gRPC made the status up
    meaning = from_rpc_error(error)
    if isinstance(meaning, Unavailable) or (said and isinstance(meaning, Overloaded)):
        return meaning, said
    if code in _BROKEN and not said:
        return Unavailable(f"{code.name}: {call.details()}"), False
    raise (meaning or error) from None
