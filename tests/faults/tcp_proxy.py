"""A TCP proxy before every process, for machines without root: it stops to forward on demand.

    process --dials 127.0.1.N:PORT--> proxy --dials 127.0.0.1:PORT--> process N

The dialing process is found by the socket's inode among the descriptors of the known processes, so
that a cut holds between two of them alone and in one direction. NIXL's own connections do not pass
here: on one host they are memory to memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

_CHUNK = 1 << 16


class TcpProxy:
    """See `network.Network`. Its event loop runs in a thread of its own."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._pids: dict[str, int] = {}
        self._cuts: set[tuple[str, str]] = set()
        self._healed = asyncio.Event()
        self._ports: set[tuple[str, int]] = set()
        self._servers: list[asyncio.Server] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def join(self, name: str) -> None:
        self._numbers[name] = len(self._numbers) + 2

    def host(self, name: str) -> str:
        return "127.0.0.1"

    def reach(self, name: str, port: int) -> str:
        """Also begins to listen there."""
        host = f"127.0.1.{self._numbers[name]}"
        if (name, port) not in self._ports:
            self._ports.add((name, port))
            self._do(self._listen(name, host, port))
        return host

    def prefix(self, name: str) -> list[str]:
        return []

    def started(self, name: str, pid: int) -> None:
        self._pids[name] = pid

    def cut(self, source: str, target: str) -> None:
        self._cuts.add((source, target))

    def heal(self) -> None:
        self._cuts.clear()
        self._do(self._let_go())

    def close(self) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    # -- the loop's own ----------------------------------------------------------------------------

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self, name: str, host: str, port: int) -> None:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._forward(name, port, reader, writer)

        self._servers.append(await asyncio.start_server(connected, host, port))

    async def _let_go(self) -> None:
        self._healed.set()
        self._healed = asyncio.Event()

    async def _end(self) -> None:
        for server in self._servers:
            server.close()
        tasks = asyncio.all_tasks(self._loop) - {asyncio.current_task(self._loop)}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _forward(
        self, name: str, port: int, near: asyncio.StreamReader, back: asyncio.StreamWriter
    ) -> None:
        dialler = await self._dialler(back.get_extra_info("peername")[1])
        try:
            await self._passable(dialler, name)
            far, out = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            back.transport.abort()
            return
        both = [
            asyncio.create_task(self._pump(near, out, dialler, name)),
            asyncio.create_task(self._pump(far, back, name, dialler)),
        ]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            out.transport.abort()
            back.transport.abort()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        source: str,
        target: str,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                await self._passable(source, target)
                writer.write(data)
                await writer.drain()

    async def _passable(self, source: str, target: str) -> None:
        while (source, target) in self._cuts:
            await self._healed.wait()

    async def _dialler(self, port: int) -> str:
        """The process that has a connection from this local port; "" for the tests themselves."""
        return await asyncio.to_thread(_owner_of, _inode_of(port), dict(self._pids))


def _owner_of(inode: str, pids: dict[str, int]) -> str:
    for name, pid in pids.items():
        with contextlib.suppress(OSError):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                if inode and os.readlink(fd) == f"socket:[{inode}]":
                    return name
    return ""


def _inode_of(port: int) -> str:
    """Of the socket whose local port this is, and that is no listener."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].rpartition(":")[2], 16) == port and fields[3] != "0A":
            return fields[9]
    return ""
