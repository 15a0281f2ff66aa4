"""NIXL over UCX behind the Transport seam: the only importer of nixl.

Properties of NIXL 1.5.1 (read, or measured by `benchmarks/kv_transfer.py`):
- An agent is not thread-safe; this object belongs to the data-plane thread. NIXL adds a progress
  thread, which the *target* of a read needs: it sets up connections, and emulates lanes without
  remote memory access. The Python wrapper fixes the poll delay of that thread at 0, which burns a
  core while idle. The bindings below the wrapper take a delay, and then the thread sleeps in
  poll(2) until UCX has an event.
- Posting a read may block for the whole copy (over CMA it does), but releases the GIL meanwhile.
- Errors are raised, not returned. An agent's name must never come back, so it is the incarnation
  and a number.
- Over CMA the first read into untouched memory costs a page fault a page; touch a pool before it is
  used.
- By default UCX picks CMA on one host (a pull of one 369 KB block takes 0.14 ms, 64 MB are read at
  9 to 12 GB/s, 0.6 to 0.7 of a plain copy), and NVLink or RDMA where present. With UCX_TLS
  restricted, lists with CMA measured the same, lists without it fall to TCP (0.6 ms and more, 1
  GB/s). Each list excludes a lane that some cluster needs, so UCX_TLS stays unset.
- A stopped process (SIGSTOP) can be read over CMA. Over TCP, and over shared memory without CMA,
  its progress thread must respond, and a read hangs until the process continues. Ending an agent
  with such reads in flight took 3 to 24 ms in 31 tries over these lanes, never hung or crashed, and
  ended its progress thread and sockets: no byte landed afterwards, also when the peer continued
  (`tests/system/test_quarantine.py`).
- A target that continues and finds its reader's agent gone before it has responded ends with
  SIGABRT in UCX ("unexpected error: Endpoint timeout"), in 28 of those 31 tries. A target that was
  running when its reader was killed in mid-read never did, in 36 tries over the same lanes.
- The bindings end an agent with the GIL held, so a hang there would stop every Python thread. A
  watchdog in C (faulthandler) then ends the process.
"""

from __future__ import annotations

import faulthandler
import importlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.base.errors import ConfigError
from engine.base.options import set_default_env
from engine.base.types import MemoryKind
from kvtransfer.transport import Extent, MemoryRegion, PeerLost, PullFailed, ReadState
from kvtransfer.ucx_lanes import lane_log

# The progress thread wakes for events; this is only its fallback, for events that UCX misses.
PROGRESS_DELAY_US = 100_000
HANG_S = 20.0  # for the end of an agent, which takes milliseconds
# Unless the user set them. NIXL and UCX log errors to stderr that are raised and handled here.
# Without zero-copy GET, reads between GPUs that have no NVLink go over TCP: 0.5 instead of 49 GB/s.
DEFAULT_ENV = {
    "NIXL_LOG_LEVEL": "FATAL",
    "UCX_LOG_LEVEL": "error",
    "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on",
}


def _load_bindings() -> Any:
    """nixl's bindings for the installed CUDA. ConfigError when nixl is missing or broken."""
    set_default_env(DEFAULT_ENV)
    lane_log()  # before UCX reads its variables
    raise_exceptions = logging.raiseExceptions
    try:
        return importlib.import_module("nixl")._bindings
    except (ImportError, RuntimeError) as error:  # RuntimeError: an unreadable $HOME/.nixl.cfg
        raise ConfigError(
            f"KV transfer needs the package nixl (install diptych[worker]): {error}"
        ) from error
    finally:
        logging.raiseExceptions = raise_exceptions  # nixl sets it to False for the whole process


