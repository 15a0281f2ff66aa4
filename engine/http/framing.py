"""Strict framing of HTTP/1.1 requests, against request smuggling.

If a proxy and a server disagree about the end of a request, a client can smuggle a second request
past the proxy's rules. h11 accepts several forms that other programs read in another way. Here each
of them is an error, and the connection is closed:

    Content-Length beside Transfer-Encoding, or more than once, or as a list
    Transfer-Encoding in HTTP/1.0; a version that is not 1.x
    a line of the head or of the trailers that ends in a bare LF, or continues the line before
    a target that is not a path; CONNECT, after which h11 reads no further requests
    a chunk line with anything but a hexadecimal size and a short, printable extension
    a chunked body with more bytes in chunk lines than its data justifies

h11 itself refuses a signed length, a space before a colon, NUL, unknown codings and two lengths.
"""

from __future__ import annotations

import re

import h11
from h11._receivebuffer import ReceiveBuffer

_CHUNK_LINE = re.compile(rb"[0-9a-fA-F]{1,16}(;[\t\x20-\x7e\x80-\xff]{0,255})?\r\n")
_MAX_CHUNK_LINE = 512  # bytes that may arrive without the end of a chunk line
_MAX_EXCESS = 16 * 1024  # bytes of chunk lines beyond one for each _DATA_PER_LINE_BYTE of data
_DATA_PER_LINE_BYTE = 8  # chunks of 56 bytes or more never exceed it


class Connection(h11.Connection):
    """The server side of one h11 connection, strict. `refused`: the reason if it was refused."""

    def __init__(self, max_head_bytes: int) -> None:
        super().__init__(h11.SERVER, max_head_bytes)
        self._receive_buffer: ReceiveBuffer = _Buffer()
        self.refused = ""

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """The next event. Raises h11.RemoteProtocolError."""
        try:
            return super().next_event()
        except h11.RemoteProtocolError as error:
            self.refused = self.refused or str(error)[:200]
            raise

    def _extract_next_receive_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        event = super()._extract_next_receive_event()
        if isinstance(event, h11.Request):
            _check(event)
        return event


def _check(request: h11.Request) -> None:
    """Raise LocalProtocolError, which h11 converts to RemoteProtocolError."""
    names = {name for name, _ in request.headers}
    if not request.http_version.startswith(b"1."):
        raise h11.LocalProtocolError("HTTP version: expected 1.0 or 1.1")
    is_path = request.target.startswith(b"/") or request.target == b"*"
    if not is_path or request.method == b"CONNECT":
        raise h11.LocalProtocolError("request target: expected a path; this is no proxy")
    if b"transfer-encoding" in names:
        if b"content-length" in names:
            raise h11.LocalProtocolError("Transfer-Encoding and Content-Length: expected one")
        if request.http_version == b"1.0":
            raise h11.LocalProtocolError("Transfer-Encoding: not part of HTTP/1.0")


class _Buffer(ReceiveBuffer):
    """Checks lines before h11 normalizes them."""

    def __init__(self) -> None:
        super().__init__()
        self._excess = 0.0

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """The lines of a head or of trailers, once all have arrived."""
        size = len(self)
        lines = super().maybe_extract_lines()
        if lines is None:
            return None
        if size - len(self) != sum(len(line) + 2 for line in lines) + 2:  # each without its CRLF
            raise h11.LocalProtocolError("a line that ends in LF without CR")
        lengths = []
        for line in lines:
            if line.startswith((b" ", b"\t")):
                raise h11.LocalProtocolError("a line that continues the one before it")
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                lengths.append(value)
        if len(lengths) > 1 or any(b"," in value for value in lengths):
            raise h11.LocalProtocolError("Content-Length: expected one number, once")
        return lines

    def maybe_extract_next_line(self) -> bytearray | None:
        """The line before a chunk, once it has arrived."""
        line = super().maybe_extract_next_line()
        if line is None:
            if len(self) > _MAX_CHUNK_LINE:
                raise h11.LocalProtocolError("a chunk's line that is too long")
            return None
        if not _CHUNK_LINE.fullmatch(line):
            raise h11.LocalProtocolError("illegal chunk size")
        size = int(line.partition(b";")[0], 16)
        excess = self._excess + len(line) + 2 - size / _DATA_PER_LINE_BYTE
        self._excess = max(0.0, excess) if size else 0.0
        if self._excess > _MAX_EXCESS:
            raise h11.LocalProtocolError("chunks that are too small: more lines than data")
        return line
