"""The structs of decoder.c, filled from packed weights; and which models it computes.

A layer's fields are named as the joined tensors of an architecture's list (engine/models/). A
tensor that the list does not have is NULL; a model with a tensor that has no field here is computed
by torch. No torch here: a coordinator chooses the backend, too.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from engine.checkpoint.packed import PackedWeights
from engine.checkpoint.packing import BLOCK, KINDS, Matrix
from engine.models.architecture import architecture_of
from engine.models.config import ExpertSpec, ModelConfig

_KINDS = {kind: number for number, kind in enumerate(("bf16", *KINDS))}  # as in matmul.h
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_VECTORS = ("input_norm", "mlp_norm", "q_norm", "k_norm", "out_norm", "down_norm", "sinks")
_MATRICES = ("qkv", "out", "gate_up", "down")
# Of layers with experts; the router and the shared part's gate are fp32.
_EXPERT_VECTORS = ("router", "router.bias", "correction", "shared_gate")
_EXPERT_MATRICES = (
    *("gate_experts", "up_experts", "down_experts"),
    *("shared_gate_up", "shared_down"),
)
# Fields of `decoder` that a ModelConfig has: ints, then floats.
_SIZES = (
    *("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"),
    "vocab_size",
)
_NUMBERS = ("rms_norm_eps", "embedding_scale", "residual_scale", "logit_scale", "logit_softcap")
_MAX_PARTS = 3  # as in matmul.h
_OPTIONAL = set(_VECTORS)
_OUTER = {"norm", "embedding", "head"}
_MAX_GROUP, _MAX_HEAD_DIM = 96, 256  # query heads of a KV head; see attention.h


def _fields(kind: type, *names: str) -> Iterator[tuple[str, type]]:
    return ((name, kind) for name in names)


class MatrixStruct(ctypes.Structure):
    """`matrix` of matmul.h; it does not own the arrays."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "data", "bias"),
        *_fields(ctypes.c_int32, "kind", "rows", "columns", "unused"),
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


class JoinedStruct(ctypes.Structure):
    """`joined` of matmul.h; it does not own the arrays."""

    _fields_ = (
        *_fields(ctypes.c_int32, "num_parts", "rows"),
        ("parts", MatrixStruct * _MAX_PARTS),
    )

    @classmethod
    def of(cls, parts: Sequence[Matrix], bias: npt.NDArray[np.float32] | None) -> JoinedStruct:
        """`bias` is of all parts together. The caller keeps the arrays alive."""
        structs, first = (MatrixStruct * _MAX_PARTS)(), 0
        for i, part in enumerate(parts):
            structs[i] = MatrixStruct.of(part, None if bias is None else bias[first:])
            first += part.rows
        return cls(len(parts), first, structs)


class _Layer(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_void_p, *_VECTORS),
        *_fields(JoinedStruct, *_MATRICES),
        ("experts", ctypes.c_void_p),
        *_fields(ctypes.c_int32, "window", "rope"),
        *_fields(ctypes.c_float, "score_scale", "score_cap"),
    )


class _ExpertLayer(ctypes.Structure):
    """`expert_layer` of experts.h."""

    _fields_ = (
        *_fields(ctypes.c_void_p, *_EXPERT_VECTORS),
        *_fields(JoinedStruct, *_EXPERT_MATRICES),
    )


class _ExpertSpec(ctypes.Structure):
    """`expert_spec` of experts.h."""

    _fields_ = (
        *_fields(ctypes.c_int32, "number", "per_token", "width", "groups", "chosen_groups"),
        *_fields(ctypes.c_int32, "shared_width", "sigmoid", "normalise"),
        *_fields(ctypes.c_float, "scale", "limit", "alpha"),
    )

    @classmethod
    def of(cls, spec: ExpertSpec | None) -> _ExpertSpec:
        """All zero for a model without experts."""
        if spec is None:
            return cls()
        sizes = (spec.number, spec.per_token, spec.width, spec.groups, spec.chosen_groups)
        choice = (spec.shared_width, spec.scoring == "sigmoid", spec.normalise)
        return cls(*sizes, *choice, spec.scale, spec.limit, spec.alpha)


class _Rope(ctypes.Structure):
    _fields_ = (("inv_freq", ctypes.c_void_p), ("scale", ctypes.c_float), ("dim", ctypes.c_int32))


class DecoderStruct(ctypes.Structure):
    """`decoder` of decoder.c."""

    _fields_ = (
        *_fields(ctypes.c_int32, *_SIZES, "num_ropes"),
        *_fields(ctypes.c_float, *_NUMBERS),
        *_fields(ctypes.c_int32, "activation", "whole_qk_norm"),
        ("query_beta", ctypes.c_float),
        ("query_period", ctypes.c_int32),
        *_fields(ctypes.c_void_p, "ropes", "norm"),
        *_fields(JoinedStruct, "embedding", "head"),
        ("layers", ctypes.c_void_p),
        ("experts", _ExpertSpec),
    )


class BatchStruct(ctypes.Structure):
    """`batch` of decoder.c."""

    _fields_ = (
        *_fields(ctypes.c_int32, "num_tokens", "num_rows", "num_logits", "table_stride"),
        ("column_stride", ctypes.c_int64),
        *_fields(ctypes.c_void_p, "token_ids", "first_token", "position", "tables", "logit_index"),
    )


