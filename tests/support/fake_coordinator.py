"""A coordinator that answers from a table and fails on cue, speaking the public protocol.

Used only to script deaths, delays and refusals. The token at a position is always the same, and so
is the text of a token, so that what is doubled, missing or different is seen. Text lags a token
behind, as if its end could still become a stop string.

`python -m tests.support.fake_coordinator PORT [FIRST_S]` is one in a process of its own, to be
stopped; at SIGUSR1 its event loop hangs, and gRPC's threads go on.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from coordinator.api.grpc.responses import alive
from engine.base.errors import InvalidRequest, NotFound, Overloaded, Unavailable
from engine.pb.diptych.v1 import admin_pb2, inference_pb2
from engine.rpc.server import RpcServer

ANSWER = tuple((i * 7919) % 49152 for i in range(3, 43))
SAID = {
    "unavailable": Unavailable("this coordinator is shutting down", 0.02, num_emitted=0),
    "overloaded": Overloaded("the queue is full", 0.02),
    "invalid": InvalidRequest("sampling.top_p", "7; expected a number above 0 to 1"),
    "missing": NotFound("model: 'x' is not served here"),
    "bug": ZeroDivisionError("oops"),
}
BARE = {
    "cut": grpc.StatusCode.UNAVAILABLE,
    "cancelled": grpc.StatusCode.CANCELLED,
    "unknown": grpc.StatusCode.UNKNOWN,
    "internal": grpc.StatusCode.INTERNAL,
}
LOSSES = ("unavailable", "overloaded", *BARE, "end")


@dataclass(frozen=True)
class Cue:
    """What happens in one call after so many messages."""

    after: int = 0
    how: str = "cut"  # a key of SAID or BARE, or: end, silent, stuck (sends no Alive), vanish


def word(token_id: int) -> str:
    """The text of a token."""
    return f"{token_id} "


def whole(tokens: Sequence[int]) -> str:
    """The text of an answer."""
    return "".join(map(word, tokens))


def of_choice(tokens: Sequence[int], index: int) -> list[int]:
    """What a choice is to say: others than the first something else, and a bit less."""
    return [(token + index) % 49152 for token in tokens[: max(1, len(tokens) - index)]]


def messages(
    request: Any, tokens: Sequence[int], group: int = 2, tail: bool = False
) -> Iterator[inference_pb2.GenerateResponse]:
    """What a coordinator sends; `tail`: the last text comes without a token, before the end."""
    resumes = {resume.index: resume for resume in request.resume}
    choices = [
        _choice(request.request_id, i, of_choice(tokens, i), resumes.get(i), group, tail)
        for i in range(request.n or 1)
    ]
    while choices:  # in turns
        for choice in list(choices):
            if (message := next(choice, None)) is None:
                choices.remove(choice)
            else:
                yield message


def _choice(
    request_id: str, index: int, tokens: Sequence[int], resume: Any, group: int, tail: bool
) -> Iterator[inference_pb2.GenerateResponse]:
    have = list(resume.token_ids) if resume else []
    assert have == list(tokens[: len(have)]), f"{have} is not what was sent"

    def shown(num: int) -> str:
        return whole(tokens if num == len(tokens) and not tail else tokens[: max(0, num - 1)])

    def response(**event: Any) -> inference_pb2.GenerateResponse:
        return inference_pb2.GenerateResponse(request_id=request_id, index=index, **event)

    num = len(have)
    while num < len(tokens):
        upto = min(num + group, len(tokens))
        text = shown(upto)[len(shown(num)) :]
        yield response(delta=inference_pb2.Delta(text=text, token_ids=tokens[num:upto]))
        num = upto
    if tail and not (resume and resume.finished):
        yield response(delta=inference_pb2.Delta(text=whole(tokens)[len(shown(num)) :]))
    usage = inference_pb2.Usage(completion_tokens=len(tokens))
    reason = inference_pb2.FINISH_REASON_LENGTH
    yield response(finished=inference_pb2.Finished(finish_reason=reason, usage=usage))


@dataclass
class FakeCoordinator:
    """One scripted coordinator on a port of its own."""

    tokens: Sequence[int] = ANSWER
    group: int = 2
    tail: bool = False
    first_s: float = 0.0  # before the first message
    pace_s: float = 0.0  # before each
    back_s: float | None = None  # when it listens again after it vanished
    cues: list[Cue] = field(default_factory=list)  # one a call; without: it goes well
    requests: list[Any] = field(default_factory=list)
    deadlines: list[float | None] = field(default_factory=list)
    num_cancelled: int = 0
    host: str = "127.0.0.1"
    port: int = 0

    async def start(self) -> None:
        self._server = RpcServer()
        for descriptor in (
            inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
            admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
        ):
            self._server.add_service(descriptor, self, alive=self._alive)
        self.port = self._server.listen(f"{self.host}:{self.port}")
        await self._server.start()
        self._vanishing: asyncio.Task[None] | None = None

    async def stop(self) -> None:
        if self._vanishing:
            await self._vanishing
        await self._server.stop()

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def _alive(self, request: Any) -> Any:
        stuck = self.cues and self.cues[0].how == "stuck"
        return None if stuck else alive(request)

    async def Generate(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        self.deadlines.append(context.time_remaining())
        cue = self.cues.pop(0) if self.cues else None
        try:
            await asyncio.sleep(self.first_s)
            for i, message in enumerate(messages(request, self.tokens, self.group, self.tail)):
                if cue and i == cue.after:
                    if cue.how == "end":
                        return
                    await self._fail(cue.how, context)
                await asyncio.sleep(self.pace_s)
                yield message
        except (asyncio.CancelledError, GeneratorExit):
            self.num_cancelled += 1
            raise

    Chat = Generate

    async def GetModel(self, request: Any, context: Any) -> inference_pb2.Model:
        return inference_pb2.Model(name=f"of {self.port}")

    async def ListWorkers(self, request: Any, context: Any) -> admin_pb2.ListWorkersResponse:
        return admin_pb2.ListWorkersResponse(workers=[admin_pb2.Worker(worker_id=str(self.port))])

    async def _unserved(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    Tokenize = Detokenize = ListModels = DrainWorker = _unserved

    async def _fail(self, how: str, context: Any) -> None:
        if how in SAID:
            raise SAID[how]
        if how in BARE:
            await context.abort(BARE[how], f"as scripted: {how}")
        if how == "vanish":  # the process is gone: its connections break, its port is closed
            self._vanishing = asyncio.create_task(self._vanish())
        await asyncio.sleep(3600)

    async def _vanish(self) -> None:
        await self._server.stop()
        if self.back_s is not None:
            await asyncio.sleep(self.back_s)
            await self.start()


async def _main(port: int, first_s: float = 0.0) -> None:
    fake = FakeCoordinator(port=port, pace_s=0.1, first_s=first_s)
    await fake.start()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, time.sleep, 600)
    print("ready", flush=True)
    await asyncio.sleep(600)


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), *map(float, sys.argv[2:])))
