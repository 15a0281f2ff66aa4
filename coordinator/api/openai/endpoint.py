"""One HTTP endpoint: from its request to its response, or until its client has gone.

    method, X-Request-Id, body --> handler --> JSON
                                         '---> server-sent events, the first one in hand
                                               (or, with `sse_keepalive_s`, a comment before it)
    meanwhile: http.disconnect? --> the handler is cancelled, and with it its calls

Every request gets a response in OpenAI's shape. 500 is a bug, logged with its traceback. A stream
that fails after its first event ends with an error event, since its status is sent already.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from prometheus_client import Counter
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from coordinator.api.openai.body import LARGE_BYTES, Gone, parse, read_body
from coordinator.api.openai.errors import INTERNAL, Failure, Refused, failure_of
from coordinator.api.openai.keepalive import kept_alive
from coordinator.api.validation.request import MAX_REQUEST_ID_CHARS
from engine.base.errors import DiptychError, InvalidRequest
from engine.rpc.receive_budget import ReceiveBudget
from engine.telemetry.log import bind_request, get_logger

_log = get_logger(__name__)

_GONE = 499  # in the counter, as nginx counts it: the client went first
_MAX_REASON = 1000  # characters of a message in a line of the log
_SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # a proxy passes events on as they come
}
DONE = "data: [DONE]\n\n"
_ANY = ""  # method
_HEAD = ("GET", "HEAD")  # the served method, and that of the request

Events = AsyncGenerator[str, None]
Result = dict[str, Any] | str | Response | Events  # a text is JSON
Read = TypeVar("Read")


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request as handlers get it."""

    request_id: str  # the header's, the body's, or made up
    path: Mapping[str, str]
    body: dict[str, Any]  # {} for GET
    is_large: bool = False

    async def read_by(self, read: Callable[[dict[str, Any], str], Read]) -> Read:
        """The result of `read`; a large body is read in a thread."""
        if self.is_large:
            return await asyncio.to_thread(read, self.body, self.request_id)
        return read(self.body, self.request_id)


Handler = Callable[[ParsedRequest], Awaitable[Result]]