@contextmanager
def _ended_if_it_hangs() -> Iterator[None]:
    """After HANG_S in here every thread's stack is printed and the process ends, status 1."""
    stderr = sys.__stderr__
    if stderr is None:
        yield
        return
    faulthandler.dump_traceback_later(HANG_S, exit=True, file=stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@dataclass(slots=True)
class _Read:
    """A posted transfer request."""

    request: int
    peer: str
    done: bool


class NixlTransport:
    """See `Transport`. `agent` is the agent's name. ConfigError: it cannot start."""

    def __init__(self, agent: str) -> None:
        self._nixl = _load_bindings()
        config = self._nixl.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = PROGRESS_DELAY_US
        try:
            self._agent = self._nixl.nixlAgent(agent, config)
            self._agent.createBackend("UCX", {})
        except Exception as error:
            raise ConfigError(
                f"NIXL cannot start UCX ({error}); UCX_TLS and UCX_NET_DEVICES, if set, must name"
                " a transport between hosts, such as tcp, rc or all"
            ) from error
        finally:
            lane_log().loaded()
        self._registered: list[Any] = []

    def register(self, regions: Sequence[MemoryRegion]) -> None:
        """Register memory with the agent."""
        for region in regions:
            row = (region.address, region.num_bytes, region.device_id, "")
            descriptors = self._nixl.nixlRegDList(self._kind(region), [row])
            self._agent.registerMem(descriptors)
            self._registered.append(descriptors)

    def metadata(self) -> bytes:
        """The agent's metadata: its addresses and the keys of what is registered so far."""
        return bytes(self._agent.getLocalMD())

    def connect(self, agent: str, metadata: bytes) -> str:
        """Load a peer's metadata; UCX connects on the first read. The handle is its name."""
        try:
            name = self._agent.loadRemoteMD(metadata).decode()
        except Exception as error:
            raise PullFailed(
                f"peer {agent}: its NIXL metadata cannot be loaded ({error})"
            ) from error
        if name != agent:
            self.disconnect(name)
            raise PeerLost(f"peer {agent}: its NIXL metadata names {name}")
        return agent

    def disconnect(self, peer: str) -> None:
        """Drop metadata and endpoint of a peer."""
        try:
            self._agent.invalidateRemoteMD(peer)
        except Exception as error:
            logging.getLogger(__name__).warning("peer %s: disconnect failed (%s)", peer, error)

    def post_read(
        self, peer: str, remote: MemoryRegion, local: MemoryRegion, extents: Sequence[Extent]
    ) -> _Read:
        """Post one transfer request over all extents."""
        table = np.array(extents, dtype=np.uint64).reshape(-1, 3)
        sources = self._descriptors(remote, table[:, 0], table[:, 2])
        targets = self._descriptors(local, table[:, 1], table[:, 2])
        try:
            request = self._agent.createXferReq(self._nixl.NIXL_READ, targets, sources, peer)
        except Exception as error:
            raise self._translate(peer, error) from error
        read = _Read(request, peer, done=False)
        try:
            read.done = self._agent.postXferReq(request) == self._nixl.NIXL_SUCCESS
        except Exception as error:
            self.release(read)
            raise self._translate(peer, error) from error
        return read

    def poll(self, handle: _Read) -> ReadState:
        """Where a read stands; the call also drives UCX."""
        if not handle.done:
            try:
                handle.done = self._agent.getXferStatus(handle.request) == self._nixl.NIXL_SUCCESS
            except Exception as error:
                raise self._translate(handle.peer, error) from error
        return ReadState.DONE if handle.done else ReadState.PENDING

    def release(self, handle: _Read) -> None:
        """Free the request; NIXL refuses only while it is in flight."""
        try:
            self._agent.releaseXferReq(handle.request)
        except Exception as error:
            logging.getLogger(__name__).warning("peer %s: release failed (%s)", handle.peer, error)

    def lane(self, kind: MemoryKind, *, same_machine: bool) -> str:
        """The lane that UCX picked for such reads."""
        return lane_log().lane(kind, same_machine=same_machine)

    def close(self) -> None:
        """Deregister all memory and end the agent with its progress thread, reads or not."""
        for descriptors in self._registered:
            self._agent.deregisterMem(descriptors)
        self._registered.clear()
        with _ended_if_it_hangs():
            self._agent = None

    def _kind(self, region: MemoryRegion) -> Any:
        return self._nixl.VRAM_SEG if region.kind == "VRAM" else self._nixl.DRAM_SEG

    def _descriptors(self, region: MemoryRegion, offsets: Any, sizes: Any) -> Any:
        rows = np.empty((len(offsets), 3), dtype=np.uint64)  # address, bytes, device
        rows[:, 0] = offsets + np.uint64(region.address)
        rows[:, 1] = sizes
        rows[:, 2] = region.device_id
        return self._nixl.nixlXferDList(self._kind(region), rows)

    def _translate(self, peer: str, error: Exception) -> PeerLost | PullFailed:
        """A caller's mistake is PullFailed, any other error loses the peer."""
        mistakes = (self._nixl.nixlInvalidParamError, self._nixl.nixlNotSupportedError)
        if isinstance(error, mistakes):
            return PullFailed(f"peer {peer}: NIXL refused the read ({error})")
        return PeerLost(f"peer {peer}: {error}")
