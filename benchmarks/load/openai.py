"""Requests to an OpenAI `/v1/completions` endpoint, streamed.

`token_ids`, or usage in every chunk, gives the number of tokens of a message; with neither, a
message is one token. Tokens that only the last usage counts are added to the last message: text of
several tokens can become printable together.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from benchmarks.load.sse import EventParser, HttpError
from benchmarks.plan import Endpoint, Record

_READ_BYTES = 1 << 16


class OpenAiApi:
    """One connection a request."""

    def __init__(self, endpoint: Endpoint, started_s: float) -> None:
        host, _, port = endpoint.address.rpartition(":")
        self._host, self._port = host, int(port)
        self._endpoint = endpoint
        self._started_s = started_s

    async def run(self, record: Record, prompt: tuple[int, ...], max_tokens: int) -> None:
        """Play one request into `record`. Raises HttpError, OSError or ValueError."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(request_bytes(self._endpoint, prompt, max_tokens))
            parser, reading = EventParser(), Reading(record)
            while data := await reader.read(_READ_BYTES):
                at_s = time.monotonic() - self._started_s
                if payloads := parser.feed(data):
                    reading.take(at_s, payloads)
                if parser.done:
                    break
            parser.close()
            reading.finish()
        finally:
            writer.close()

    async def close(self) -> None:
        """Do nothing: no connection stays open between requests."""


def request_bytes(endpoint: Endpoint, prompt: tuple[int, ...], max_tokens: int) -> bytes:
    """One POST, greedy and without an early end."""
    body = {
        "model": endpoint.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **endpoint.extra,
    }
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\n"
        f"Host: {endpoint.address}\r\n"
        "Content-Type: application/json\r\n"
        "Accept: text/event-stream\r\n"
        f"Content-Length: {len(content)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + content


class Reading:
    """Adds the chunks of one answer to its record."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._counted = 0
        self._text: list[str] = []

    def take(self, at_s: float, payloads: list[bytes]) -> None:
        """Chunks that came together count as one message."""
        count = sum(self._tokens(json.loads(payload)) for payload in payloads)
        self._counted += count
        self._record.arrive(at_s, count)

    def finish(self) -> None:
        """Add the tokens that no message accounted for to the last one."""
        record = self._record
        record.text = "".join(self._text)
        missing = record.completion_tokens - self._counted
        if record.counts and missing > 0:
            record.counts[-1] += missing
        record.completion_tokens = record.completion_tokens or self._counted

    def _tokens(self, chunk: dict[str, Any]) -> int:
        if error := chunk.get("error"):
            raise HttpError(str(error)[:300])
        record, count = self._record, 0
        for choice in chunk.get("choices") or ():
            text = choice.get("text") or ""
            ids = choice.get("token_ids")
            count += len(ids) if ids is not None else bool(text)
            self._text.append(text)
            record.finish_reason = choice.get("finish_reason") or record.finish_reason
        if usage := chunk.get("usage"):
            record.completion_tokens = usage.get("completion_tokens") or record.completion_tokens
            details = usage.get("prompt_tokens_details") or {}
            record.cached_tokens = details.get("cached_tokens") or record.cached_tokens
        if timings := chunk.get("timings"):  # llama.cpp
            record.draft_tokens = timings.get("draft_n") or 0
            record.accepted_tokens = timings.get("draft_n_accepted") or 0
        return count
