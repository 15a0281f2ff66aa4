"""Attention in plain torch: the reference, and the backend of the CPU without kernels.

Rows with few queries (decode tokens, drafts) are computed together in padded groups of similar
context length; the heads of a GQA group are folded into the query axis, so that K and V are read
once for all of them (n rows, m queries, s keys, group = num_heads // num_kv_heads):

    q    [n, num_kv_heads, group * m, head_dim]
    k, v [n, num_kv_heads, s, head_dim]           gathered from the rows' blocks

Rows with many queries (prompt chunks) are computed one by one. Keys start at the first block that
any query of the row still sees (sliding window). Scores and sums are fp32 inside torch's kernels
for every dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from engine.attention.batch import Batch, BlockIds, ranges
from engine.base.kv_layout import KVLayout
from engine.cache.kv_cache import DTYPES, KVCache
from engine.models.config import FULL_ATTENTION, AttentionSpec

CHUNK_QUERIES = 32  # rows with at least so many queries are computed alone
MAX_WASTE = 0.25  # padding that a group may carry, relative to what its rows must read ...
SMALL_WASTE_BLOCKS = 4  # ... or a row: below this, padding costs less than another call

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some rows of a step, for planning: one entry a row."""

    tables: Sequence[BlockIds]
    first_token: _Ints  # index of the row's first token in the step
    starts: _Ints  # position of its first token
    lengths: _Ints  # queries
    first_block: _Ints  # first entry of its table that is read
    num_blocks: _Ints  # entries read

    def take(self, index: Sequence[int]) -> _Rows:
        """The rows of these indices, in this order."""
        i = np.array(index, dtype=np.int64)
        columns = (self.first_token, self.starts, self.lengths, self.first_block, self.num_blocks)
        return _Rows([self.tables[j] for j in index], *(column[i] for column in columns))

    def query_offsets(self) -> _Ints:
        """[n, m] query numbers within the row; padding repeats the last one."""
        return np.minimum(np.arange(self.lengths.max())[None, :], self.lengths[:, None] - 1)


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows computed by one call."""

    num_rows: int  # n
    folded: bool  # few queries: GQA folded into the query axis
    queries: torch.Tensor  # [n * m] index into the step's tokens
    kv_rows: torch.Tensor  # [2 * n * num_kv_heads * blocks] index into layer 0's heads of blocks
    unused: torch.Tensor | None  # index into the gathered vectors: positions past the context
    num_keys: int  # s
    mask: torch.Tensor | None  # [n, 1, group * m or m, s]: 0 or -inf; None: nothing is hidden ...
    causal: bool  # ... except by causality, as the row is a whole prompt


@dataclass(frozen=True, slots=True)
class TorchPlan:
    """One step's groups, and the index of each token's output in their concatenation."""

    groups: tuple[_Group, ...]
    order: torch.Tensor  # [T]


def group_rows(lengths: Sequence[int], num_blocks: Sequence[int]) -> list[list[int]]:
    """Which rows are computed together: chunks alone, others by falling size with little padding.

    `lengths` [R] are the rows' queries, `num_blocks` [R] the blocks that each must read.
    """
    groups = [[i] for i, length in enumerate(lengths) if length >= CHUNK_QUERIES]
    few = [i for i, length in enumerate(lengths) if length < CHUNK_QUERIES]
    few.sort(key=lambda i: (-num_blocks[i], i))
    current: list[int] = []
    total = 0
    for i in few:
        num_rows, total = len(current) + 1, total + num_blocks[i]
        waste = (num_blocks[current[0]] if current else num_blocks[i]) * num_rows - total
        if waste > max(MAX_WASTE * total, SMALL_WASTE_BLOCKS * num_rows):
            groups.append(current)
            current, total = [], num_blocks[i]
        current.append(i)
    return [*groups, current] if current else groups


class TorchBackend:
    """Attention over the paged cache of `layout`; holds no state of a batch."""

    def __init__(
        self,
        layout: KVLayout,
        num_heads: int,
        spec: AttentionSpec = FULL_ATTENTION,
        block_stride: int = 0,
    ) -> None:
        """`block_stride`: elements from a block to the next, where it also holds another model."""
        self._layout = layout
        self._block_runs = (block_stride or layout.block_elements) // layout.run_elements
        self._group = num_heads // layout.num_kv_heads
        self._spec = spec
        self._window = spec.window

    def plan(self, batch: Batch) -> TorchPlan:
        """Group the rows and build their index arrays and masks."""
        device = batch.token_ids.device
        rows = self._survey(batch)
        groups: list[_Group] = []
        order = np.empty(batch.num_tokens, dtype=np.int64)
        done = 0
        for index in group_rows(rows.lengths.tolist(), rows.num_blocks.tolist()):
            some = rows.take(index)
            n, m = len(index), int(some.lengths.max())
            groups.append(self._plan_group(some, device))
            order[ranges(some.first_token, some.lengths)] = ranges(
                done + np.arange(n, dtype=np.int64) * m, some.lengths
            )
            done += n * m
        return TorchPlan(tuple(groups), torch.from_numpy(order).to(device))

    def _survey(self, batch: Batch) -> _Rows:
        """All rows of the step; blocks wholly before the first query's window are left out."""
        bs = self._layout.block_size
        starts, lengths = batch.rows.starts, batch.rows.num_tokens
        oldest = np.maximum(starts - self._window + 1, 0) if self._window else np.zeros_like(starts)
        return _Rows(
            tables=batch.rows.tables,
            first_token=np.cumsum(lengths) - lengths,
            starts=starts,
            lengths=lengths,
            first_block=oldest // bs,
            num_blocks=-(-(starts + lengths) // bs) - oldest // bs,
        )

    def _plan_group(self, rows: _Rows, device: torch.device) -> _Group:
        n, bs = len(rows.tables), self._layout.block_size
        folded = int(rows.lengths.max()) < CHUNK_QUERIES
        context = rows.starts + rows.lengths
        keys = rows.first_block[:, None] * bs + np.arange(rows.num_blocks.max() * bs)[None, :]
        num_keys = int((context - rows.first_block * bs).max())
        unused = self._unused(keys >= context[:, None]) if n > 1 else keys[:0, 0]

        query_offsets = rows.query_offsets()
        queries = (rows.starts[:, None] + query_offsets)[:, :, None]  # [n, m, 1] positions
        keys = keys[:, None, :num_keys]
        seen = keys <= queries  # [n, m, s]
        if self._window:
            seen &= keys > queries - self._window
        causal = not folded and seen.shape[1] == num_keys and num_keys <= (self._window or num_keys)
        mask = None
        if not causal and not seen.all():
            hidden = torch.from_numpy(~seen).to(device)[:, None]
            dtype = DTYPES[self._layout.dtype]
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
            mask.masked_fill_(hidden, float("-inf"))
            mask = mask.repeat(1, 1, self._group, 1) if folded else mask

        def tensor(array: _Ints) -> torch.Tensor:
            return torch.from_numpy(array.reshape(-1)).to(device)

        return _Group(
            num_rows=n,
            folded=folded,
            queries=tensor(rows.first_token[:, None] + query_offsets),
            kv_rows=tensor(self._kv_rows(rows)),
            unused=tensor(unused) if unused.size else None,
            num_keys=num_keys,
            mask=mask,
            causal=causal,
        )

    def _kv_rows(self, rows: _Rows) -> _Ints:
        """[2, n, num_kv_heads, blocks]: which runs of block_size * head_dim make up K, then V.

        Numbered as `KVCache.runs`, for layer 0; padding reads block 0.
        """
        kvh = self._layout.num_kv_heads
        blocks = np.zeros((len(rows.tables), int(rows.num_blocks.max())), dtype=np.int64)
        for i, table in enumerate(rows.tables):
            first = int(rows.first_block[i])
            used = table[first : first + int(rows.num_blocks[i])]
            blocks[i, : len(used)] = used
        head = np.arange(kvh)[None, None, :, None] * (2 * self._layout.num_layers)
        plane = np.arange(2)[:, None, None, None]
        return blocks[None, :, None, :] * self._block_runs + head + plane

    def _unused(self, gap: npt.NDArray[np.bool_]) -> _Ints:
        """Indices of the vectors at `gap` [n, keys] in the gathered [2, n, num_kv_heads, keys].

        They are zeroed before use, as a weight of 0 does not cancel a NaN in an unused position.
        """
        (n, num_keys), kvh = gap.shape, self._layout.num_kv_heads
        row, key = np.nonzero(gap)
        part = np.arange(2)[:, None, None] * n + row[None, None, :]  # [2, 1, gaps]
        out: _Ints = (part * kvh + np.arange(kvh)[None, :, None]) * num_keys + key
        return out

    def run(
        self,
        plan: TorchPlan,
        layer: int,
        q: torch.Tensor,
        kv_cache: KVCache,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of q [T, num_heads, head_dim] over layer `layer`; see AttentionBackend."""
        outputs = [self._run_group(group, layer, q, kv_cache, sinks) for group in plan.groups]
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return joined.index_select(0, plan.order)

    def _run_group(
        self,
        group: _Group,
        layer: int,
        q: torch.Tensor,
        kv_cache: KVCache,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """[n * m, num_heads, head_dim] in the group's own order."""
        layout, n = self._layout, group.num_rows
        kvh, d = layout.num_kv_heads, layout.head_dim
        runs = kv_cache.runs[2 * layout.place(layer)[1] :]
        gathered = runs.index_select(0, group.kv_rows)
        if group.unused is not None:
            gathered.view(-1, d).index_fill_(0, group.unused, 0.0)
        k, v = gathered.view(2, n, kvh, -1, d)[:, :, :, : group.num_keys]
        # [n, m, kvh, g, d] -> [n, kvh, g, m, d]
        heads = q.index_select(0, group.queries).view(n, -1, kvh, self._group, d)
        heads = heads.permute(0, 2, 3, 1, 4)
        if sinks is not None:  # one a query vector [..., group, m, 1], as the heads are
            sinks = sinks.float().view(kvh, self._group, 1, 1).expand(-1, -1, heads.shape[3], -1)
        if group.folded:
            folded = heads.reshape(n, kvh, -1, d)
            sinks = None if sinks is None else sinks.reshape(kvh, -1, 1)
            out = self._attend(folded, k, v, group.mask, False, sinks)
            out = out.reshape(n, kvh, self._group, -1, d)
        else:
            k, v = (x[0][:, None].expand(-1, self._group, -1, -1) for x in (k, v))
            out = self._attend(heads[0], k, v, group.mask, group.causal, sinks)[None]
        return out.permute(0, 3, 1, 2, 4).reshape(-1, kvh * self._group, d)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Softmax of the scores of q with k, times v; [..., m, head_dim], in q's dtype.

        sinks: [..., m, 1] scores that only take a share.
        """
        softcap, scale = self._spec.softcap, self._spec.scale or q.shape[-1] ** -0.5
        if not softcap and sinks is None:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=self._spec.scale or None
            )
        scores = q.float() @ k.float().transpose(-1, -2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if causal:
            mask = torch.full_like(scores, float("-inf")).triu(1)
        scores = scores if mask is None else scores + mask
        if sinks is not None:
            scores = torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), -1)
        weights = torch.softmax(scores, -1)[..., : k.shape[-2]]
        return (weights @ v.float()).to(q.dtype)
