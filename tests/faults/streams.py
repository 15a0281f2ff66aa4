"""One request as its caller sees it: every token with its moment, and how it ended."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from coordinator.client import AsyncClient, Done, TextDelta, generate_request
from engine.base.errors import DiptychError
from engine.pb.diptych.v1 import inference_pb2_grpc
from engine.rpc.channel import open_channel
from engine.rpc.status import from_rpc_error
from tests.faults.oracle import Case, Oracle

_TIMEOUT_S = 120.0  # on a machine that others use too
_numbers = itertools.count(1)


@dataclass(eq=False)
class Stream:
    """A request under way. Its reader is a task of the test's loop."""

    case: Case
    request_id: str
    resumed: Sequence[Sequence[int]] = ()  # of each choice, what was handed in by `resume`
    choices: list[list[int]] = field(default_factory=list)  # tokens that came, of each choice
    texts: list[str] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)  # of each token, whatever its choice
    sent_s: float = field(default_factory=time.monotonic)
    ended_s: float = 0.0
    error: Exception | None = None
    ends: dict[int, Any] = field(default_factory=dict)  # of each choice, its last message
    task: asyncio.Task[None] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.choices = [[] for _ in range(self.case.num_choices)]
        self.texts = [""] * self.case.num_choices

    @property
    def tokens(self) -> list[int]:
        """All that came, one choice after the other."""
        return [token for choice in self.choices for token in choice]

    @property
    def done(self) -> bool:
        """Whether each choice has come to its end."""
        return len(self.ends) == self.case.num_choices

    def add(self, choice: int, text: str, token_ids: Sequence[int]) -> None:
        """What has come just now."""
        self.texts[choice] += text
        self.choices[choice] += token_ids
        self.token_times_s += [time.monotonic()] * len(token_ids)
        self.changed.set()

    async def wait_for_tokens(self, count: int, timeout_s: float = _TIMEOUT_S) -> None:
        """Until so many tokens of each choice are here."""
        async with asyncio.timeout(timeout_s):
            while min(map(len, self.choices)) < count:
                assert not self.is_over, f"{self} ended early: {self.error!r}"
                self.changed.clear()
                await self.changed.wait()

    async def wait_for_end(self, timeout_s: float = _TIMEOUT_S) -> None:
        """Until it has ended, well or not."""
        assert self.task is not None
        await asyncio.wait_for(asyncio.shield(self.task), timeout_s)

    async def cancel(self) -> None:
        """As a client that goes away."""
        assert self.task is not None
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.task is not None and self.task.done()

    @property
    def api_error(self) -> DiptychError | None:
        """The error as the API means it."""
        if isinstance(self.error, grpc.RpcError):
            return from_rpc_error(self.error)
        return self.error if isinstance(self.error, DiptychError) else None

    def wait_after(self, moment: float) -> float:
        """The longest wait for a next token (or the end) from `moment` on; 0 if it was over."""
        end_s = self.ended_s or time.monotonic()
        points = [moment, *(m for m in [*self.token_times_s, end_s] if m > moment)]
        return max((b - a for a, b in itertools.pairwise(points)), default=0.0)

    def longest_wait_s(self) -> float:
        """Between any two tokens, the first one's included."""
        moments = [self.sent_s, *self.token_times_s]
        return max((b - a for a, b in itertools.pairwise(moments)), default=0.0)

    def check(self, oracle: Oracle) -> None:
        """It ended well: each token index delivered once, all equal to the undisturbed answer, and
        no seam in the text.
        """
        assert self.error is None, f"{self}: {self.error!r}"
        assert self.done, f"{self} did not end"
        self.check_so_far(oracle)
        for i, tokens in enumerate(self.choices):
            wanted, usage = len(oracle.answer(self.case, i)), self.ends[i].usage
            num = self._first(i) + len(tokens)
            if num != wanted:
                what = f"{self}: choice {i} has {num} tokens, expected {wanted}"
                raise oracle.failure(self.case, what)
            assert usage.completion_tokens == wanted, f"{self}: {usage}"
            if not self.resumed and tokens == oracle.answer(self.case, i):
                assert self.texts[i] == oracle.text(self.case, i), f"{self}: choice {i}"

    def check_so_far(self, oracle: Oracle) -> None:
        """What has come is right; for requests that a scenario may cut short."""
        for i, tokens in enumerate(self.choices):
            if wrong := oracle.difference(self.case, i, tokens, self._first(i)):
                raise oracle.failure(self.case, f"{self}: {wrong}")

    def _first(self, choice: int) -> int:
        """Index in the answer of the first token that came."""
        return len(self.resumed[choice]) if self.resumed else 0

    def __str__(self) -> str:
        return f"request {self.request_id} ({self.case.name}, {len(self.tokens)} tokens)"


class Sender:
    """Sends requests to coordinators without any retry of ours or of gRPC's."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    def send(
        self,
        address: str,
        case: Case,
        *,
        salt: str = "",
        timeout_s: float = 120.0,
        resume: Sequence[Sequence[int]] = (),
        **options: Any,
    ) -> Stream:
        """Begin a request; `options` go beside those of the case."""
        stream = Stream(case, _new_id(case), resume)
        request = generate_request(
            case.prompt,
            request_id=stream.request_id,
            cache_salt=salt,
            **{**case.options, **options},
        )
        for i, token_ids in enumerate(resume):
            request.resume.add(index=i, token_ids=token_ids)
        if address not in self._channels:
            self._channels[address] = open_channel(address, ("grpc.enable_retries", 0))
        stub = inference_pb2_grpc.InferenceServiceStub(self._channels[address])
        call = stub.Generate(request, timeout=timeout_s)
        stream.task = asyncio.create_task(_read(stream, call))
        return stream

    async def close(self) -> None:
        """End all that is under way."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()


def send_by_client(
    client: AsyncClient, case: Case, *, salt: str = "", timeout_s: float = 120.0
) -> Stream:
    """The same by the client library, which goes on elsewhere when a coordinator is lost."""
    stream = Stream(case, _new_id(case))
    events = client.generate(
        case.prompt,
        request_id=stream.request_id,
        cache_salt=salt,
        timeout_s=timeout_s,
        **case.options,
    )

    async def read() -> None:
        async for event in events:
            if isinstance(event, TextDelta):
                stream.add(event.index, event.text, event.token_ids)
            elif isinstance(event, Done):
                stream.ends[event.index] = event

    stream.task = asyncio.create_task(_guarded(stream, read()))
    return stream


async def _read(stream: Stream, call: Any) -> None:
    async def read() -> None:
        async for response in call:
            if response.HasField("finished"):
                stream.ends[response.index] = response.finished
            else:
                delta = response.delta
                stream.add(response.index, delta.text, delta.token_ids)

    try:
        await _guarded(stream, read())
    finally:
        call.cancel()


async def _guarded(stream: Stream, work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except (grpc.RpcError, DiptychError) as error:
        stream.error = error
    finally:
        stream.ended_s = time.monotonic()
        stream.changed.set()


def _new_id(case: Case) -> str:
    return f"ask-{next(_numbers)}-{case.name}"
