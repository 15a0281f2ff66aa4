"""`make demo`: starts the whole stack on this machine, generates one output, prints a summary.

It runs `coordinator start` on free ports, uses only the public API, and ends all processes. The
output of the starting stack is shown. A slow start may continue while it makes progress (log lines,
CPU time). Ctrl-C ends the stack in order.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from types import FrameType

import grpc
from rich.console import Console
from rich.table import Table

from coordinator.client import Client, Done, TextDelta, describe
from engine.base.errors import ConfigError, DiptychError
from engine.base.options import child_environment, state_dir
from engine.pb.diptych.v1 import admin_pb2
from engine.telemetry.progress import LINE_S, Progress

# The first start compiles kernels and converts the model, which takes long on a loaded machine. The
# demo gives up if the stack makes no progress, and at a limit that no start should reach.
_STILL_S = 120.0
_START_S = 3600.0
_OUTPUT_S = 600.0
_STOP_S = 20.0
_SETTLE_S = 5.0
_SILENT_S = 4.0  # after which a line with the elapsed time is shown
_MOVED_S = 0.1  # CPU time of progress: a process that only polls uses less
_QUESTION = (
    "A diptych is a pair of painted panels joined by a hinge. Travellers folded it shut to protect "
    "the pictures, and opened it on a table to look at them side by side. The left panel often "
    "showed a saint and the right panel the patron of the work, so that the two "
    "seemed to look at each other. Explain in a few sentences what a diptych is "
    "and why its hinge matters."
)


def main() -> int:
    """Run the demo; returns the exit status."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _demo(Console(stderr=True))
    except ConfigError as error:
        print(f"demo: {error.message}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"demo: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _demo(console: Console) -> int:
    log_dir = state_dir() / "demo" / str(os.getpid())  # two demos may run at once
    log_dir.mkdir(parents=True, exist_ok=True)
    server, http = _free_address(), _free_address()
    # It ends with this process, kill -9 included; in its own session it gets no Ctrl-C.
    command = [sys.executable, "-m", "engine.process.parent_death", "--parent", str(os.getpid())]
    command += ["coordinator.cli", "start", "--listen", server]
    command += ["--http", http, "--log-dir", str(log_dir), "--log-format", "json"]
    print("Starting a coordinator, a prefill worker and a decode worker", flush=True)
    stack = _start(command, log_dir / "coordinator.log")
    try:
        with Client(server) as client:
            _wait_ready(client, stack, log_dir)
            done = _generate(client)
            workers = _at_rest(client)
        _summary(console, done, workers, log_dir)
    except (DiptychError, grpc.RpcError) as error:
        why = f"demo: {describe(error)}; logs in {log_dir}"
        console.print(why, highlight=False, soft_wrap=True)
        return 1
    finally:
        _end(stack)
    return 0


def _start(command: Sequence[str], log_path: Path) -> subprocess.Popen[bytes]:
    with log_path.open("wb") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=child_environment(), start_new_session=True
        )


