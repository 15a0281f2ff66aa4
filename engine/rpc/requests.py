"""Reads, authenticates and parses the requests of a method, each within its time.

Bytes are parsed inside the guarded call, so that malformed ones and invalid UTF-8 become
INVALID_ARGUMENT. A large message is counted before it is parsed (wire.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message

from engine.base.errors import DeadlineExceeded, DiptychError, InvalidRequest
from engine.rpc.auth import ClusterToken
from engine.rpc.receive_budget import Lease
from engine.rpc.streams import Context, Incoming
from engine.rpc.unpack import Unpacker
from engine.rpc.wire import MAX_FIELDS, SMALL_BYTES, has_too_many_fields
from engine.telemetry.log import bind_request

_REFUSED_READ_S = 1.0


@dataclass(frozen=True, slots=True)
class RequestReader:
    """Reads, authenticates and parses the requests of one method, with time limits."""

    method: MethodDescriptor
    token: ClusterToken | None
    timeout_s: float
    unpacker: Unpacker
    max_bytes: int

    async def of(self, raw: AsyncIterator[bytes], context: Context, lease: Lease) -> Any:
        """The message of a call, or an async iterator of them. Raises DiptychError."""
        if not self.method.client_streaming:
            return await self._only(context, lease)
        try:
            self._check(context)
        except DiptychError:
            await self._read_refused(raw, lease)
            raise
        messages = aiter(raw)
        return Incoming(lambda: self._next(messages, lease), self.timeout_s)

    async def _only(self, context: Context, lease: Lease) -> Message:
        """The single message of a call."""
        try:
            async with asyncio.timeout(self.timeout_s) as limit:
                await lease.take(self.max_bytes, limit)
                raw = await context.read()
                lease.received()
        except TimeoutError:
            if lease.is_cut_off:
                raise lease.refusal() from None
            raise DeadlineExceeded(f"no complete request within {self.timeout_s:g} s") from None
        self._check(context)
        if raw is grpc.aio.EOF:
            raise InvalidRequest("request", f"none; expected a {self.method.input_type.full_name}")
        request = await self._parse(raw)
        lease.keep(len(raw))
        if request_id := getattr(request, "request_id", ""):
            bind_request(request_id[:128])
        return request

    async def _next(self, messages: AsyncIterator[bytes], lease: Lease) -> Message | None:
        """The next message, None at the end; an idle stream is cut off if others need the room."""
        try:
            async with asyncio.timeout(None) as limit:
                await lease.take(self.max_bytes, limit)
                item = await anext(messages)
                lease.received()
        except StopAsyncIteration:
            return None
        except TimeoutError:
            raise lease.refusal() from None
        request = await self._parse(item)
        lease.keep(0)
        return request

    async def _parse(self, raw: bytes) -> Message:
        """Parse one message. Raises InvalidRequest for malformed bytes and invalid UTF-8."""
        kind = self.method.input_type
        try:
            raw = await self.unpacker.plain(raw)
            big = len(raw) > SMALL_BYTES
            if big and await asyncio.to_thread(has_too_many_fields, raw, kind):
                raise InvalidRequest(
                    "request", f"more than {MAX_FIELDS} fields in all messages of it"
                )
            return message_factory.GetMessageClass(kind).FromString(raw)
        except (DecodeError, ValueError) as error:
            is_text = "UTF-8" in str(error)
            what = "a string that is not valid UTF-8" if is_text else "malformed bytes"
            raise InvalidRequest(
                "request", f"{what} where a {kind.full_name} was expected"
            ) from None

    async def _read_refused(self, raw: AsyncIterator[bytes], lease: Lease) -> None:
        """Read and drop one message of a stream that is refused.

        A client whose first write follows the refusal would see its gRPC's INTERNAL instead.
        """
        with suppress(TimeoutError, StopAsyncIteration):
            async with asyncio.timeout(_REFUSED_READ_S) as limit:
                await lease.take(self.max_bytes, limit)
                await anext(aiter(raw))
                lease.received()

    def _check(self, context: Context) -> None:
        if self.token is not None:
            self.token.check(context.invocation_metadata())
