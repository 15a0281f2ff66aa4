"""The KV pool's memory: allocated once, never moved, written by the engine thread alone.

    memory [num_blocks, block_elements]                                    of one model, or two
    pool   [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim]  one model's part of it

`block_pool` records which request holds which block; this module only knows where its bytes are.
The data plane takes `address` and `num_bytes` to register the pool. Checksums take `read_block`.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.base.kv_layout import KVLayout
from engine.base.types import MemoryKind

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The exponent's bits: all are set in numbers that are not finite, and in no others.
_EXPONENTS = {
    "float32": (torch.int32, np.int32(0x7F800000)),
    "bfloat16": (torch.int16, np.int16(0x7F80)),
    "float16": (torch.int16, np.int16(0x7C00)),
}


def zeroed_pages(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes] of private zero pages, page-aligned.

    They become resident as blocks are used. Huge pages, as otherwise a first read over NIXL costs a
    fault every 4 KiB, ten times as long as the copy.
    """
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    if hasattr(mmap, "MADV_DONTDUMP"):  # prompts can be recovered from it
        pages.madvise(mmap.MADV_DONTDUMP)
    return torch.frombuffer(pages, dtype=torch.uint8)


class KVCache:
    """All blocks on one device, as one model sees them.

    Attributes:
        pool: this model's layers.
        draft: the same blocks as the draft model sees them, if there is one.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        device: torch.device,
        allocate: Callable[[int], torch.Tensor] | None = None,
    ) -> None:
        """Allocate the blocks of `layout`; `allocate` returns uint8 zeros [num_bytes].

        Raises ValueError for num_blocks below 1.
        """
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; a pool needs at least one block")
        num_bytes = num_blocks * layout.block_bytes
        if allocate is not None:
            raw = allocate(num_bytes)
        elif device.type == "cpu":
            raw = zeroed_pages(num_bytes)
        else:
            raw = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._view(layout, raw.view(DTYPES[layout.dtype]).view(num_blocks, -1), 0)

    def _view(self, layout: KVLayout, memory: torch.Tensor, offset: int) -> None:
        """Become the view of a model whose layers begin at `offset` in each block of `memory`."""
        self.layout = layout
        self.num_blocks = memory.shape[0]
        self.device = memory.device
        self._memory = memory  # [num_blocks, block_elements]
        self._offset = offset
        part = memory[:, offset : offset + math.prod(layout.block_shape)]
        # [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim]
        self.pool = part.view(self.num_blocks, *layout.block_shape)
        self.draft: KVCache | None = None
        if layout.draft is not None:
            self.draft = KVCache.__new__(KVCache)
            self.draft._view(layout.draft, memory, layout.draft_offset)

    @property
    def address(self) -> int:
        """Address of this model's first byte in block 0: of a target's, the whole memory's."""
        return self.pool.data_ptr()

    @property
    def num_bytes(self) -> int:
        """Size of the whole memory."""
        return self._memory.nbytes

    @property
    def block_stride(self) -> int:
        """Elements from one block to the next."""
        return self._memory.shape[1]

    @property
    def runs(self) -> torch.Tensor:
        """[n, block_size * head_dim]: keys or values of one head and layer in one block.

        Those of block b begin at b * block_stride / (block_size * head_dim): head by head, of each
        head layer by layer, of each layer K, then V.
        """
        return self._memory.view(-1)[self._offset :].view(-1, self.layout.run_elements)

    @property
    def kind(self) -> MemoryKind:
        """Where the pool lies."""
        return "DRAM" if self.device.type == "cpu" else "VRAM"

    @property
    def device_id(self) -> int:
        """Number of the device; 0 on the CPU."""
        return self.device.index or 0

    def read_block(self, block: int) -> memoryview:
        """All bytes of a block, in host memory: in place on a CPU, else a copy."""
        return self._memory[block].cpu().view(torch.uint8).numpy().data

    def damaged(self, blocks: Sequence[int]) -> list[int]:
        """The blocks of `blocks`, all complete, in which a number of this model is not finite."""
        return [b for b in blocks if not bool(torch.isfinite(self.pool[b]).all())]

    def finite(
        self, blocks: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """[T]: whether the last layer's K and V at positions `offsets` of `blocks` are finite.

        A layer reads the one before it, so a position that is not finite below is not finite here.
        """
        parts = self.layer(self.layout.total_layers - 1)
        ok = np.ones(len(blocks), np.bool_)
        if self.device.type == "cpu":
            # By numpy on this thread: torch would first wake its threads.
            as_bits, exponent = _EXPONENTS[self.layout.dtype]
            for part in parts:
                bits = part.view(as_bits).numpy()[blocks, :, offsets]
                ok &= ((bits & exponent) != exponent).all(axis=(1, 2))
            return ok
        where = torch.from_numpy(np.stack((blocks, offsets))).to(self.device)
        for part in parts:
            finite = torch.isfinite(part[where[0], :, where[1]]).flatten(1).all(1)
            ok &= finite.cpu().numpy()
        return ok

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K, V of a layer: strided views [num_blocks, num_kv_heads, block_size, head_dim] (HND).

        The blocks of its column hold them; in those of other columns they are of other layers.
        """
        _, place = self.layout.place(index)
        return self.pool[:, :, place, 0], self.pool[:, :, place, 1]

    def write(
        self,
        layer: int,
        blocks: torch.Tensor,
        offsets: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> None:
        """Store k, v [T, num_kv_heads, head_dim] at `offsets` [T] of `blocks` [T], int64."""
        k_blocks, v_blocks = self.layer(layer)
        k_blocks[blocks, :, offsets] = k
        v_blocks[blocks, :, offsets] = v
