"""Calls of our own gRPC API: what a stream brings, and what its failure means.

A call lives as long as somebody iterates; closing the iterator cancels it, and with it all that it
holds down to the workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

import grpc

from coordinator.api.openai.errors import Refused, failure_of
from coordinator.generation.fan_in import Merge
from engine.base.errors import DiptychError, Unavailable
from engine.pb.diptych.v1 import inference_pb2
from engine.rpc.status import from_rpc_error

AT_ONCE = 64  # calls of one HTTP request; a list of more prompts waits for its own
Result = TypeVar("Result")
Response = inference_pb2.GenerateResponse
Indexed = tuple[int, Response]  # of which prompt
Names = Callable[[int], Mapping[str, str]]  # gRPC fields in the client's words, by prompt


class Broken(Exception):
    """A gRPC call that ended with a status that means a bug."""


async def unary(call: Awaitable[Result], names: Mapping[str, str]) -> Result:
    """The response of a unary call. Raises Refused, Broken."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise _meaning(error, names) from None
    except asyncio.CancelledError:
        raise _cancelled() from None


async def responses(
    start: Callable[[], Any], names: Mapping[str, str]
) -> AsyncGenerator[Response, None]:
    """All messages of one streaming call. Raises Refused, Broken."""
    call = start()
    try:
        async for response in call:
            yield response
    except grpc.aio.AioRpcError as error:
        raise _meaning(error, names) from None
    except asyncio.CancelledError:
        raise _cancelled() from None
    finally:
        call.cancel()


async def merged(
    starts: Sequence[Callable[[], Any]], names: Names
) -> AsyncGenerator[Indexed, None]:
    """The messages of several calls as they come; a failure of one ends them all."""
    if len(starts) == 1:
        async with aclosing(responses(starts[0], names(0))) as stream:
            async for response in stream:
                yield 0, response
        return
    gate = asyncio.Semaphore(AT_ONCE)

    async def run(index: int, merge: Merge[Indexed]) -> None:
        async with gate, aclosing(responses(starts[index], names(index))) as stream:
            async for response in stream:
                await merge.put((index, response))

    async with Merge[Indexed]() as merge:
        for index in range(len(starts)):
            merge.add(run(index, merge))
        async for item in merge:
            yield item


def starts(method: Callable[..., Any], requests: Sequence[Any]) -> list[Callable[[], Any]]:
    """One call of `method` for each request, not yet made."""
    return [partial(method, request) for request in requests]


def _meaning(error: grpc.aio.AioRpcError, names: Mapping[str, str]) -> Exception:
    meaning: DiptychError | None = from_rpc_error(error)
    if meaning is None:
        return Broken(f"{error.code().name}: {error.details()}")
    return Refused(failure_of(meaning, names))


def _cancelled() -> BaseException:
    """What a cancellation means: our own, or that the server ends its calls."""
    task = asyncio.current_task()
    if task and task.cancelling():
        return asyncio.CancelledError()
    return Refused(failure_of(Unavailable("this server is shutting down")))
