"""Sends ordinary requests from a process of its own, which prints a line for each event.

    python -m tests.faults.isolation.latency_probe GRPC HTTP NUM_STREAMS      until stdin closes

    ["begin", stream, moment]              a request is sent
    ["tokens", stream, moment, [ids]]      a message has come
    ["end", stream, moment, error or ""]   the answer is whole, or failed
    ["health", moment, seconds, status]    GET /health of the coordinator, on a new connection

Moments are of the monotonic clock, which all processes of a machine share. The process has its own
interpreter, so that sending an attack does not delay its measurements.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from coordinator.client import generate_request
from engine.pb.diptych.v1 import inference_pb2_grpc
from engine.rpc.channel import open_channel
from tests.support.paths import ROOT

NUM_TOKENS = 96
PROMPT = list(range(1000, 1040))  # two whole blocks, which travel, and a tail
HEALTH_S, HEALTH_TIMEOUT_S = 0.2, 10.0


# -- the process -----------------------------------------------------------------------------------


async def _main(address: str, http_address: str, num_streams: int) -> None:
    _raise_priority()
    over = asyncio.Event()
    loop = asyncio.get_running_loop()

    def wait_for_end() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(over.set)

    threading.Thread(target=wait_for_end, daemon=True).start()
    async with open_channel(address, ("grpc.enable_retries", 0)) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        work = [_ask(stub, over, stream) for stream in range(num_streams)]
        await asyncio.gather(*work, _poll(http_address, over))


def _raise_priority() -> None:
    """Measure as a caller on another machine does: without a wait for this one's cores."""
    with suppress(OSError):  # not root
        os.nice(-10)
        Path("/proc/self/autogroup").write_text("-10")  # where cores are shared by session


def _report(*line: object) -> None:
    print(json.dumps(line), flush=True)


async def _ask(stub: Any, over: asyncio.Event, stream: int) -> None:
    for number in itertools.count():
        request = generate_request(
            PROMPT,
            request_id=f"probe-{stream}-{number}-{time.monotonic_ns()}",
            cache_salt=f"{time.monotonic_ns()}-{stream}",
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
            temperature=0.8,
            seed=stream,
        )
        _report("begin", stream, time.monotonic())
        error = ""
        try:
            async for response in stub.Generate(request, timeout=120):
                if ids := list(response.delta.token_ids):
                    _report("tokens", stream, time.monotonic(), ids)
        except grpc.RpcError as failed:
            error = f"{failed.code().name}: {failed.details()}"  # type: ignore[attr-defined]
        _report("end", stream, time.monotonic(), error)
        if over.is_set():
            return
        if error:
            await asyncio.sleep(0.2)


async def _poll(http_address: str, over: asyncio.Event) -> None:
    host, _, port = http_address.rpartition(":")
    while not over.is_set():
        begun_s = time.monotonic()
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                status = await _health(host, int(port))
        except (OSError, TimeoutError) as error:
            status = type(error).__name__
        _report("health", begun_s, time.monotonic() - begun_s, status)
        await asyncio.sleep(HEALTH_S)


async def _health(host: str, port: int) -> str:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(
            f"GET /health HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode()
        )
        line = await reader.readline()
        return line.decode().split(" ")[1] if line else "closed"
    finally:
        writer.close()


# -- in the test ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gap:
    """Between two messages of one answer; `end_s` is infinite where the next is not here yet."""

    begin_s: float
    end_s: float

    def overlaps(self, begin_s: float, end_s: float) -> bool:
        """Whether a part of it lies within."""
        return self.end_s > begin_s and self.begin_s < end_s


@dataclass
class _Answer:
    begun_s: float
    moments: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ended_s: float | None = None
    error: str = ""


class LatencyProbe:
    """The process and its events. A context manager."""

    def __init__(self, address: str, http_address: str, num_streams: int) -> None:
        self._command = [sys.executable, "-m", __name__, address, http_address, str(num_streams)]
        self._lock = threading.Lock()
        self._answers: list[list[_Answer]] = [[] for _ in range(num_streams)]
        self.health: list[tuple[float, float, str]] = []  # (moment, seconds, status)

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30 if error is None else 1)
        except subprocess.TimeoutExpired:  # `wrong` and `gaps` show what is missing
            self._process.kill()
            self._process.wait()
        finally:
            self._reader.join(10)

    def gaps(self) -> list[Gap]:
        """Between the messages of all answers, the one that is under way included."""
        with self._lock:
            return [gap for answers in self._answers for a in answers for gap in _gaps_of(a)]

    def first_tokens(self) -> list[Gap]:
        """From a request to its first token."""
        with self._lock:
            answers = [a for stream in self._answers for a in stream]
            return [
                Gap(a.begun_s, a.moments[0] if a.moments else a.ended_s or math.inf)
                for a in answers
            ]

    def num_answers(self) -> int:
        """How many are whole, of the stream that has fewest."""
        with self._lock:
            return min(sum(a.ended_s is not None for a in stream) for stream in self._answers)

    def wrong(self) -> list[str]:
        """Answers that failed, or whose tokens differ from the first one's of their stream."""
        found = []
        with self._lock:
            for i, stream in enumerate(self._answers):
                for answer in stream:
                    if answer.error:
                        found.append(f"stream {i}: {answer.error}")
                    elif answer.ended_s is None:
                        found.append(f"stream {i}: an answer does not end")
                    elif answer.tokens != stream[0].tokens[: len(answer.tokens)]:
                        found.append(f"stream {i}: other tokens: {answer.tokens}")
                    elif len(answer.tokens) != NUM_TOKENS:
                        found.append(f"stream {i}: {len(answer.tokens)} tokens")
        return found

    def _read(self) -> None:
        for line in self._lines():
            match line:
                case ["begin", stream, moment]:
                    self._answers[stream].append(_Answer(moment))
                case ["tokens", stream, moment, ids]:
                    answer = self._answers[stream][-1]
                    answer.moments.append(moment)
                    answer.tokens += ids
                case ["end", stream, moment, error]:
                    answer = self._answers[stream][-1]
                    answer.ended_s, answer.error = moment, error
                case ["health", moment, seconds, status]:
                    self.health.append((moment, seconds, status))

    def _lines(self) -> Iterator[list[Any]]:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = json.loads(raw)
            with self._lock:
                yield line


def _gaps_of(answer: _Answer) -> list[Gap]:
    gaps = [Gap(a, b) for a, b in itertools.pairwise(answer.moments)]
    if answer.moments and answer.ended_s is None:
        gaps.append(Gap(answer.moments[-1], math.inf))
    return gaps


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
