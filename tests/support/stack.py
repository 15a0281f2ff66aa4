"""A real stack for tests: `coordinator start` with local workers on free ports, ended by the
test that began it.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from coordinator.client import Client, Done, TextDelta
from engine.base.errors import DiptychError
from engine.kernels import kernels
from engine.pb.diptych.v1 import admin_pb2, inference_pb2_grpc
from engine.rpc.channel import open_channel
from engine.rpc.local_token import local_token
from tests.support.http_get import http_get
from tests.support.paths import ROOT
from tests.support.timeouts import CLUSTER, Timeouts

# A stack in which every answer is that of fp32; 512 MiB hold 728 blocks.
EXACT = ("--dtype", "float32", "--kv-cache-memory", "512MiB", "--max-model-len", "2048")
# The same for shared stacks: a request waits as long as a worker's restart takes on a busy machine.
SHARED = (*EXACT, *Timeouts(worker_wait_s=60.0).stack_flags)
DEFAULT = ("--max-model-len", "2048")  # what `coordinator start` does, with our kernels on a CPU
# The fastest in which an answer has the same tokens in any batch. fp32 takes five times as long.
QUICK = EXACT if kernels() is None else DEFAULT
_MAX_SHARED = 3
_SAMPLE = re.compile(r"(?P<name>\w+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def until(check: Callable[[], bool], timeout_s: float, what: str, interval_s: float = 0.05) -> None:
    """Poll; fails the test when the time is over."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(interval_s)


def metrics_of(http_address: str) -> dict[str, float]:
    """Samples of /metrics: `name` (labels summed) and, for each label, `name{label=value}`."""
    found: dict[str, float] = {}
    for line in http_get(f"http://{http_address}/metrics").text.splitlines():
        if match := _SAMPLE.match(line):
            name, value = match["name"], float(match["value"])
            labels = _LABEL.findall(match["labels"] or "")
            for key in (name, *(f"{name}{{{label}={text}}}" for label, text in labels)):
                found[key] = found.get(key, 0.0) + value
    return found