def event(value: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {to_json(value)}\n\n"


def to_json(value: Any) -> str:
    """Compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def json_response(
    value: dict[str, Any] | str, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A whole response; a text is JSON already."""
    text = value if isinstance(value, str) else to_json(value)
    body = text.encode(errors="replace")
    return Response(body, status, headers, media_type="application/json")


def large_json(value: Any, depth: int = 5) -> str:
    """The same for use in a thread: the interpreter is released between parts of the value."""
    if depth and isinstance(value, dict):
        items = (f"{to_json(str(k))}:{large_json(item, depth - 1)}" for k, item in value.items())
        return "{" + ",".join(items) + "}"
    if depth and isinstance(value, list):
        return "[" + ",".join(large_json(item, depth - 1) for item in value) + "]"
    return to_json(value)


@dataclass(eq=False)
class Endpoint:
    """The ASGI application of one path and one `method`."""

    name: str
    method: str
    handler: Handler
    counter: Counter
    sse_keepalive_s: float = 0.0  # 0: silent streams stay silent
    budget: ReceiveBudget = field(default_factory=ReceiveBudget)  # of bodies that are received

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; ends early where the client goes away."""
        exchange = _Exchange(scope, receive, send)
        work = asyncio.create_task(self._serve(exchange))
        watch = asyncio.create_task(exchange.until_gone())
        try:
            await asyncio.wait([work, watch], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)
        status = _GONE if work.cancelled() else _status_of(work)
        self.counter.labels(self.name, str(status)).inc()

    async def _serve(self, exchange: _Exchange) -> int:
        """Write the response; returns its status, or _GONE."""
        bind_request(exchange.request_id)
        try:
            request = await self._read(exchange)
            response = await self.handler(request)
            if isinstance(response, AsyncGenerator):
                return await self._stream(exchange, response)
            if not isinstance(response, Response):
                response = json_response(response)
            await exchange.respond(response)
            return 200
        except Gone:
            return _GONE
        except Exception as error:
            failure = self._failure(error)
            await exchange.respond(json_response(failure.body, failure.status, failure.headers))
            return failure.status

    async def _read(self, exchange: _Exchange) -> ParsedRequest:
        if self.method not in (_ANY, exchange.method) and (self.method, exchange.method) != _HEAD:
            message = f"{exchange.method} is not served here; {self.method} is"
            raise Refused(Failure(405, message, headers={"allow": self.method}))
        exchange.check_id()
        body: dict[str, Any] = {}
        is_large = False
        if self.method == "POST":
            with self.budget.lease(exchange.peer) as lease:
                raw = await read_body(exchange.headers, exchange.receive, lease)
                exchange.listen()
                body = await parse(raw)
            is_large = len(raw) > LARGE_BYTES
            exchange.take_id(body.get("request_id"))
        exchange.listen()
        return ParsedRequest(exchange.request_id, exchange.path, body, is_large)

    async def _stream(self, exchange: _Exchange, events: Events) -> int:
        status = 200
        if self.sse_keepalive_s:
            events = kept_alive(events, self.sse_keepalive_s)
        async with aclosing(events):
            try:
                first = await anext(events)  # until then a failure can set the status
            except StopAsyncIteration:
                first = DONE
            await exchange.start(200, _SSE_HEADERS)
            await exchange.write(first)
            try:
                async for item in events:
                    await exchange.write(item)
            except Exception as error:
                failure = self._failure(error)
                status = failure.status
                await exchange.write(event(failure.body) + DONE)
        await exchange.write("", more=False)
        return status

    def _failure(self, error: Exception) -> Failure:
        """The response to an error; writes a line in the log."""
        if not isinstance(error, DiptychError):
            _log.exception("http request failed", path=self.name, status=500)
            return INTERNAL
        failure = failure_of(error)
        refused = {"path": self.name, "status": failure.status, "reason": str(error)[:_MAX_REASON]}
        if failure.status < 500:
            _log.info("http request refused", **refused, code=failure.code, param=failure.param)
        else:
            _log.warning("http request failed", **refused)
        return failure


def _status_of(work: asyncio.Task[int]) -> int:
    """The status that was sent; a response that could not be written is a bug."""
    if (error := work.exception()) is None:
        return work.result()
    _log.error("http response failed", exc_info=error)
    return 500


class _Exchange:
    """The two directions of one HTTP request."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: Mapping[str, str] = scope.get("path_params", {})
        self.headers = Headers(scope=scope)
        self.receive = receive
        host, port = scope.get("client") or ("", 0)
        self.peer = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._scope, self._send = scope, send
        self._listening = asyncio.Event()
        self._header_id = self.headers.get("x-request-id", "")
        good = self._header_id and _plain(self._header_id)
        self.request_id = self._header_id if good else uuid.uuid4().hex

    def check_id(self) -> None:
        """Raise InvalidRequest for a header that cannot be a request's id."""
        if not _plain(self._header_id):
            raise InvalidRequest("X-Request-Id", _EXPECTED_ID)

    def take_id(self, body_id: Any) -> None:
        """Use the id of the body, unless a header has one. Raises InvalidRequest."""
        if not isinstance(body_id, str) or not body_id:
            return
        if not _plain(body_id):
            raise InvalidRequest("request_id", _EXPECTED_ID)
        if not self._header_id:
            self.request_id = body_id
            bind_request(body_id)

    def listen(self) -> None:
        """The body is complete: the next message is the disconnect."""
        self._listening.set()

    async def until_gone(self) -> None:
        """Wait until the client has gone; only once its body is complete."""
        await self._listening.wait()
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Status and headers."""
        raw = [(k.encode(), v.encode()) for k, v in headers.items()]
        raw.append((b"x-request-id", self.request_id.encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, text: str, *, more: bool = True) -> None:
        """Some of the body."""
        body = text.encode(errors="replace")
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def respond(self, response: Response) -> None:
        """A whole response."""
        response.headers["x-request-id"] = self.request_id
        await response(self._scope, self.receive, self._send)


_EXPECTED_ID = f"expected at most {MAX_REQUEST_ID_CHARS} printable ASCII characters"


def _plain(text: str) -> bool:
    return len(text) <= MAX_REQUEST_ID_CHARS and text.isascii() and text.isprintable()
