"""How the suite's attacks are sent, and how they end: (code, field) of each.

gRPC: the status's name and the field of its BadRequest. HTTP: "HTTP 400" and `error.param`.
"" is the field of what names none, and of an answer.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from engine.rpc.channel import CHANNEL_OPTIONS
from engine.rpc.status import DETAILS_KEY
from tests.support import http2
from tests.support.http2 import RawConnection, connect, frame

DEADLINE_S = 60.0
SERVICE = "/diptych.v1.InferenceService/"
OPTIONS = [
    *((k, v) for k, v in CHANNEL_OPTIONS if k != "grpc.max_send_message_length"),
    # Callers are of different machines: none shares, or loses, another one's connection.
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclass(frozen=True, slots=True)
class End:
    """How one request of an attack ended."""

    code: str
    field: str = ""
    message: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.code} {self.field} ({self.message[:120]}) after {self.seconds:.2f} s"


@dataclass(frozen=True, slots=True)
class Target:
    """Where a coordinator listens."""

    address: str
    http_address: str


Send = Callable[[Target], list[End]]


def call(target: Target, method: str, request: Message, timeout_s: float = DEADLINE_S) -> End:
    """One gRPC call on a connection of its own, its answer read to the end."""
    begun_s = time.monotonic()
    options = (*OPTIONS, ("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0))
    with grpc.insecure_channel(target.address, options=options) as channel:
        try:
            if method in ("Generate", "Chat"):
                stream = channel.unary_stream(SERVICE + method)
                for _ in stream(request.SerializeToString(), timeout=timeout_s):
                    pass
            else:
                channel.unary_unary(SERVICE + method)(
                    request.SerializeToString(), timeout=timeout_s
                )
        except grpc.RpcError as error:
            trailers = dict(error.trailing_metadata() or ())  # type: ignore[attr-defined]
            field = _field_of(trailers)
            code, details = error.code().name, error.details()  # type: ignore[attr-defined]
            return End(code, field, str(details), time.monotonic() - begun_s)
    return End("OK", seconds=time.monotonic() - begun_s)


def _field_of(trailers: dict[str, Any]) -> str:
    for detail in status_pb2.Status.FromString(trailers.get(DETAILS_KEY, b"")).details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            return str(bad.field_violations[0].field)
    return ""


def post(target: Target, path: str, body: bytes, timeout_s: float = DEADLINE_S) -> End:
    """One HTTP request on a connection of its own."""
    begun_s = time.monotonic()
    sock = begin_post(target, path, len(body))
    try:
        sock.settimeout(timeout_s)
        with suppress(OSError):  # the server may refuse what it has not read
            sock.sendall(body)
        return end_post(sock, begun_s)
    finally:
        sock.close()


def begin_post(target: Target, path: str, length: int) -> socket.socket:
    """The head of an HTTP request whose body is to come."""
    sock = connect(target.http_address, DEADLINE_S)
    head = f"POST {path} HTTP/1.1\r\nHost: {target.http_address}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    sock.sendall(head.encode())
    return sock


def end_post(sock: socket.socket, begun_s: float) -> End:
    """Its answer."""
    raw = bytearray()
    code = ""
    try:
        while more := sock.recv(65536):
            raw += more
    except TimeoutError:
        code = "no answer"
    except OSError:
        code = "reset"
    seconds = time.monotonic() - begun_s
    head, _, body = bytes(raw).partition(b"\r\n\r\n")
    if not raw:
        return End(code or "closed", seconds=seconds)
    status = head.split(b" ", 2)[1].decode()
    error: dict[str, Any] = {}
    with suppress(ValueError, AttributeError):
        error = json.loads(_unchunked(head, body)).get("error") or {}
    field = error.get("param") or ""
    return End(f"HTTP {status}", field, str(error.get("message", "")), seconds)


def _unchunked(head: bytes, body: bytes) -> bytes:
    if b"chunked" not in head.lower():
        return body
    out = bytearray()
    while body:
        size, _, body = body.partition(b"\r\n")
        out += body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]
    return bytes(out)


def together(num: int, send: Callable[[int], End | list[End]]) -> list[End]:
    """`send(i)` from `num` callers at once."""
    ends: list[End] = []
    with ThreadPoolExecutor(num) as pool:
        for end in pool.map(send, range(num)):
            ends += end if isinstance(end, list) else [end]
    return ends


def unfinished_message(target: Target, num_bytes: int, keep_s: float) -> End:
    """A gRPC message of which all but the last byte is sent; then the call is silent for `keep_s`.

    Ends with "cut off" where the server ends the stream or connection, else with "kept".
    """
    begun_s = time.monotonic()
    sender = _Sender(target.address)
    try:
        sender.send(http2.grpc_message(b"", length=num_bytes) + b"\x00" * (num_bytes - 1))
        over = sender.over or sender.wait_for_end(keep_s)
    except OSError:
        over = True
    finally:
        sender.raw.sock.close()
    return End("cut off" if over else "kept", seconds=time.monotonic() - begun_s)


class _Sender:
    """One call whose message is sent within the peer's windows."""

    _STALL_S = 3.0  # the peer gives no room: it reads no more

    def __init__(self, address: str) -> None:
        self.raw = RawConnection(address)
        self.raw.begin()
        self.over = False
        self._room = [65535, 65535]  # of the connection, of the stream
        self._largest = 16384
        self._initial = 65535  # a stream's window, as the peer last set it
        self._stream = self.raw.open_stream(b"/diptych.v1.InferenceService/Generate")

    def send(self, body: bytes) -> None:
        """As much of `body` as the peer takes."""
        view, at = memoryview(body), 0
        stalled_s = time.monotonic()
        while at < len(body) and not self.over:
            size = min(self._largest, len(body) - at, *self._room)
            if size > 0:
                self.raw.send(frame(http2.DATA, 0, self._stream, bytes(view[at : at + size])))
                at += size
                self._room = [room - size for room in self._room]
                stalled_s = time.monotonic()
            elif time.monotonic() - stalled_s > self._STALL_S:
                return
            else:
                self._read(0.1)

    def wait_for_end(self, timeout_s: float) -> bool:
        """Whether the peer ends the stream in time."""
        deadline = time.monotonic() + timeout_s
        while not self.over and (left := deadline - time.monotonic()) > 0:
            self._read(min(left, 0.5))
        return self.over

    def _read(self, timeout_s: float) -> None:
        """Frames up to the first one that gives room."""
        for found in self.raw.read_frames(timeout_s):
            if found.kind == http2.WINDOW_UPDATE:
                self._room[found.stream != 0] += int.from_bytes(found.payload, "big")
                return
            if found.kind == http2.SETTINGS:
                for i in range(0, len(found.payload), 6):
                    key = int.from_bytes(found.payload[i : i + 2], "big")
                    value = int.from_bytes(found.payload[i + 2 : i + 6], "big")
                    if key == http2.INITIAL_WINDOW_SIZE:
                        self._room[1] += value - self._initial
                        self._initial = value
                    elif key == http2.MAX_FRAME_SIZE:
                        self._largest = value
            elif found.kind == http2.GOAWAY or (found.ends_stream and found.stream == self._stream):
                self.over = True
                return