def _end(stack: subprocess.Popen[bytes]) -> None:
    """End the stack in order; kill it if that takes long, or on another Ctrl-C."""
    try:
        stack.send_signal(signal.SIGTERM)
        stack.wait(_STOP_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        stack.kill()  # its workers end with it
        stack.wait()


def _free_address() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


def _wait_ready(client: Client, stack: subprocess.Popen[bytes], log_dir: Path) -> None:
    """Wait until a worker of each role is ready. Raises DiptychError."""
    deadline = time.monotonic() + _START_S
    output = StackOutput(log_dir / "coordinator.log", time.monotonic)
    stillness = Stillness(stack.pid, log_dir, time.monotonic)
    while True:
        output.show()
        if stack.poll() is not None:
            output.show()
            raise DiptychError(f"the stack ended: {output.last or 'no output'}")
        try:
            ready = {w.role for w in client.workers(timeout_s=2.0) if w.state == "ready"}
            if ready == {"prefill", "decode"}:
                return
        except DiptychError:
            pass
        if stillness.seconds() > _STILL_S:
            raise DiptychError(f"the stack has stood still for {_STILL_S:.0f} s")
        if time.monotonic() > deadline:
            raise DiptychError(f"the workers were not ready after {_START_S:.0f} s")
        time.sleep(0.2)


def _generate(client: Client) -> Done:
    """Stream one output to standard output."""
    print(f"> {_QUESTION}\n", flush=True)
    question = ({"role": "user", "content": _QUESTION},)
    events = iter(client.chat(question, timeout_s=_OUTPUT_S, max_tokens=160))
    with Progress("waiting for the first token", first_s=LINE_S):
        first = next(events)
    for event in chain([first], events):
        if isinstance(event, TextDelta):
            print(event.text, end="", flush=True)
        elif isinstance(event, Done):
            print("\n", flush=True)
            return event
    raise DiptychError("the output had no end")


def _at_rest(client: Client) -> Sequence[admin_pb2.Worker]:
    """The workers, once their last heartbeat reports no held blocks."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        workers = client.workers()
        moved = any(w.blocks_pulled for w in workers)
        if (moved and not any(w.held_blocks for w in workers)) or time.monotonic() > deadline:
            return workers
        time.sleep(0.1)


def _summary(
    console: Console, done: Done, workers: Sequence[admin_pb2.Worker], log_dir: Path
) -> None:
    usage, timing = done.usage, done.timing
    decode = [w for w in workers if w.role == "decode"]
    blocks, num_bytes = sum(w.blocks_pulled for w in decode), sum(w.bytes_pulled for w in decode)
    seconds = sum(w.pull_seconds for w in decode)
    speed = f", {num_bytes / seconds / 1e9:.2f} GB/s" if seconds else ""
    pace = (usage.completion_tokens - 1) / timing.decode if timing.decode else 0.0
    rate = usage.accepted_tokens / usage.draft_tokens if usage.draft_tokens else 0.0
    computed = sum(w.prompt_tokens_computed for w in workers)
    held = sum(w.held_blocks for w in workers)
    rows = (
        ("time to first token", f"{timing.first_token * 1000:.0f} ms"),
        ("output", f"{usage.completion_tokens} tokens, {pace:.1f} tokens/s"),
        ("prompt", f"{computed} tokens computed, {usage.cached_tokens} cached"),
        ("KV moved over NIXL", f"{blocks} blocks, {num_bytes / 2**20:.1f} MiB{speed}"),
        ("drafts", f"{usage.accepted_tokens} of {usage.draft_tokens} tokens accepted ({rate:.0%})"),
        ("stale reads", f"{sum(w.stale_reads for w in workers)}"),
        ("blocks still held", f"{held}"),
        ("logs", str(log_dir)),
    )
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        table.add_row(f"[bold]{name}[/bold]", value)
    console.print(table, soft_wrap=True)


class StackOutput:
    """Prints the lines of a coordinator's output that are no log lines.

    During silence it prints a line with the elapsed time.
    """

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self.last = ""
        self._clock = clock
        self._began_s = self._shown_s = clock()
        self._path = path
        self._num_read = 0
        self._rest = b""

    def show(self) -> None:
        """Print new lines."""
        new = self._path.read_bytes()[self._num_read :]
        self._num_read += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for raw in lines:
            line = raw.decode(errors="replace").strip()
            if line and not line.startswith("{"):
                self.last = line
                self._print(line)
        if self._clock() - self._shown_s >= _SILENT_S:
            self._print(f"starting, {self._clock() - self._began_s:.0f} s")

    def _print(self, line: str) -> None:
        self._shown_s = self._clock()
        print(f"  {line}", flush=True)


class Stillness:
    """Measures for how long no log has grown and no process of the stack has computed."""

    def __init__(self, pid: int, log_dir: Path, clock: Callable[[], float]) -> None:
        self._pid = pid
        self._log_dir = log_dir
        self._clock = clock
        self._moved_s = clock()
        self._seen = self._look()

    def seconds(self) -> float:
        """Seconds since the last progress."""
        size, cpu_s = self._look()
        if size != self._seen[0] or abs(cpu_s - self._seen[1]) > _MOVED_S:
            self._seen = size, cpu_s
            self._moved_s = self._clock()
        return self._clock() - self._moved_s

    def _look(self) -> tuple[int, float]:
        sizes = sum(p.stat().st_size for p in self._log_dir.glob("*.log") if p.exists())
        return sizes, cpu_seconds(self._pid)


def cpu_seconds(session: int) -> float:
    """CPU time of all running processes of a session, which has the id of its first process."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