class Stack:
    """One coordinator and its local workers. Use as a context manager."""

    def __init__(
        self, folder: Path, *flags: str, prefill: int = 1, decode: int = 1, wait: bool = True
    ) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{free_port()}"
        self.http_address = f"127.0.0.1:{free_port()}"
        self.num_workers = prefill + decode
        self._wait = wait
        self._started = False
        self.command = [
            *(sys.executable, "-m", "coordinator.cli", "start"),
            *("--listen", self.address, "--http", self.http_address),
            *("--prefill-workers", str(prefill), "--decode-workers", str(decode)),
            *("--log-dir", str(folder), "--log-format", "json", *flags),
        ]

    def __enter__(self) -> Self:
        """Start it, unless `start` has."""
        return self if self._started else self.start()

    def start(self) -> Self:
        """Start the coordinator, and wait until the workers are ready where `wait` is set."""
        self._started = True
        self._log = (self.folder / "coordinator.log").open("wb")
        self.process = subprocess.Popen(
            self.command, stdout=self._log, stderr=self._log, cwd=ROOT, start_new_session=True
        )
        self.client = Client(self.address)
        if self._wait:
            try:
                self.until_ready()
            except BaseException:
                self.__exit__(None, None, None)
                raise
        return self

    def until_ready(self) -> None:
        """Wait until all workers are ready."""
        until(self.ready, CLUSTER.start_s, "the stack is ready", 0.1)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.stop()
        finally:
            if error is not None:
                self.print_logs()

    def stop(self) -> None:
        """End the coordinator, and check that its workers end with it."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()
        until(lambda: not self.pids(), 10, "no process of the stack is left")

    def ready(self) -> bool:
        """Whether all workers are; fails when the coordinator has ended."""
        if self.process.poll() is not None:
            self.print_logs()
            raise AssertionError(f"the coordinator has ended with {self.process.returncode}")
        workers = self.workers()
        return sum(w.state == "ready" for w in workers) == self.num_workers

    def workers(self, role: str = "") -> list[admin_pb2.Worker]:
        """What ListWorkers lists; nothing while the coordinator does not answer."""
        try:
            workers = self.client.workers(timeout_s=5)
        except (DiptychError, grpc.RpcError):
            return []
        return [w for w in workers if role in ("", w.role)]

    def pids(self, name: str = "") -> list[int]:
        """Processes of this stack: those with its log folder or address in their command line."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and self.address in command and name in command:
                    found.append(int(entry.name))
        return found

    @property
    def operator(self) -> dict[str, str]:
        """Headers of an operator's HTTP request to any process of the stack."""
        token = local_token(self.address)
        assert token is not None
        return dict(token.metadata)

    def token_flag(self) -> str:
        """How a local worker was given the cluster's secret: for one from outside."""
        words = Path(f"/proc/{self.pids('decode-0')[0]}/cmdline").read_text().split("\0")
        return next(word for word in words if word.startswith("--cluster-token-file="))

    def pid_of(self, worker_id: str) -> int:
        """The process that is this worker now."""
        (pid,) = self.pids(worker_id)
        return pid

    def logs(self) -> dict[str, str]:
        """Log files by name."""
        return {p.stem: p.read_text(errors="replace") for p in sorted(self.folder.glob("*.log"))}

    def print_logs(self) -> None:
        for name, text in self.logs().items():
            print(f"----- {name}\n" + "\n".join(text.splitlines()[-60:]))

    def generate(
        self, prompt: str | Sequence[int], timeout_s: float = 120, **options: Any
    ) -> tuple[list[int], str, Done]:
        """One whole answer: token ids, text, end."""
        token_ids: list[int] = []
        text = ""
        for event in self.client.generate(prompt, timeout_s=timeout_s, **options):
            if isinstance(event, TextDelta):
                token_ids += event.token_ids
                text += event.text
            elif isinstance(event, Done):
                return token_ids, text, event
        raise AssertionError("an answer without an end")

    def metrics(self, role: str) -> dict[str, float]:
        """Samples of all workers of a role, summed."""
        total: dict[str, float] = {}
        for worker in self.workers(role):
            for key, value in metrics_of(worker.http_address).items():
                total[key] = total.get(key, 0.0) + value
        return total

    def assert_at_rest(self, timeout_s: float = 10.0) -> None:
        """Every pool: free + cached = total, held = 0, and nothing runs or waits."""

        def rest() -> bool:
            workers = self.workers()
            return len(workers) == self.num_workers and all(
                w.held_blocks == w.num_running == w.num_waiting == 0
                and w.free_blocks + w.cached_blocks == w.total_blocks > 0
                for w in workers
            )

        until(rest, timeout_s, "every pool is at rest", 0.2)


class SharedStacks:
    """Running stacks for tests that only send requests, one for each set of flags and pools.

    Every user leaves its stack ready and at rest. At most `_MAX_SHARED` run at a time, for a worker
    in fp32 has about 1 GB: the one that was used longest ago is ended first.
    """

    def __init__(self, new_folder: Callable[[], Path]) -> None:
        self._new_folder = new_folder
        self._running: dict[tuple[object, ...], Stack] = {}  # the least recently used first

    def get(self, *flags: str, prefill: int = 1, decode: int = 1) -> Stack:
        """A stack with these flags, ready and at rest. The pool ends it."""
        key = (flags, prefill, decode)
        stack = self._running.pop(key, None)
        if stack is None:
            while len(self._running) >= _MAX_SHARED:
                self._running.pop(next(iter(self._running))).stop()
            stack = Stack(self._new_folder(), *flags, prefill=prefill, decode=decode).start()
        else:
            until(stack.ready, 60, "the shared stack is ready")
            stack.assert_at_rest()
        self._running[key] = stack
        return stack

    def close(self) -> None:
        """End all of them; raises the first failure at the end."""
        with contextlib.ExitStack() as ends:
            for stack in self._running.values():
                ends.callback(stack.stop)
        self._running.clear()


def stub(address: str) -> tuple[grpc.aio.Channel, Any]:
    """A channel and the public stub, for asyncio."""
    channel = open_channel(address)
    return channel, inference_pb2_grpc.InferenceServiceStub(channel)
