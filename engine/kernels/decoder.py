"""The structs of decoder.c, filled from packed weights; and which models it computes.

A layer's fields are named as the joined tensors of an architecture's list (engine/models/). A
tensor that the list does not have is NULL; a model with a tensor that has no field here is computed
by torch. No torch here: a coordinator chooses the backend, too.
"""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
import numpy.typing as npt

from engine.checkpoint.packed import BLOCK, Matrix, PackedWeights
from engine.models.architecture import architecture_of
from engine.models.config import ModelConfig

_KINDS = {"bf16": 0, "q4_0": 1, "q4_1": 2, "q8_0": 3}
_VECTORS = ("input_norm", "mlp_norm", "q_norm", "k_norm")
_MATRICES = ("qkv", "out", "gate_up", "down")
_OPTIONAL = {"q_norm", "k_norm"}
_OUTER = {"norm", "embedding", "head"}
_MAX_GROUP, _MAX_HEAD_DIM = 96, 256  # query heads of a KV head; see attention.h


class MatrixStruct(ctypes.Structure):
    """`matrix` of matmul.h; it does not own the arrays."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )

    @classmethod
    def of(cls, matrix: Matrix, bias: npt.NDArray[np.float32] | None) -> MatrixStruct:
        """The caller keeps the arrays alive."""
        return cls(
            matrix.data.ctypes.data,
            None if bias is None else bias.ctypes.data,
            _KINDS[matrix.kind],
            matrix.rows,
            matrix.columns,
        )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _VECTORS),
        *((name, MatrixStruct) for name in _MATRICES),
        ("window", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class DecoderStruct(ctypes.Structure):
    """`decoder` of decoder.c."""

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
                "unused",
            )
        ),
        ("eps", ctypes.c_float),
        ("rope_scale", ctypes.c_float),
        ("inv_freq", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("embedding", MatrixStruct),
        ("head", MatrixStruct),
        ("layers", ctypes.c_void_p),
    )


class BatchStruct(ctypes.Structure):
    """`batch` of decoder.c."""

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


class PoolStruct(ctypes.Structure):
    """`kv_pool` of decoder.c."""

    _fields_ = (
        ("first", ctypes.c_void_p),
        ("block_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("block_size", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class Decoder:
    """A model's struct, and all arrays that it points into."""

    def __init__(
        self,
        config: ModelConfig,
        weights: PackedWeights,
        inv_freq: npt.NDArray[np.float32],
        rope_scale: float,
    ) -> None:
        """`inv_freq` [head_dim / 2]: rotary frequencies; cos and sin are scaled by `rope_scale`."""
        self._weights = weights
        self._inv_freq = np.ascontiguousarray(inv_freq)
        self._layers = (_Layer * config.num_layers)(
            *(self._layer(f"{i}.", config.attention[i].window) for i in range(config.num_layers))
        )
        self.struct = DecoderStruct(
            config.num_layers,
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.intermediate_size,
            config.vocab_size,
            0,
            config.rms_norm_eps,
            rope_scale,
            self._inv_freq.ctypes.data,
            self._vector("norm"),
            self._matrix("embedding"),
            self._matrix("head" if "head" in weights.matrices else "embedding"),
            ctypes.addressof(self._layers),
        )

    def _layer(self, prefix: str, window: int) -> _Layer:
        vectors = (self._vector(prefix + name) for name in _VECTORS)
        return _Layer(*vectors, *(self._matrix(prefix + name) for name in _MATRICES), window)

    def _vector(self, name: str) -> int | None:
        vector = self._weights.vectors.get(name)
        return None if vector is None else vector.ctypes.data

    def _matrix(self, name: str) -> MatrixStruct:
        bias = self._weights.vectors.get(f"{name}.bias")
        return MatrixStruct.of(self._weights.matrices[name], bias)


def why_not_decoder(config: ModelConfig) -> str:
    """Why decoder.c does not compute a model; "" where it does."""
    architecture = architecture_of(config)
    known = {*_VECTORS, *_MATRICES, *(f"{name}.bias" for name in _MATRICES)}
    one_layer = dataclasses.replace(config, num_layers=1)
    found = {spec.joined.removeprefix("0.") for spec in architecture.tensors(one_layer)}
    needed = (known - _OPTIONAL) - {f"{name}.bias" for name in _MATRICES}
    if not architecture.native or not needed <= found or not found <= known | _OUTER:
        return f"the kernels do not compute a {config.architecture}"
    if config.attention_scale or config.attention_softcap:
        return "the kernels do not scale or cap scores as this model does"
    inner = config.num_heads * config.head_dim
    widths = (config.hidden_size, config.intermediate_size, inner, config.head_dim)
    group = config.num_heads // config.num_kv_heads
    if group > _MAX_GROUP or config.head_dim > _MAX_HEAD_DIM or any(w % BLOCK for w in widths):
        return "the kernels do not take this model's widths"
    return ""
