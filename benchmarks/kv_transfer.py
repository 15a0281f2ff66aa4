"""KV pulls between two processes against a plain memory copy, for several settings of UCX_TLS.

    python benchmarks/kv_transfer.py [--repeat N] [--tls SETTING ...]

For each setting a fresh pair of processes is started; the reader pulls through the whole data plane
(plan, NIXL, fence), so a figure is what a decode worker gets. Each size is pulled coalesced
(one extent) and scattered (one extent a block, shuffled); the copy is numpy's, of as many bytes
between touched pages, in the same process and run. Best of N, because other work on the machine
only ever slows a copy down. UCX reports the lane (UCX_PROTO_INFO). The first pull of
a connection, which sets it up, is shown apart.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing as mp
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from engine.base.types import new_incarnation
from kvtransfer.checksum import Checksums
from kvtransfer.data_plane import DataPlane
from kvtransfer.nixl_transport import NixlTransport
from kvtransfer.transport import MemoryRegion, RemotePool

BLOCK_BYTES = 368_640  # 30 layers, K and V, 3 heads of 64, 16 tokens, bf16
NUM_BLOCKS = (64 << 20) // BLOCK_BYTES
SIZES = (1, 4, 16, 64, NUM_BLOCKS)  # blocks a pull
SETTINGS = ("", "cma,self,tcp", "sm,self,tcp", "posix,sysv,self,tcp", "tcp")
SPAWN = mp.get_context("spawn")


def main() -> None:
    """Run every setting and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--repeat", type=int, default=15, help="pulls of each kind; the best counts"
    )
    parser.add_argument(
        "--tls", nargs="*", default=list(SETTINGS), help="values of UCX_TLS; '' is unset"
    )
    args = parser.parse_args()
    for setting in args.tls:
        measure(setting, args.repeat)


def measure(setting: str, repeat: int) -> None:
    """One setting in two processes of its own."""
    print(f"\nUCX_TLS={setting or '(unset)'}", flush=True)
    (to_owner, owner_end), (to_reader, reader_end) = SPAWN.Pipe(), SPAWN.Pipe()
    with tempfile.NamedTemporaryFile("r") as log:
        owner = SPAWN.Process(target=own, args=(owner_end, setting), daemon=True)
        args = (reader_end, setting, repeat, log.name)
        reader = SPAWN.Process(target=read, args=args, daemon=True)
        try:
            owner.start()
            reader.start()
            to_reader.send(_receive(to_owner, 60))
            rows = _receive(to_reader, 300)
            reader.join(10)  # UCX writes its log out at the end
            print(f"  lane: {lane(log.read())}")
            for row in rows:
                print(row)
        except (TimeoutError, EOFError) as error:
            print(f"  failed: {error!r}")
        finally:
            for process in (owner, reader):
                process.kill()
                process.join()


def _receive(pipe: Connection, timeout_s: float) -> Any:
    if not pipe.poll(timeout_s):
        raise TimeoutError("no answer")
    return pipe.recv()


