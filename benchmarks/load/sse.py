"""Server-sent events over HTTP/1.1, parsed incrementally from bytes.

A full HTTP client would take more time per token than some of the measured servers.

    bytes --> [head] --> [chunk sizes, if chunked] --> lines --> payloads of "data:" lines
"""

from __future__ import annotations

_END = b"[DONE]"


class HttpError(Exception):
    """The response is not a stream of events."""


class EventParser:
    """Parses the bytes of one response into the payloads of its complete events."""

    def __init__(self) -> None:
        self.status = 0
        self.done = False  # the stream said that it is complete
        self._chunked = False
        self._in_head = True
        self._raw = b""  # not yet understood, as it came from the socket
        self._left = 0  # bytes of the current chunk still to come, its line end included
        self._body = b""  # a line that has not ended yet

    def feed(self, data: bytes) -> list[bytes]:
        """Payloads that these bytes complete. Raises HttpError if this is no event stream."""
        self._raw += data
        if self._in_head and not self._read_head():
            return []
        body = self._take_body()
        if self.status != 200:
            self._body += body
            return []
        return self._events(body)

    def close(self) -> None:
        """The connection has ended. Raises HttpError if that was too early."""
        if self.status != 200:
            text = self._body[:300].decode(errors="replace")
            raise HttpError(f"HTTP status {self.status}: {text}")
        if not self.done:
            raise HttpError("the stream ended early")

    def _read_head(self) -> bool:
        head, end, rest = self._raw.partition(b"\r\n\r\n")
        if not end:
            return False
        first, *fields = head.split(b"\r\n")
        parts = first.split(b" ", 2)
        if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
            raise HttpError(f"not an HTTP response: {first[:80]!r}")
        self.status = int(parts[1])
        headers = {
            k.strip().lower(): v.strip().lower() for k, _, v in (f.partition(b":") for f in fields)
        }
        self._chunked = b"chunked" in headers.get(b"transfer-encoding", b"")
        self._in_head, self._raw = False, rest
        return True

    def _take_body(self) -> bytes:
        """What has come of the body, without the chunks' framing."""
        if not self._chunked:
            body, self._raw = self._raw, b""
            return body
        parts = []
        while self._raw:
            if self._left == 0:
                line, end, rest = self._raw.partition(b"\r\n")
                if not end:
                    break
                self._left, self._raw = int(line.split(b";")[0], 16) + 2, rest
            data = self._raw[: self._left]
            content = self._left - 2  # the rest is the chunk's line end
            parts.append(data[: max(content, 0)])
            self._left -= len(data)
            self._raw = self._raw[len(data) :]
        return b"".join(parts)

    def _events(self, body: bytes) -> list[bytes]:
        *lines, self._body = (self._body + body).split(b"\n")
        events = []
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == _END:
                self.done = True
            elif payload:
                events.append(payload)
        return events
