"""What FlashInfer's kernels find in memory: workspaces, index arrays, the paged cache.

Each reader refuses what a kernel would read through a raw pointer as something else.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

HEAD_DIMS = (64, 128, 256)  # what the package's prebuilt kernels cover
NHD = 0
_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "i32": torch.int32, "i64": torch.int64}


class KernelError(RuntimeError):
    """A kernel refuses its arguments, or would read something else than is meant."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise KernelError(message)


@dataclass(frozen=True, slots=True)
class Compiled:
    """What is fixed when a kernel module is compiled; read from the module's name."""

    q: torch.dtype
    kv: torch.dtype
    o: torch.dtype
    head_dim: int
    window: bool

    @classmethod
    def of(cls, name: str) -> Compiled:
        """Raises KernelError for a module that does not exist or is not right."""
        fields = dict(
            re.findall(r"(dtype_q|dtype_kv|dtype_o|dtype_idx|head_dim_\w\w)_([^_]+)", name)
        )
        head_dim = int(fields["head_dim_qk"])
        require(fields["dtype_idx"] == "i32", f"index arrays are {fields['dtype_idx']}, not i32")
        require(fields["head_dim_vo"] == fields["head_dim_qk"], "K and V differ in head_dim")
        require(head_dim in HEAD_DIMS, f"head_dim {head_dim} is none of {HEAD_DIMS}")
        q, kv, o = (_DTYPES[fields[key]] for key in ("dtype_q", "dtype_kv", "dtype_o"))
        require("posenc_0" in name and "logits_cap_False" in name, f"not our variant: {name}")
        return cls(q, kv, o, head_dim, "use_swa_True" in name)


class Workspace:
    """Space handed out from the front of a buffer, as the planner's allocator does."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self._size = buffer.numel() * buffer.element_size()
        self.used = 0

    def take(self, num_bytes: int) -> int:
        """Offset of `num_bytes`, 16-byte aligned."""
        start = -(-self.used // 16) * 16
        require(start + num_bytes <= self._size, f"workspace too small: {start + num_bytes} bytes")
        self.used = start + num_bytes
        return start


def host_ints(array: torch.Tensor, name: str) -> list[int]:
    """An index array that the planner reads through a raw pointer, on the host."""
    require(array.device.type == "cpu", f"{name} lies on {array.device}: the planner reads it")
    require(array.dtype == torch.int32, f"{name} is {array.dtype}, read as int32")
    require(array.is_contiguous(), f"{name} is not contiguous")
    return [int(x) for x in array.tolist()]


def put(pinned: torch.Tensor, offset: int, values: Sequence[int]) -> None:
    pinned.view(torch.int32)[offset // 4 : offset // 4 + len(values)] = torch.tensor(
        values, dtype=torch.int32
    )


def get(buffer: torch.Tensor, offset: int, count: int) -> list[int]:
    return [int(x) for x in buffer.view(torch.int32)[offset // 4 : offset // 4 + count].tolist()]


def plan_ints(
    int_workspace: torch.Tensor, pinned: torch.Tensor, arrays: Sequence[Sequence[int]]
) -> list[int]:
    """Offsets of the arrays; they reach the device's workspace by one copy."""
    require(pinned.numel() == int_workspace.numel(), "the two integer workspaces differ in size")
    space = Workspace(int_workspace)
    offsets = [space.take(4 * len(array)) for array in arrays]
    for offset, array in zip(offsets, arrays, strict=True):
        put(pinned, offset, array)
    int_workspace[: space.used].copy_(pinned[: space.used])
    return offsets