class PoolStruct(ctypes.Structure):
    """`kv_pool` of decoder.c."""

    _fields_ = (
        ("first", ctypes.c_void_p),
        *_fields(ctypes.c_int64, "block_stride", "head_stride"),
        *_fields(ctypes.c_void_p, "columns", "places"),
        *_fields(ctypes.c_int32, "block_size", "unused"),
    )


class Decoder:
    """A model's struct, and all arrays that it points into."""

    def __init__(
        self,
        config: ModelConfig,
        weights: PackedWeights,
        ropes: Sequence[tuple[npt.NDArray[np.float32], float]],
    ) -> None:
        """`ropes`: rotary frequencies [dim / 2] of each table, and the scale of cos and sin."""
        self._weights = weights
        self._frequencies = [np.ascontiguousarray(inv_freq) for inv_freq, _ in ropes]
        self._ropes = (_Rope * len(ropes))(
            *(
                _Rope(inv_freq.ctypes.data, scale, 2 * len(inv_freq))
                for inv_freq, (_, scale) in zip(self._frequencies, ropes, strict=True)
            )
        )
        self._experts = {
            i: self._expert_layer(i)
            for i in (config.experts.layers if config.experts else ())
            if i < config.num_layers
        }
        self._layers = (_Layer * config.num_layers)(
            *(self._layer(config, i) for i in range(config.num_layers))
        )
        self.struct = DecoderStruct(
            *(getattr(config, name) for name in _SIZES),
            len(ropes),
            *(getattr(config, name) for name in _NUMBERS),
            _ACTIVATIONS[config.activation],
            config.whole_qk_norm,
            config.query_beta,
            config.query_period,
            ctypes.addressof(self._ropes),
            self._vector("norm"),
            self._matrix("embedding"),
            self._matrix("head" if "head" in weights.matrices else "embedding"),
            ctypes.addressof(self._layers),
            _ExpertSpec.of(config.experts),
        )

    def _layer(self, config: ModelConfig, layer: int) -> _Layer:
        vectors = (self._vector(f"{layer}.{name}") for name in _VECTORS)
        matrices = (self._matrix(f"{layer}.{name}") for name in _MATRICES)
        spec, rope = config.attention[layer], config.rope_of(layer)
        experts = self._experts.get(layer)
        address = None if experts is None else ctypes.addressof(experts)
        numbers = (spec.window, rope, spec.scale, spec.softcap)
        return _Layer(*vectors, *matrices, address, *numbers)

    def _expert_layer(self, layer: int) -> _ExpertLayer:
        vectors = (self._vector(f"{layer}.{name}") for name in _EXPERT_VECTORS)
        matrices = (self._matrix(f"{layer}.{name}") for name in _EXPERT_MATRICES)
        return _ExpertLayer(*vectors, *matrices)

    def _vector(self, name: str) -> int | None:
        vector = self._weights.vectors.get(name)
        return None if vector is None else vector.ctypes.data

    def _matrix(self, name: str) -> JoinedStruct:
        """All zero where the layer has no such tensor."""
        bias = self._weights.vectors.get(f"{name}.bias")
        return JoinedStruct.of(self._weights.matrices.get(name, ()), bias)


def why_not_decoder(config: ModelConfig) -> str:
    """Why decoder.c does not compute a model; "" where it does."""
    one_layer = dataclasses.replace(config, num_layers=1)
    layers = [dataclasses.replace(one_layer, experts=None)]
    if config.experts is not None:
        experts = dataclasses.replace(config.experts, layers=(0,))
        layers.append(dataclasses.replace(one_layer, experts=experts))
    native = architecture_of(config).native
    if not native or not all(_has_fields(layer) for layer in layers):
        return f"the kernels do not compute a {config.architecture}"
    if not _fits(config):
        return "the kernels do not take this model's widths"
    return ""


def _has_fields(one_layer: ModelConfig) -> bool:
    """Whether the structs have a field for each tensor of the layer, and it has all they need."""
    tensors = architecture_of(one_layer).tensors(one_layer)
    found = {spec.joined.removeprefix("0.") for spec in tensors}
    vectors, matrices = {*_VECTORS}, {*_MATRICES}
    optional = _OPTIONAL | _OUTER
    if one_layer.experts is not None:
        matrices = (matrices - {"gate_up", "down"}) | {*_EXPERT_MATRICES}
        vectors |= {*_EXPERT_VECTORS}
        optional = optional | {*_EXPERT_VECTORS} - {"router"} | {"shared_gate_up", "shared_down"}
    needed = (vectors | matrices) - optional
    biases = {f"{name}.bias" for name in matrices}
    return needed <= found and found <= vectors | matrices | biases | _OUTER


def _fits(config: ModelConfig) -> bool:
    inner = config.num_heads * config.head_dim
    widths = [config.hidden_size, config.intermediate_size, inner, config.head_dim]
    widths += [rope.dim for rope in config.ropes]
    if config.experts is not None:
        widths += [config.experts.width, config.experts.shared_width]
    group = config.num_heads // config.num_kv_heads
    fits = group <= _MAX_GROUP and config.head_dim <= _MAX_HEAD_DIM
    return fits and not any(width % BLOCK for width in widths)
