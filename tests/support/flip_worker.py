"""`decode start` whose reads bring one wrong bit, as long as the file FLIPS names a number above 0.

python -m tests.support.flip_worker FLIPS start ...
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import worker.cli
import worker.process
from kvtransfer.nixl_transport import NixlTransport
from kvtransfer.transport import Extent, MemoryRegion, ReadState

FLIPS = Path(sys.argv[1])
# The highest bit of the exponent of a block's last value, which is little endian: 2**128 times it.
BYTE, BIT = -1, 1 << 6


class FlippingTransport(NixlTransport):
    """NIXL, but for the memory behind it."""

    def register(self, regions: Sequence[MemoryRegion]) -> None:
        super().register(regions)
        self._landing = regions[-1]
        self._targets: dict[int, int] = {}  # handle -> address of its last byte

    def post_read(
        self, peer: Any, remote: MemoryRegion, local: MemoryRegion, extents: Sequence[Extent]
    ) -> Any:
        handle = super().post_read(peer, remote, local, extents)
        if local != self._landing:
            _, offset, num_bytes = extents[-1]
            self._targets[id(handle)] = local.address + offset + num_bytes
        return handle

    def poll(self, handle: Any) -> ReadState:
        state = super().poll(handle)
        if state is ReadState.DONE and (end := self._targets.pop(id(handle), 0)):
            left = int(FLIPS.read_text())
            if left:
                FLIPS.write_text(str(left - 1))
                ctypes.c_uint8.from_address(end + BYTE).value ^= BIT
        return state


if __name__ == "__main__":
    worker.process.NixlTransport = FlippingTransport  # type: ignore[attr-defined]
    sys.exit(worker.cli.decode(sys.argv[2:]))