def chunk_pages(work: Sequence[tuple[int, int]], least: int, most_items: int) -> int:
    """Fewest pages a work item may have so that all (tiles, pages) give at most `most_items`."""
    longest = max((pages for _, pages in work), default=1)
    for size in range(least, max(longest, least) + 1):
        if sum(tiles * -(-max(pages, 1) // size) for tiles, pages in work) <= most_items:
            return size
    return max(longest, least)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [h, m, d] over k, v [h, s, d] where seen [m, s]: values, and log of the weights' sum."""
    score = (q.float() @ k.float().transpose(1, 2) * scale).masked_fill(~seen, -math.inf)
    total = torch.logsumexp(score, -1)
    return (score - total[..., None]).exp().nan_to_num(0.0) @ v.float(), total


@dataclass(frozen=True, slots=True)
class Pages:
    """The paged cache and its index arrays, as a kernel finds them."""

    k: torch.Tensor  # [pages, kv_heads, page_size, head_dim]
    v: torch.Tensor
    indptr: list[int]
    indices: list[int]
    last_page_len: list[int]

    @classmethod
    def of(
        cls, compiled: Compiled, q: torch.Tensor, cache: Sequence[torch.Tensor], *index: Any
    ) -> Pages:
        """`index`: indptr, indices, last_page_len and the layout's code."""
        *arrays, layout = index
        k, v = cache
        require(k.stride() == v.stride(), "K and V have different strides")
        for name, x, dtype in (("q", q, compiled.q), ("K", k, compiled.kv), ("V", v, compiled.kv)):
            require(x.dtype == dtype, f"{name} is {x.dtype}, compiled for {dtype}")
            require(x.shape[-1] == compiled.head_dim, f"{name} has head_dim {x.shape[-1]}")
            require(x.stride(-1) == 1, f"{name}: the elements of a head do not lie together")
            aligned = [x.storage_offset(), *x.stride()[:-1]]
            require(all(n % 8 == 0 for n in aligned), f"{name} is not 16-byte aligned: {aligned}")
        ints = []
        for name, array in zip(("indptr", "indices", "last_page_len"), arrays, strict=True):
            require(array.device == q.device, f"{name} lies on {array.device}: a kernel reads it")
            require(array.dtype == torch.int32, f"{name} is {array.dtype}, read as int32")
            ints.append(array.tolist() if q.device.type == "cpu" else [])
        if layout == NHD:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        require(q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} heads over {k.shape[1]} K/V heads")
        return cls(k, v, *ints)

    def length(self, row: int) -> int:
        """Positions of a row."""
        pages = self.indptr[row + 1] - self.indptr[row]
        return (pages - 1) * self.k.shape[2] + self.last_page_len[row] if pages else 0

    def gather(self, row: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K, V [kv_heads, end - first, head_dim] of a row's positions."""
        size = self.k.shape[2]
        require(self.indptr[-1] == len(self.indices), "indptr and indices disagree")
        positions = torch.arange(first, end)
        table = torch.tensor(self.indices[self.indptr[row] : self.indptr[row + 1]])
        require(end <= len(table) * size, f"row {row} has {len(table)} pages, not {end} positions")
        page = table[positions // size]
        require(bool(((page >= 0) & (page < len(self.k))).all()), "a page outside the cache")
        return (x[page, :, positions % size].transpose(0, 1) for x in (self.k, self.v))  # type: ignore[return-value]


class Partial:
    """Outputs of work items: in the float workspace until they are merged, if work was split."""

    def __init__(
        self, workspace: torch.Tensor, offset: int, count: int, shape: torch.Size, split: bool
    ) -> None:
        size = count * math.prod(shape[1:])
        where = workspace.view(torch.float32)[offset // 4 :][:size] if split else torch.empty(size)
        self._values = where.view(count, *shape[1:])
        self._values.fill_(math.nan)
        self._totals = torch.full((count, shape[1]), math.nan)

    def add(
        self,
        slots: torch.Tensor,
        heads: torch.Tensor,
        values: torch.Tensor,
        totals: torch.Tensor,
    ) -> None:
        """values [kv_heads, m, d] and totals [kv_heads, m] of heads [kv_heads, m] in slots [m]."""
        self._values[slots, heads] = values
        self._totals[slots, heads] = totals

    def merge(self, o: torch.Tensor, indptr: Sequence[int]) -> None:
        """Row i of o is the weighted sum of slots indptr[i] to indptr[i + 1]."""
        if len(self._values) == len(o):
            o.copy_(self._values)
            return
        for i, (first, end) in enumerate(itertools.pairwise(indptr)):
            weight = self._totals[first:end].softmax(0)
            o[i] = (self._values[first:end] * weight[..., None]).sum(0).to(o.dtype)