def make_plane(setting: str) -> tuple[DataPlane, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A data plane over touched memory, with its blocks and generations."""
    os.environ.pop("UCX_TLS", None)
    if setting:
        os.environ["UCX_TLS"] = setting
    incarnation = new_incarnation()
    blocks = np.full((NUM_BLOCKS, BLOCK_BYTES), 1, dtype=np.uint8)
    generations = np.ones(NUM_BLOCKS, dtype=np.uint64)
    plane = DataPlane(
        NixlTransport,
        incarnation=incarnation,
        blocks=MemoryRegion(blocks.ctypes.data, blocks.nbytes),
        generations=MemoryRegion(generations.ctypes.data, generations.nbytes),
        num_blocks=NUM_BLOCKS,
        block_bytes=BLOCK_BYTES,
    )
    plane.start()
    return plane, blocks, generations


def own(pipe: Connection, setting: str) -> None:
    """The process whose memory is read."""
    plane, _blocks, _generations = make_plane(setting)
    pipe.send(plane.local_pool)
    with contextlib.suppress(EOFError):
        pipe.recv()


def read(pipe: Connection, setting: str, repeat: int, log: str) -> None:
    """The process that pulls; UCX writes its choice of lanes to `log`."""
    os.environ["UCX_PROTO_INFO"] = "y"
    os.environ["UCX_LOG_FILE"] = log
    os.environ["UCX_LOG_LEVEL"] = "info"
    plane, blocks, _generations = make_plane(setting)
    pool: RemotePool = pipe.recv()
    plane.connect(pool).result(30)

    def pull(source: Sequence[int], target: Sequence[int]) -> Callable[[], None]:
        told = [1] * len(source)
        return lambda: _finish(plane, pool, source, target, told)

    rng = random.Random(5)
    one = pull([0], [0])
    first_s = timed(one)
    rows = [f"  first pull {first_s * 1e3:.1f} ms; then, best of {repeat}:"]
    rows.append(f"  {'blocks':>6} {'MB':>6} {'memcpy':>12} {'coalesced':>22} {'scattered':>22}")
    spare = np.full_like(blocks, 2)
    for num in SIZES:
        ids = list(range(num))
        shuffled = rng.sample(range(NUM_BLOCKS), num)  # hardly any two neighbours stay neighbours
        num_bytes = num * BLOCK_BYTES
        copy_s = best(lambda n=num: np.copyto(spare[:n], blocks[:n]), repeat)  # type: ignore[misc]
        together_s, apart_s = best(pull(ids, ids), repeat), best(pull(shuffled, ids), repeat)
        cells = [f"  {num:6} {num_bytes / 1e6:6.1f} {num_bytes / copy_s / 1e9:7.2f} GB/s"]
        for seconds in (together_s, apart_s):
            rate = num_bytes / seconds / 1e9
            cells.append(f"{rate:7.2f} GB/s = {copy_s / seconds:5.2f}x")
        rows.append(" ".join(cells))
    rows.append(f"  one block, asked to fenced: {best(one, 10 * repeat) * 1e3:.3f} ms")
    checksums = Checksums(lambda block: memoryview(blocks[block]))
    crc_s = best(lambda: checksums.compute(range(NUM_BLOCKS)), repeat) / NUM_BLOCKS
    rows.append(
        f"  --kv-checksums, one block, on each side: {crc_s * 1e3:.3f} ms,"
        f" {BLOCK_BYTES / crc_s / 1e9:.2f} GB/s"
    )
    pipe.send(rows)
    plane.stop()


def _finish(
    plane: DataPlane,
    pool: RemotePool,
    source: Sequence[int],
    target: Sequence[int],
    told: Sequence[int],
) -> None:
    result = plane.pull(pool, source, target, told, 60).done.result(60)
    if result.stale:
        raise RuntimeError(f"stale blocks {result.stale} without a writer")


def timed(work: Callable[[], None]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def best(work: Callable[[], None], repeat: int) -> float:
    """Seconds of the fastest of `repeat` runs."""
    return min(timed(work) for _ in range(repeat))


def lane(log: str) -> str:
    """The rows of UCX's tables for reads of remote memory: bytes, protocol, lane."""
    found: list[str] = []
    in_table = False
    for line in log.splitlines():
        cells = [cell.strip() for cell in line.partition("|")[2].split("|")]
        if "remote memory read by" in line:
            in_table = True
        elif in_table and len(cells) > 2 and re.match(r"\d+(\.\.|$)", cells[0]):
            text = f"{cells[0]} {cells[1]} {cells[2]}"
            if text not in found:
                found.append(text)
        elif not any(mark in line for mark in ("+--", "| Range")):
            in_table = False
    return "; ".join(found) or "not reported"


if __name__ == "__main__":
    main()
