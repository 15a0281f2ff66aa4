"""A process with a KV pool that others may read: what the transfer tests pull from.

It follows the owner's protocol (bump the generation, then write), obeys its parent over a pipe and
dies with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import multiprocessing as mp
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import shared_memory
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from engine.base.types import new_incarnation
from kvtransfer.data_plane import DataPlane
from kvtransfer.fence import Fence
from kvtransfer.nixl_transport import NixlTransport
from kvtransfer.quarantine import Quarantine
from kvtransfer.transport import MemoryRegion, RemotePool

# Workers are forked from a process that has one thread and has imported most of what they need:
# nixl imports torch, which takes seconds.
FORKS = mp.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.support.kv_worker", "torch"])


class Pool:
    """Blocks and generations of this process, with the data plane that serves or reads them."""

    def __init__(
        self,
        num_blocks: int,
        block_bytes: int,
        *,
        fence: Fence | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.incarnation = new_incarnation()
        self.blocks = np.zeros((num_blocks, block_bytes), dtype=np.uint8)
        self.blocks[:] = 0  # touch it: a first write to a page costs a fault
        self.generations = np.arange(num_blocks, dtype=np.uint64) + np.uint64(secrets.randbits(62))
        self.plane = DataPlane(
            NixlTransport,
            incarnation=self.incarnation,
            blocks=region(self.blocks),
            generations=region(self.generations),
            num_blocks=num_blocks,
            block_bytes=block_bytes,
            fence=fence,
            quarantine=quarantine,
        )
        self.plane.start()

    def fill(self, seed: int) -> None:
        """Random bytes that the parent can make again from the seed."""
        self.generations += np.uint64(1)
        self.blocks[:] = pattern(seed, self.blocks.shape)


@functools.lru_cache(maxsize=4)
def pattern(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Random bytes, read-only: they are kept, for tests want the same ones several times."""
    out = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    out.flags.writeable = False
    return out


def region(array: np.ndarray) -> MemoryRegion:
    return MemoryRegion(array.ctypes.data, array.nbytes)


@dataclass
class Worker:
    """The parent's end of a worker process."""

    process: Any
    pipe: Connection

    def ask(self, *command: Any, timeout_s: float = 30.0) -> Any:
        self.pipe.send(command)
        if not self.pipe.poll(timeout_s):
            raise TimeoutError(f"worker did not answer {command[0]}")
        return self.pipe.recv()

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(10)

    def pause(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)


@contextlib.contextmanager
def workers(
    num: int, num_blocks: int, block_bytes: int, env: dict[str, str] | None = None
) -> Iterator[list[Worker]]:
    """Start workers, each ready when its pool is registered; end them whatever happens."""
    started = []
    try:
        for _ in range(num):
            ours, theirs = FORKS.Pipe()
            process = FORKS.Process(
                target=serve,
                args=(theirs, num_blocks, block_bytes, {**os.environ, **(env or {})}),
                daemon=True,
            )
            process.start()
            theirs.close()
            started.append(Worker(process, ours))
        for worker in started:
            worker.ask("pool", timeout_s=60)
        yield started
    finally:
        for worker in started:
            worker.process.kill()
            worker.process.join(10)


def serve(pipe: Connection, num_blocks: int, block_bytes: int, env: dict[str, str]) -> None:
    """Obey until the pipe closes. `env`: all variables, for the server has those of its start."""
    os.environ.clear()
    os.environ.update(env)
    pool = Pool(num_blocks, block_bytes)
    with contextlib.suppress(EOFError):
        while True:
            name, *args = pipe.recv()
            pipe.send(COMMANDS[name](pool, *args))


def _pool(pool: Pool) -> tuple[RemotePool, list[int]]:
    return pool.plane.local_pool, pool.generations.tolist()


def _fill(pool: Pool, seed: int) -> list[int]:
    pool.fill(seed)
    return list(pool.generations.tolist())


def _restart(pool: Pool) -> str:
    """As if its own reads had not ended; the new agent's name."""
    plane, restarted = pool.plane, threading.Event()

    def restart() -> None:
        plane._loop.restart("told to")
        restarted.set()

    plane._submit(restart)
    assert restarted.wait(20)
    return plane.agent


# -- the race ------------------------------------------------------------------------------

# The parent and the writer meet in one page of 64-bit words, each stored in one piece.
# WANTED: number of the try to run; DELAY_NS, FLIP_NS: when its flip begins, how long it takes at
# least; DONE: number of the last try run.
WANTED, DELAY_NS, FLIP_NS, DONE = range(4)
STOP = 2**64 - 1
CHUNK_BYTES = 64 << 10


def word(number: int) -> int:
    """The 64-bit word that fills the block after `number` flips; never the same twice."""
    return (number * 0x9E3779B97F4A7C15 + 1) & (2**64 - 1)


def _race(pool: Pool, page_name: str) -> int:
    """Flip block 0 from word(n - 1) to word(n) in each try n, by the owner's protocol.

    The block is overwritten from its end, against the direction of a copy, so that a flip which
    begins during a read always tears it.
    """
    page = shared_memory.SharedMemory(page_name)
    assert page.buf is not None
    control = np.frombuffer(page.buf, dtype=np.uint64)
    words = pool.blocks[0].view(np.uint64)
    step = CHUNK_BYTES // 8
    number = 0
    while (wanted := int(control[WANTED])) != STOP:
        if wanted == number:
            continue
        begin = time.perf_counter_ns() + int(control[DELAY_NS])
        number, flip_ns = wanted, int(control[FLIP_NS])
        while time.perf_counter_ns() < begin:
            pass
        pool.generations[0] += np.uint64(1)
        for end in range(len(words), 0, -step):
            words[max(0, end - step) : end] = word(number)
            while time.perf_counter_ns() < begin + flip_ns * (len(words) - end) // len(words):
                pass
        control[DONE] = number
    del control
    page.close()
    return number


# -- gRPC ----------------------------------------------------------------------------------


def _listen(pool: Pool, digest: str, port: int = 0) -> str:
    """Serve KvService on a port, 0 for a free one, from a thread with its own loop; the address."""
    import grpc

    from engine.pb.diptych.internal.v1.worker_pb2_grpc import add_KvServiceServicer_to_server
    from kvtransfer.kv_service import KvServicer
    from kvtransfer.lease import LeaseTable

    address: list[str] = []
    ready = threading.Event()

    class NoBlocks:
        async def hold(self, hashes: Sequence[bytes]) -> tuple[list[int], list[int]]:
            return [], []

        async def unpin(self, block_ids: Sequence[int]) -> None:
            return None

    async def main() -> None:
        server = grpc.aio.server()
        leases = LeaseTable(time.monotonic, 1.0)
        servicer = KvServicer(lambda: pool.plane.local_pool, digest, NoBlocks(), leases)
        add_KvServiceServicer_to_server(servicer, server)
        address.append(f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}")
        await server.start()
        ready.set()
        await server.wait_for_termination()

    threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()
    ready.wait(10)
    return address[0]


COMMANDS: dict[str, Callable[..., Any]] = {
    "pool": _pool,
    "fill": _fill,
    "restart": _restart,
    "race": _race,
    "listen": _listen,
}
