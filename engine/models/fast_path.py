"""A decoder computed by our own kernels on the CPU: the weights as decoder.c wants them, one call
a step.

What torch's `LlamaModel` computes with bfloat16 activations, this computes with fp32 ones; see
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

from engine.attention.batch import Row, check_rows
from engine.cache.kv_cache import KVCache
from engine.checkpoint.config import ModelConfig
from engine.checkpoint.packed import Matrix, PackedWeights
from engine.kernels import Kernels
from engine.models.rope import make_rope

_KINDS = {"bf16": 0, "q4_0": 1, "q4_1": 2, "q8_0": 3}
_Ints = npt.NDArray[np.int32]


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("input_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        *((name, _Matrix) for name in ("qkv", "out", "gate_up", "down")),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in (
                "num_layers",
                "hidden",
                "heads",
                "kv_heads",
                "head_dim",
                "intermediate",
                "vocab",
                "window",
            )
        ),
        ("eps", ctypes.c_float),
        ("rope_scale", ctypes.c_float),
        ("inv_freq", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("embedding", _Matrix),
        ("head", _Matrix),
        ("layers", ctypes.c_void_p),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in ("num_tokens", "num_rows", "num_logits", "table_stride")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in ("token_ids", "first_token", "position", "tables", "logit_index")
        ),
    )


class _Pool(ctypes.Structure):
    _fields_ = (
        ("first", ctypes.c_void_p),
        ("block_stride", ctypes.c_int64),
        ("block_size", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class NativeModel:
    """A decoder; immutable but for its arena, so one thread at a time may call it."""

    device = torch.device("cpu")

    def __init__(self, config: ModelConfig, weights: PackedWeights, library: Kernels) -> None:
        """Raises CheckpointError for a rotary scaling that is not known."""
        self.config = config
        self._weights = weights
        self._kernels = library
        self._library = library.library
        self._library.diptych_arena_new.restype = ctypes.c_void_p
        self._logits = torch.empty(0, config.vocab_size, dtype=torch.float32)
        self._arena = ctypes.c_void_p(self._library.diptych_arena_new())
        rope = make_rope(config, self.device)
        self._inv_freq = np.ascontiguousarray(rope.inv_freq.numpy(), np.float32)
        self._layers = (_Layer * config.num_layers)(
            *(self._layer(i, weights) for i in range(config.num_layers))
        )
        embedding = _matrix(weights, "embedding")
        self._decoder = _Decoder(
            config.num_layers,
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.intermediate_size,
            config.vocab_size,
            config.sliding_window,
            config.rms_norm_eps,
            rope.scale,
            self._inv_freq.ctypes.data,
            weights.vectors["norm"].ctypes.data,
            embedding,
            _matrix(weights, "head") if "head" in weights.matrices else embedding,
            ctypes.addressof(self._layers),
        )

    def __del__(self) -> None:
        if library := getattr(self, "_library", None):
            library.diptych_arena_free(self._arena)

    @staticmethod
    def _layer(index: int, weights: PackedWeights) -> _Layer:
        norms = (weights.vectors[f"{index}.{name}"] for name in ("input_norm", "mlp_norm"))
        matrices = (_matrix(weights, f"{index}.{x}") for x in ("qkv", "out", "gate_up", "down"))
        return _Layer(*(norm.ctypes.data for norm in norms), *matrices)

    def _room(self, num_logits: int) -> torch.Tensor:
        """Memory for logits [num_logits, vocab]: fresh pages cost as much as a row."""
        if num_logits > len(self._logits):
            size = (num_logits + num_logits // 2, self.config.vocab_size)
            self._logits = torch.empty(size, dtype=torch.float32)
        return self._logits[:num_logits]

    def first_layers(self, num_layers: int) -> NativeModel:
        """This model without its later layers: shares the weights, norm and head included."""
        if not 1 <= num_layers <= self.config.num_layers:
            raise ValueError(f"num_layers must be 1 to {self.config.num_layers}")
        config = dataclasses.replace(self.config, num_layers=num_layers)
        return NativeModel(config, self._weights, self._kernels)

    def forward(self, rows: Sequence[Row], kv_cache: KVCache) -> torch.Tensor:
        """Write the rows' KV; return the wanted logits, row by row: fp32 [S, vocab].

        The logits are good until the next call. Raises ValueError on a row that contradicts itself,
        MemoryError; nothing has been written then.
        """
        layout = kv_cache.layout
        check_rows(rows, layout.block_size)
        lengths = np.array([len(row.token_ids) for row in rows], np.int32)
        ends = np.cumsum(lengths, dtype=np.int32)
        wanted = [
            np.arange(end - row.num_logits, end, dtype=np.int32)
            for row, end in zip(rows, ends.tolist(), strict=True)
        ]
        stride = max(len(row.block_ids) for row in rows)
        tables = np.zeros((len(rows), stride), np.int32)
        for table, row in zip(tables, rows, strict=True):
            table[: len(row.block_ids)] = row.block_ids
        arrays: Mapping[str, _Ints] = {
            "token_ids": np.concatenate([np.asarray(row.token_ids, np.int32) for row in rows]),
            "first_token": np.concatenate([np.zeros(1, np.int32), ends]),
            "position": np.array([row.start for row in rows], np.int32),
            "tables": tables,
            "logit_index": np.concatenate(wanted),
        }
        if arrays["token_ids"].view(np.uint32).max() >= self.config.vocab_size:
            raise ValueError(f"a token id is not below {self.config.vocab_size}")
        num_logits = len(arrays["logit_index"])
        logits = self._room(num_logits)
        batch = _Batch(
            int(ends[-1]),
            len(rows),
            num_logits,
            stride,
            *(array.ctypes.data for array in arrays.values()),
        )
        pool = _Pool(kv_cache.address, kv_cache.block_stride, layout.block_size)
        failed = self._library.diptych_forward(
            ctypes.byref(self._decoder),
            ctypes.byref(batch),
            ctypes.byref(pool),
            self._arena,
            ctypes.c_void_p(logits.data_ptr()),
        )
        if failed:
            raise MemoryError(f"no memory for a step of {int(ends[-1])} tokens")
        return logits


def _matrix(weights: PackedWeights, name: str) -> _Matrix:
    return matrix_struct(weights.matrices[name], weights.vectors.get(f"{name}.bias"))


def matrix_struct(matrix: Matrix, bias: npt.NDArray[np.float32] | None) -> _Matrix:
    """What matmul.h calls a matrix; it does not own the arrays."""
    return _Matrix(
        matrix.data.ctypes.data,
        None if bias is None else bias.ctypes.data,
        _KINDS[matrix.kind],
        matrix.rows,
        matrix.columns,
    )
