"""A process that has imported the product and forks for each start, so that restarts are quick.

    test --- {"module", "args", "log"} --> fork server -- fork --> what `python -m MODULE ARGS` is
         <-- {"pid"} --------------------                          after its imports
         <-- {"pid", "status"} ---------- when that process has ended

Imports are most of a worker's start, and a scenario waits for many. One fork server stands for one
environment and one module; all else of a start is the product's own. The kernel ends the forked
processes with their fork server (`engine.process.parent_death`), and that with the test.

    python -m tests.support.fork_server PARENT_PID SOCKET_FD MODULE_TO_IMPORT ...
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.process.parent_death import die_with_parent
from tests.support.paths import ROOT

_MAX_BYTES = 1 << 20
_PID_S = 120.0  # for the imports, on a machine that others use too


class ForkedProcess:
    """A process that a fork server has started: the part of `subprocess.Popen` that slots use."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, a negative signal, or None while it runs."""
        return self.returncode


class ForkServer:
    """The test's side. The thread that makes it has to outlive it (parent-death signal)."""

    def __init__(self, modules: Sequence[str], env: Mapping[str, str]) -> None:
        """`modules` are imported once."""
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fd = theirs.fileno()
        words = [sys.executable, "-m", __name__, str(os.getpid()), str(fd), *modules]
        with theirs:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, cwd=ROOT, env=env, pass_fds=[fd], process_group=0
            )
        self._started: list[ForkedProcess] = []
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._read, name="fork server", daemon=True)
        self._thread.start()

    def start(self, module: str, args: Sequence[str], log: Path) -> ForkedProcess:
        """Start one; its output is appended to `log`. Called by one thread."""
        num = len(self._started)
        order = {"module": module, "args": list(args), "log": str(log)}
        self._ours.send(json.dumps(order).encode())
        with self._news:
            came = self._news.wait_for(lambda: len(self._started) > num, _PID_S)
            assert came and self._process.poll() is None, f"the fork server of {module} has ended"
            return self._started[num]

    def close(self) -> None:
        """End it; the processes that it has started have to be over."""
        self._ours.shutdown(socket.SHUT_WR)
        self._process.wait(10)
        self._thread.join(10)
        self._ours.close()

    def _read(self) -> None:
        while message := self._ours.recv(_MAX_BYTES):
            fields = json.loads(message)
            with self._news:
                if "status" not in fields:
                    self._started.append(ForkedProcess(fields["pid"]))
                else:
                    running = (p for p in self._started if p.returncode is None)
                    next(p for p in running if p.pid == fields["pid"]).returncode = fields["status"]
                self._news.notify_all()


def _serve(orders: socket.socket) -> dict[str, Any] | None:
    """Fork for each order. Returns it in the forked process, and None in this one at the end."""
    poll = select.poll()
    poll.register(orders, select.POLLIN)
    running: dict[int, int] = {}  # pid by the descriptor that tells of its end
    server = os.getpid()
    while True:
        for fd, _ in poll.poll():
            if fd in running:
                poll.unregister(fd)
                pid, status = os.waitpid(running.pop(fd), 0)
                os.close(fd)
                ended = {"pid": pid, "status": os.waitstatus_to_exitcode(status)}
                orders.send(json.dumps(ended).encode())
                continue
            if not (message := orders.recv(_MAX_BYTES)):
                return None
            order: dict[str, Any] = json.loads(message)
            if (pid := os.fork()) == 0:
                die_with_parent(server)
                orders.close()
                for other in running:
                    os.close(other)
                return order
            os.setpgid(pid, pid)  # one session, as under a coordinator
            running[fd := os.pidfd_open(pid)] = pid
            poll.register(fd, select.POLLIN)
            orders.send(json.dumps({"pid": pid}).encode())


def main() -> None:
    """Serve until the test closes the socket."""
    parent, fd, *modules = sys.argv[1:]
    die_with_parent(int(parent))
    for module in modules:
        importlib.import_module(module)
    if (order := _serve(socket.socket(fileno=int(fd)))) is None:
        return
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.argv = [order["module"], *order["args"]]
    runpy.run_module(order["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
