"""Refuses a gRPC client that dials an HTTP port, with a message that names the gRPC port.

Without it such a client only sees that the connection closes. This is a minimal HTTP/2 server
(RFC 9113): it reads no headers, and ends each stream with the same trailers, after the stream's
first message, because a client that gets trailers while it writes replaces the status. Pure: bytes
in, bytes out.
"""

from __future__ import annotations

import string
from urllib.parse import quote

_UNQUOTED = string.punctuation.replace("%", " ")  # in a status message of gRPC
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS, _PING = 0, 1, 4, 6
_ACK, _END_STREAM, _END_HEADERS = 1, 1, 4
_FRAME_HEADER = 9
_MAX_FRAME = 1 << 14
_MAX_OPEN = 1000
_FAILED_PRECONDITION = b"9"
_STATUS_200, _CONTENT_TYPE = b"\x88", b"\x0f\x10"  # indices of HPACK's static table (RFC 7541)


class GrpcRefusal:
    """One connection of a gRPC client; all of its calls fail with `message`."""

    def __init__(self, message: str) -> None:
        fields = (
            (b"grpc-status", _FAILED_PRECONDITION),
            (b"grpc-message", quote(message, safe=_UNQUOTED).encode()),
        )
        self._trailers = _STATUS_200 + _CONTENT_TYPE + _text(b"application/grpc")
        self._trailers += b"".join(b"\0" + _text(name) + _text(value) for name, value in fields)
        self._unread = b""
        self._has_begun = False
        self._open: set[int] = set()  # streams without their first message yet

    def take(self, data: bytes) -> bytes | None:
        """Read bytes; returns the bytes to send, or None if the client does not speak HTTP/2."""
        self._unread += data
        out = b""
        if not self._has_begun:
            if not PREFACE.startswith(self._unread[: len(PREFACE)]):
                return None
            if len(self._unread) < len(PREFACE):
                return b""
            self._unread = self._unread[len(PREFACE) :]
            self._has_begun = True
            out = _frame(_SETTINGS, 0, 0, b"")
        while len(self._unread) >= _FRAME_HEADER:
            length = int.from_bytes(self._unread[:3], "big")
            if length > _MAX_FRAME or len(self._open) > _MAX_OPEN:
                return None
            end = _FRAME_HEADER + length
            if len(self._unread) < end:
                break
            out += self._response(self._unread[:end])
            self._unread = self._unread[end:]
        return out

    def _response(self, frame: bytes) -> bytes:
        kind, flags = frame[3], frame[4]
        stream = int.from_bytes(frame[5:9], "big") & 0x7FFFFFFF
        if kind == _SETTINGS and not flags & _ACK:
            return _frame(_SETTINGS, _ACK, 0, b"")
        if kind == _PING and not flags & _ACK:
            return _frame(_PING, _ACK, 0, frame[_FRAME_HEADER:])
        if kind == _HEADERS and stream and not flags & _END_STREAM:
            self._open.add(stream)
        elif (kind == _HEADERS and stream) or (kind == _DATA and stream in self._open):
            self._open.discard(stream)
            return _frame(_HEADERS, _END_STREAM | _END_HEADERS, stream, self._trailers)
        return b""


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return (
        len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload
    )


def _text(value: bytes) -> bytes:
    """An HPACK string: its length as an integer with a 7-bit prefix, and its bytes."""
    if len(value) < 127:
        return bytes((len(value),)) + value
    rest, length = len(value) - 127, b"\x7f"
    while rest >= 128:
        length += bytes((rest % 128 + 128,))
        rest //= 128
    return length + bytes((rest,)) + value
