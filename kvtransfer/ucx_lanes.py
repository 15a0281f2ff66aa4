"""The lane that UCX picked for reads, from the tables that it can log (UCX_PROTO_INFO).

There is no other source: NIXL does not expose the endpoints of UCX, and a lane that falls to TCP
moves the same bytes, a hundred times slower. UCX logs a table for each kind of peer (same process,
same node, other node) and of memory, at the first read:

    | 39017aa8b17d4e48.1 intra-node cfg#1                              |
    | remote memory read by ucp_get*(multi) into host memory from host |
    +--------+-------------+-------------------------------------------+
    | Range  | Description |                  Config                   |
    +--------+-------------+-------------------------------------------+
    | 0..inf | zero-copy   | cma/memory                                |

UCX's log is written into a pipe, and a thread takes these tables out and copies the other lines to
stderr. A user's settings take precedence: where UCX_LOG_FILE is set, no lane is known.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import sys
import threading
from contextlib import suppress
from functools import cache

from engine.base.options import set_default_env, unset_env
from engine.base.types import MemoryKind

_READS_ONLY = "*get*"  # of UCX_PROTO_INFO: a pattern of operations
_PIPE_BYTES = 1 << 20  # a write to a full pipe would stop UCX
_PREFIX = re.compile(r"^\[[0-9.]+\] \[[^\]]*\]\s*")
_WHERE = re.compile(r"^\| \S+ (self|intra-node|inter-node) cfg#\d+\s*\|$")
_READ = re.compile(r"^\| remote memory read by ucp_get\S* (.*?)\s*\|$")
_ROW = re.compile(r"^\|\s*\d+\.\.inf\s*\|\s*(.*?)\s*\|\s*(.*?)\s*\|$")


class LaneTables:
    """Parses UCX's log, line by line."""

    def __init__(self) -> None:
        self._lanes: dict[tuple[str, bool], str] = {}  # by (where, into a GPU's memory)
        self._where = ""
        self._on_gpu: bool | None = None  # None: not in a table of reads

    def feed(self, line: str) -> bool:
        """Take a line; whether it belongs to a table."""
        text = _PREFIX.sub("", line.rstrip("\n"))
        if not text.startswith(("|", "+-")):
            return False
        if match := _WHERE.match(text):
            self._where, self._on_gpu = match[1], None
        elif match := _READ.match(text):
            self._on_gpu = "host memory" not in match[1].partition(" from ")[0]
        elif (match := _ROW.match(text)) and self._on_gpu is not None:
            emulated = ", emulated" if "emulation" in match[1] else ""
            self._lanes[self._where, self._on_gpu] = match[2] + emulated
        return True

    def lane(self, kind: MemoryKind, *, same_machine: bool) -> str:
        """The lane of reads from such a peer; "" where no table has shown it."""
        on_gpu = kind == "VRAM"
        found = {where: lane for (where, gpu), lane in self._lanes.items() if gpu == on_gpu}
        found.pop("self", None)
        if len(found) == 1:  # two containers of one machine may be two nodes to UCX
            return next(iter(found.values()))
        return found.get("intra-node" if same_machine else "inter-node", "")


class LaneLog:
    """UCX's log of this process; create it before UCX is loaded."""

    def __init__(self) -> None:
        self._tables = LaneTables()
        self._reader, writer = os.pipe()
        # Above this user's limit the default suffices, as tables of reads are small.
        with suppress(OSError, AttributeError):
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        path = f"/proc/self/fd/{writer}"
        forced = set_default_env({"UCX_LOG_FILE": path})
        self._is_ours = forced["UCX_LOG_FILE"] == path
        if self._is_ours:
            effective = set_default_env({"UCX_PROTO_INFO": _READS_ONLY})
            self._shows_tables = effective["UCX_PROTO_INFO"] != _READS_ONLY
            threading.Thread(target=self._read, name="ucx-log", daemon=True).start()

    def loaded(self) -> None:
        """UCX has read its variables; child processes must not inherit the pipe's path."""
        if self._is_ours:
            unset_env("UCX_LOG_FILE")

    def lane(self, kind: MemoryKind, *, same_machine: bool) -> str:
        """The lane of reads from such a peer; "" while unknown. Any thread may call."""
        found = self._tables.lane(kind, same_machine=same_machine)
        if not found and self._is_ours:
            ctypes.CDLL(None).fflush(None)  # UCX's stream is buffered: the next call finds it
        return found

    def _read(self) -> None:
        with os.fdopen(self._reader, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not self._tables.feed(line) or self._shows_tables:
                    sys.stderr.write(line)
                    sys.stderr.flush()


@cache
def lane_log() -> LaneLog:
    """The log of this process: UCX reads its settings once."""
    return LaneLog()
