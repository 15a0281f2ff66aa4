"""FlashInfer's decode and prefill modules in torch, with the signatures of the C++ functions.

They are those of 0.7.4: csrc/batch_decode.cu, batch_prefill.cu and batch_prefill_paged.cuh. The
code refuses what they refuse and what they would read as rubbish, and reads nothing but its
arguments. As in C++, a plan puts the work list into the integer workspace, a run takes it from
there, and partial results go through the float workspace.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.support.flashinfer_memory import (
    Compiled,
    KernelError,
    Pages,
    Partial,
    Workspace,
    attend,
    chunk_pages,
    get,
    host_ints,
    plan_ints,
    require,
)

NUM_SM, DECODE_CTAS, PREFILL_CTAS = 132, 4, 2  # of an H200; thread blocks an SM
NON_CAUSAL, CAUSAL = 0, 1


@dataclass(slots=True)
class Launches:
    """What ran, in order."""

    names: list[str] = field(default_factory=list)  # kernels
    modules: list[str] = field(default_factory=list)  # compiled or loaded, by name


@dataclass(frozen=True, slots=True)
class DecodeModule:
    """batch_decode.cu: one query a row."""

    compiled: Compiled
    launches: Launches
    workspace_size: None = None

    def plan(
        self,
        float_workspace: torch.Tensor,
        int_workspace: torch.Tensor,
        pinned: torch.Tensor,
        indptr: torch.Tensor,
        batch_size: int,
        num_qo_heads: int,
        num_kv_heads: int,
        page_size: int,
        cuda_graph: bool,
        window_left: int,
        soft_cap: float,
        head_dim_qk: int,
        head_dim_vo: int,
        empty_q: torch.Tensor,
        empty_kv: torch.Tensor,
    ) -> list[int]:
        """The ten numbers of a DecodePlanInfo."""
        ends = host_ints(indptr, "indptr")
        require(len(ends) == batch_size + 1, f"indptr has {len(ends)} entries")
        require(num_qo_heads // num_kv_heads in (1, 2, 3, 4, 6, 8, 16), "no such GQA group")
        require((empty_q.dtype, empty_kv.dtype) == (self.compiled.q, self.compiled.kv), "dtypes")
        pages = [b - a for a, b in itertools.pairwise(ends)]
        require(min(pages) > 0, "a row without pages")
        most = NUM_SM * DECODE_CTAS // num_kv_heads
        chunk = max(pages)
        if batch_size < most:
            chunk = chunk_pages([(1, n) for n in pages], max(128 // page_size, 1), most)
        counts = [-(-n // chunk) for n in pages]
        items = [(row, tile) for row, count in enumerate(counts) for tile in range(count)]
        o_indptr = [sum(counts[:row]) for row in range(batch_size + 1)]
        split = len(items) > batch_size
        rows, tiles = [row for row, _ in items], [tile for _, tile in items]
        arrays = [rows, tiles, o_indptr, [chunk * page_size]]
        offsets = plan_ints(int_workspace, pinned, arrays)
        space, v_offset, s_offset = Workspace(float_workspace), 0, 0
        if split:
            v_offset = space.take(4 * num_qo_heads * len(items) * head_dim_vo)
            s_offset = space.take(4 * num_qo_heads * len(items))
        head = [len(items), v_offset, s_offset, *offsets[:3], 0, offsets[3]]
        return [*head, int(cuda_graph), int(split)]

    def run(
        self,
        float_workspace: torch.Tensor,
        int_workspace: torch.Tensor,
        plan_info: list[int],
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        o: torch.Tensor,
        lse: torch.Tensor | None,
        layout: int,
        window_left: int,
        enable_pdl: bool,
        alibi: torch.Tensor | None,
        soft_cap: float,
        sm_scale: float,
        rope_rcp_scale: float,
        rope_rcp_theta: float,
    ) -> None:
        """Attention of q [rows, heads, head_dim] into o."""
        require(len(plan_info) == 10, f"a decode plan has 10 numbers, not {len(plan_info)}")
        num_items, v_offset, _, *offsets, _, chunk_offset, _, split = plan_info
        self.launches.names += ["decode", *["merge"] * split]
        pages = Pages.of(
            self.compiled, q, (k_cache, v_cache), indptr, indices, last_page_len, layout
        )
        require(o.is_contiguous() and o.dtype == self.compiled.o, "o is not contiguous")
        if q.is_meta:
            return
        rows, tiles = (get(int_workspace, offset, num_items) for offset in offsets[:2])
        o_indptr = get(int_workspace, offsets[2], len(q) + 1)
        (chunk,) = get(int_workspace, chunk_offset, 1)
        partial = Partial(float_workspace, v_offset, o_indptr[-1], o.shape, bool(split))
        for row, tile in zip(rows, tiles, strict=True):
            length = pages.length(row)
            first, end = (tile * chunk, min((tile + 1) * chunk, length)) if split else (0, length)
            k, v = pages.gather(row, first, end)
            positions = torch.arange(first, end)
            oldest = length - 1 - window_left if self.compiled.window else 0
            seen = (positions >= oldest)[None]
            folded = q[row].view(len(k), -1, q.shape[2])
            heads = torch.arange(q.shape[1]).view(len(k), -1)
            slots = torch.full(heads.shape[1:], o_indptr[row] + tile)
            partial.add(slots, heads, *attend(folded, k, v, seen, sm_scale))
        partial.merge(o, o_indptr)


def _tile_rows(packed_len: int, head_dim: int) -> int:
    """Packed rows (query, head of the group) a thread block computes."""
    if packed_len > 64 and head_dim < 256:
        return 128
    return 64 if packed_len > 16 else 16


@dataclass(frozen=True, slots=True)
class PrefillModule:
    """batch_prefill.cu and batch_prefill_paged.cuh: any number of queries a row."""

    compiled: Compiled
    launches: Launches
    workspace_size: None = None

    def ragged_run(self, *args: Any) -> None:
        """Not for a paged cache."""
        raise KernelError("ragged_run is not what a paged cache needs")

    def plan(
        self,
        float_workspace: torch.Tensor,
        int_workspace: torch.Tensor,
        pinned: torch.Tensor,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_lens: torch.Tensor,
        total_num_rows: int,
        batch_size: int,
        num_qo_heads: int,
        num_kv_heads: int,
        page_size: int,
        cuda_graph: bool,
        head_dim_qk: int,
        head_dim_vo: int,
        causal: bool,
        window_left: int,
        fixed_split_size: int,
        disable_split_kv: bool,
        num_colocated_ctas: int,
        uniform_q_len: int,
        fixed_uniform_q_len: bool,
    ) -> list[int]:
        """The fifteen numbers of a PrefillPlanInfo."""
        queries, ends = host_ints(qo_indptr, "qo_indptr"), host_ints(kv_indptr, "kv_indptr")
        require(num_qo_heads % num_kv_heads == 0, f"{num_qo_heads} heads, {num_kv_heads} K/V")
        require(len(queries) == len(ends) == batch_size + 1, "index arrays of different lengths")
        require(total_num_rows == queries[-1], "rows do not add up")
        require(not (cuda_graph or disable_split_kv or fixed_split_size > 0), "not what we use")
        group = num_qo_heads // num_kv_heads
        lengths = [b - a for a, b in itertools.pairwise(queries)]
        pages = [b - a for a, b in itertools.pairwise(ends)]
        require(min(lengths) >= 0 and min(pages) > 0, "a row of negative length or without pages")
        tile = _tile_rows(sum(lengths) * group // batch_size, head_dim_vo)
        if window_left >= 0:
            pages = [min(-(-(window_left + tile) // page_size), n) for n in pages]
        tiles = [-(-n * group // tile) for n in lengths]
        most = NUM_SM * PREFILL_CTAS // num_kv_heads
        work = list(zip(tiles, pages, strict=True))
        chunk = chunk_pages(work, max(128 // page_size, 1), most)
        split = chunk < max(pages)
        counts = [-(-n // chunk) for n in pages]
        items = [
            (row, q_tile, kv_tile)
            for row in range(batch_size)
            for q_tile in range(tiles[row])
            for kv_tile in range(counts[row])
        ]
        merge = [0]
        for length, count in zip(lengths, counts, strict=True):
            merge += [merge[-1] + count * (i + 1) for i in range(length)]
        o_indptr = [merge[i] for i in queries]
        columns = [[item[i] for item in items] for i in range(3)]
        arrays = [*columns, merge, o_indptr, [chunk * page_size]]
        offsets = plan_ints(int_workspace, pinned, arrays)
        space, v_offset, s_offset = Workspace(float_workspace), 0, 0
        if split:
            rows = -(-len(items) * tile // group)
            require(merge[-1] <= rows, "more partial rows than are reserved")
            v_offset = space.take(4 * num_qo_heads * rows * head_dim_vo)
            s_offset = space.take(4 * num_qo_heads * rows)
        return [
            *(len(items), total_num_rows, 0, tile),
            *offsets,
            *(v_offset, s_offset, 0, int(cuda_graph), int(split)),
        ]

    def paged_run(
        self,
        float_workspace: torch.Tensor,
        int_workspace: torch.Tensor,
        plan_info: list[int],
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        last_page_len: torch.Tensor,
        o: torch.Tensor,
        lse: torch.Tensor | None,
        mask_mode: int,
        layout: int,
        window_left: int,
        enable_pdl: bool,
        *variant: Any,
    ) -> None:
        """Attention of q [tokens, heads, head_dim] into o; `variant`: 8 tensors, 5 numbers."""
        require(len(plan_info) == 15, f"a prefill plan has 15 numbers, not {len(plan_info)}")
        num_items, _, _, tile_rows, *offsets, v_offset, _, _, _, split = plan_info
        self.launches.names += ["prefill", *["merge"] * split]
        *tensors, soft_cap, sm_scale, _, _, _ = variant
        require(len(tensors) == 8 and soft_cap == 0.0, "not the default variant's arguments")
        require(mask_mode in (NON_CAUSAL, CAUSAL), f"mask mode {mask_mode}")
        pages = Pages.of(
            self.compiled, q, (k_cache, v_cache), kv_indptr, kv_indices, last_page_len, layout
        )
        require(qo_indptr.dtype == torch.int32, f"qo_indptr is {qo_indptr.dtype}")
        require(qo_indptr.device == q.device, f"qo_indptr lies on {qo_indptr.device}")
        require(o.is_contiguous() and o.dtype == self.compiled.o, "o is not contiguous")
        if q.is_meta:
            return
        columns = [get(int_workspace, offset, num_items) for offset in offsets[:3]]
        merge = get(int_workspace, offsets[3], len(q) + 1)
        o_indptr = get(int_workspace, offsets[4], len(qo_indptr))
        (chunk,) = get(int_workspace, offsets[5], 1)
        partial = Partial(float_workspace, v_offset, merge[-1], o.shape, bool(split))
        queries, kv_heads = [int(x) for x in qo_indptr.tolist()], pages.k.shape[1]
        group = q.shape[1] // kv_heads
        for row, q_tile, kv_tile in zip(*columns, strict=True):
            num_queries, length = queries[row + 1] - queries[row], pages.length(row)
            packed = torch.arange(
                q_tile * tile_rows, min((q_tile + 1) * tile_rows, num_queries * group)
            )
            start = 0
            if self.compiled.window:
                start = max(length + q_tile * tile_rows // group - num_queries - window_left, 0)
            first, end = start, length
            if split:
                first = min(start + kv_tile * chunk, length)
                end = min(start + (kv_tile + 1) * chunk, length)
            k, v = pages.gather(row, first, end)
            keys = torch.arange(first, end)[None]
            positions = (length - num_queries + packed // group)[:, None]
            seen = keys <= positions if mask_mode == CAUSAL else keys >= 0
            if self.compiled.window:
                seen = seen & (keys >= positions - window_left)
            own = q[queries[row] : queries[row + 1]].view(num_queries, kv_heads, group, -1)
            folded = own.transpose(0, 1).flatten(1, 2)[:, packed]
            chunks = (o_indptr[row + 1] - o_indptr[row]) // num_queries
            slots = o_indptr[row] + packed // group * chunks + kv_tile
            heads = torch.arange(kv_heads)[:, None] * group + packed % group
            partial.add(slots, heads, *attend(folded, k, v, seen, sm_scale))
        partial.merge(o, merge)
