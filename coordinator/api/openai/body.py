"""A request's body: its bytes within a bound, and the JSON object that they are.

What comes out can be handed on without a second look: no NaN, no lone surrogate (which no message
can carry), no deep nesting, and within bounds of bytes and of values. Large bodies are parsed one
at a time, in a thread: what they become is many times their size.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.types import Receive

from coordinator.api.openai.errors import Failure, Refused
from coordinator.text import json_bounds as nesting
from engine.rpc.channel import MAX_REQUEST_BYTES
from engine.rpc.receive_budget import SMALL_BYTES, Lease

MAX_BODY_BYTES = MAX_REQUEST_BYTES
LARGE_BYTES = 64 * 1024
_CODE = "invalid_json"
_PARSER = ThreadPoolExecutor(1, thread_name_prefix="json")


class Gone(Exception):
    """The client went away."""


async def read_body(headers: Mapping[str, str], receive: Receive, lease: Lease) -> bytes:
    """All bytes of a JSON body. Raises Refused, Gone, Overloaded.

    Its bytes are taken of `lease` before they are received; a body without Content-Length takes as
    many as it may have.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(Failure(415, "content-type: expected application/json"))
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(Failure(415, "content-encoding: send the body as it is"))
    size = headers.get("content-length", "")
    length = int(size) if size.isdecimal() and len(size) < 20 else MAX_BODY_BYTES
    if length > MAX_BODY_BYTES:
        raise _too_large()
    try:
        async with asyncio.timeout(None) as limit:
            if length > SMALL_BYTES:
                await lease.take(length, limit)
            parts = await _received(receive)
            lease.received()
    except TimeoutError:
        raise lease.refusal() from None
    if sum(map(len, parts)) <= LARGE_BYTES:
        return b"".join(parts)
    # Many large bodies may be whole in one turn of the loop, and each join takes milliseconds.
    return await asyncio.get_running_loop().run_in_executor(_PARSER, b"".join, parts)


async def _received(receive: Receive) -> list[bytes]:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            raise _too_large()
        if not message.get("more_body"):
            return parts


async def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`, a large one read in a thread. Raises Refused."""
    if len(raw) <= LARGE_BYTES:
        return parse_body(raw)
    return await asyncio.get_running_loop().run_in_executor(_PARSER, parse_body, raw)


def parse_body(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`. Raises Refused."""
    try:
        text = raw.decode()
        value = nesting.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise _malformed(f"{error.msg}: {where}") from None
    except UnicodeDecodeError:
        raise _malformed("not valid UTF-8") from None
    except ValueError as error:  # too much, NaN, a number of thousands of digits
        raise _malformed(str(error).partition(";")[0]) from None
    if not isinstance(value, dict):
        raise _malformed("expected an object")
    try:
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _malformed("a lone surrogate, which is no character") from None
    return value


def _too_large() -> Refused:
    return Refused(Failure(413, f"the body is larger than {MAX_BODY_BYTES} bytes"))


def _malformed(reason: str) -> Refused:
    return Refused(Failure(400, f"the body is not a JSON object: {reason}", code=_CODE))
