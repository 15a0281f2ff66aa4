"""A decoder computed by the C kernels on the CPU: one call a step.

What a TorchModel computes with bfloat16 activations, this computes with fp32 ones; see
engine/kernels/decoder.c for the arithmetic. The numbers of a token do not depend on what else is in
the step.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.attention.batch import Row, StepRows, TableStaging, ranges
from engine.base.kv_layout import KVLayout
from engine.cache.kv_cache import KVCache
from engine.checkpoint.packed import PackedWeights
from engine.kernels import Kernels
from engine.kernels.decoder import BatchStruct, Decoder, PoolStruct
from engine.models.config import ModelConfig
from engine.runner.base import Host
from engine.runner.rope import make_ropes
from engine.runner.runner import NativeRunner

_Ints = npt.NDArray[np.int32]


class NativeModel:
    """A decoder; immutable but for its arena, so one thread at a time may call it."""

    device = torch.device("cpu")
    exact = True  # the bits of a token depend on its context alone

    def __init__(self, config: ModelConfig, weights: PackedWeights, library: Kernels) -> None:
        """Raises CheckpointError for a rotary scaling that is not known."""
        self.config = config
        self._weights = weights
        self._kernels = library
        self._library = library.library
        self._library.diptych_arena_new.restype = ctypes.c_void_p
        self._logits = torch.empty(0, config.vocab_size, dtype=torch.float32)
        self._layout: KVLayout | None = None  # of the pool that the next two suit
        self._tables = TableStaging()
        self._places: _Ints = np.empty(0, np.int32)  # [2, layers]: their columns and places
        self._arena = ctypes.c_void_p(self._library.diptych_arena_new())
        ropes = make_ropes(config, self.device)
        tables = [(rope.inv_freq.numpy(), rope.scale) for rope in ropes]
        self._decoder = Decoder(config, weights, tables)

    def __del__(self) -> None:
        if library := getattr(self, "_library", None):
            library.diptych_arena_free(self._arena)

    def first_layers(self, num_layers: int) -> NativeModel:
        """This model without its later layers: shares the weights, norm and head included."""
        if not 1 <= num_layers <= self.config.num_layers:
            raise ValueError(f"num_layers must be 1 to {self.config.num_layers}")
        config = dataclasses.replace(self.config, num_layers=num_layers)
        return NativeModel(config, self._weights, self._kernels)

    def make_runner(self, kv_cache: KVCache, host: Host) -> NativeRunner:
        """A runner over `kv_cache`, on the host's threads."""
        return NativeRunner(self, kv_cache, host.threads())

    def forward(self, rows: Sequence[Row], kv_cache: KVCache) -> torch.Tensor:
        """Write the rows' KV; return the logits that the rows ask for: fp32 [S, vocab], row by row.

        The logits are valid until the next call. Raises ValueError for an inconsistent row, and
        MemoryError; nothing has been written then.
        """
        layout = kv_cache.layout
        step = StepRows.of(rows)
        step.check(layout.block_size)
        if step.token_ids.view(np.uint64).max() >= self.config.vocab_size:
            raise ValueError(f"a token id is not below {self.config.vocab_size}")
        ends = np.cumsum(step.num_tokens)
        tables = self._staging(layout).lay_out(step)
        arrays: Mapping[str, _Ints] = {
            "token_ids": step.token_ids.astype(np.int32),
            "first_token": np.concatenate([[0], ends]).astype(np.int32),
            "position": step.starts.astype(np.int32),
            "tables": tables,
            "logit_index": ranges(ends - step.num_logits, step.num_logits).astype(np.int32),
        }
        num_logits = len(arrays["logit_index"])
        logits = self._logits_buffer(num_logits)
        batch = BatchStruct(
            int(ends[-1]),
            len(step),
            num_logits,
            tables.shape[2],
            tables[0].size,
            *(array.ctypes.data for array in arrays.values()),
        )
        strides = (kv_cache.block_stride, layout.head_elements)
        columns, places = self._places
        pool = PoolStruct(
            kv_cache.address,
            *strides,
            columns.ctypes.data,
            places.ctypes.data,
            layout.block_size,
        )
        failed = self._library.diptych_forward(
            ctypes.byref(self._decoder.struct),
            ctypes.byref(batch),
            ctypes.byref(pool),
            self._arena,
            ctypes.c_void_p(logits.data_ptr()),
        )
        if failed:
            raise MemoryError(f"no memory for a step of {int(ends[-1])} tokens")
        return logits

    def _staging(self, layout: KVLayout) -> TableStaging:
        """The staged block tables, with as many columns as the pool's layout has."""
        if layout is not self._layout:
            self._layout, self._tables = layout, TableStaging(layout.num_columns)
            places = [layout.place(i) for i in range(self.config.num_layers)]
            self._places = np.ascontiguousarray(np.array(places, np.int32).T)
        return self._tables

    def _logits_buffer(self, num_logits: int) -> torch.Tensor:
        """Memory for logits [num_logits, vocab], reused: new pages cost as much as a row."""
        if num_logits > self._logits.shape[0]:
            size = (num_logits + num_logits // 2, self.config.vocab_size)
            self._logits = torch.empty(size, dtype=torch.float32)
        return self._logits[:num_logits]
