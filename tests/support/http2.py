"""A raw HTTP/2 client that misbehaves on purpose: frames by hand, and only the manners asked for.

    RawConnection -> begin() -> request() -> read_frames(), or silence, or a reset

Blocking sockets with a timeout on everything. Headers are HPACK literals without an index, so there
is no table to keep; the server's frames are read, not decoded: a test that needs a status asks by
a real gRPC client.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = 0x0, 0x1, 0x2, 0x3, 0x4
PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0x6, 0x7, 0x8, 0x9
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
HEADER_TABLE_SIZE, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 0x1, 0x3, 0x4
MAX_FRAME_SIZE = 0x5


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame as it came."""

    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def ends_stream(self) -> bool:
        """Whether nothing more comes on its stream."""
        return self.kind == RST_STREAM or (
            self.kind in (DATA, HEADERS) and bool(self.flags & END_STREAM)
        )


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """A frame's bytes."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def settings(values: dict[int, int] | None = None) -> bytes:
    """A SETTINGS frame."""
    pairs = (values or {}).items()
    return frame(SETTINGS, payload=b"".join(struct.pack(">HI", k, v) for k, v in pairs))


def _string(text: bytes) -> bytes:
    """An HPACK string without Huffman coding."""
    length = len(text)
    if length < 127:
        return bytes([length]) + text
    out, length = bytearray([127]), length - 127
    while length >= 128:
        out.append(length % 128 + 128)
        length //= 128
    out.append(length)
    return bytes(out) + text


def header_block(*pairs: tuple[bytes, bytes]) -> bytes:
    """Literal header fields, never indexed."""
    return b"".join(b"\x00" + _string(name) + _string(value) for name, value in pairs)


def call_headers(path: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """What a gRPC client sends first."""
    return header_block(
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        *more,
    )


def grpc_message(raw: bytes, *, length: int | None = None, compressed: bool = False) -> bytes:
    """A message with its gRPC prefix; `length` lies about its size."""
    return struct.pack(">BI", compressed, len(raw) if length is None else length) + raw


def connect(address: str, timeout_s: float = 5.0) -> socket.socket:
    """A TCP connection."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout_s)


def reset(sock: socket.socket) -> None:
    """Close so that the peer gets a RST, not a FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def closed_by_peer(sock: socket.socket, timeout_s: float) -> bool:
    """Whether the peer ends the connection in time; what it sends meanwhile is dropped."""
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        sock.settimeout(left)
        try:
            if not sock.recv(65536):
                return True
        except TimeoutError:
            return False
        except OSError:
            return True
    return False


class RawConnection:
    """One connection. `polite`: pings and settings are acknowledged while frames are read."""

    def __init__(self, address: str, *, polite: bool = True) -> None:
        self.sock = connect(address)
        self._polite = polite
        self._buffer = bytearray()
        self._next_stream = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.sock.close()

    def begin(self, values: dict[int, int] | None = None) -> None:
        """Preface and settings."""
        self.sock.sendall(PREFACE + settings(values))

    def send(self, raw: bytes) -> None:
        """Bytes as they are."""
        self.sock.sendall(raw)

    def open_stream(self, path: bytes, *more: tuple[bytes, bytes], end: bool = False) -> int:
        """The headers of a call; returns its stream."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        flags = END_HEADERS | (END_STREAM if end else 0)
        self.send(frame(HEADERS, flags, stream, call_headers(path, *more)))
        return stream

    def request(self, path: bytes, raw: bytes, *more: tuple[bytes, bytes]) -> int:
        """A whole call with one (small) message; returns its stream."""
        stream = self.open_stream(path, *more)
        self.send(frame(DATA, END_STREAM, stream, grpc_message(raw)))
        return stream

    def read_frames(self, timeout_s: float) -> Iterator[Frame]:
        """Frames until the peer closes or the time is over."""
        deadline = time.monotonic() + timeout_s
        while True:
            while found := self._take():
                if self._polite:
                    self._acknowledge(found)
                yield found
            left = deadline - time.monotonic()
            if left <= 0:
                return
            self.sock.settimeout(left)
            try:
                more = self.sock.recv(65536)
            except TimeoutError:
                return
            except OSError:
                more = b""
            if not more:
                return
            self._buffer += more

    def wait_for_end(self, stream: int, timeout_s: float) -> bool:
        """Whether the peer ends `stream` (or the connection) in time."""
        for found in self.read_frames(timeout_s):
            if found.stream == stream and found.ends_stream:
                return True
            if found.kind == GOAWAY:
                return True
        return self.closed(0.1)

    def closed(self, timeout_s: float) -> bool:
        """Whether the peer has closed the connection."""
        return closed_by_peer(self.sock, timeout_s)

    def reset(self) -> None:
        """Vanish with a RST."""
        reset(self.sock)

    def _take(self) -> Frame | None:
        if len(self._buffer) < 9:
            return None
        length = int.from_bytes(self._buffer[:3], "big")
        if len(self._buffer) < 9 + length:
            return None
        kind, flags, stream = struct.unpack(">BBI", bytes(self._buffer[3:9]))
        payload = bytes(self._buffer[9 : 9 + length])
        del self._buffer[: 9 + length]
        return Frame(kind, flags, stream & 0x7FFFFFFF, payload)

    def _acknowledge(self, found: Frame) -> None:
        try:
            if found.kind == SETTINGS and not found.flags & ACK:
                self.send(frame(SETTINGS, ACK))
            elif found.kind == PING and not found.flags & ACK:
                self.send(frame(PING, ACK, payload=found.payload))
        except OSError:
            pass  # the reader will see that the peer has gone
