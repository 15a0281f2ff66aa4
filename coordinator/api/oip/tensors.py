"""Tensors of the Open Inference Protocol <-> Python values. Pure.

Elements are typed contents or raw bytes, little-endian and without padding. A raw BYTES element
follows its length in four bytes. A request uses one form for all of its tensors.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.base.errors import InvalidRequest
from engine.pb.inference import grpc_service_pb2

BYTES = "BYTES"
# Datatype -> struct's letter and the field of typed contents.
_NUMBERS = {
    "BOOL": ("?", "bool_contents"),
    "INT8": ("b", "int_contents"),
    "INT16": ("h", "int_contents"),
    "INT32": ("i", "int_contents"),
    "INT64": ("q", "int64_contents"),
    "UINT8": ("B", "uint_contents"),
    "UINT16": ("H", "uint_contents"),
    "UINT32": ("I", "uint_contents"),
    "UINT64": ("Q", "uint64_contents"),
    "FP32": ("f", "fp32_contents"),
    "FP64": ("d", "fp64_contents"),
}
_KNOWN = ", ".join((BYTES, *_NUMBERS))
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Tensor:
    """Elements row by row: bool, int, float or bytes."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Sequence[Any]


def read_tensors(request: grpc_service_pb2.ModelInferRequest) -> dict[str, Tensor]:
    """A request's inputs by name. Raises InvalidRequest naming the input."""
    raws = request.raw_input_contents
    if raws and len(raws) != len(request.inputs):
        raise InvalidRequest(
            "raw_input_contents",
            f"{len(raws)} entries for {len(request.inputs)} inputs; expected one an input",
        )
    tensors: dict[str, Tensor] = {}
    for i, pb in enumerate(request.inputs):
        field = f"inputs.{pb.name or i}"
        if pb.name in tensors:
            raise InvalidRequest(field, "given twice")
        tensors[pb.name] = _read(field, pb, raws[i] if raws else None)
    return tensors


def _read(
    field: str, pb: grpc_service_pb2.ModelInferRequest.InferInputTensor, raw: bytes | None
) -> Tensor:
    if not pb.name:
        raise InvalidRequest(f"{field}.name", "unset")
    if any(key.startswith("shared_memory") for key in pb.parameters):
        raise InvalidRequest(f"{field}.parameters", "shared memory is not served; send the bytes")
    if pb.datatype != BYTES and pb.datatype not in _NUMBERS:
        raise InvalidRequest(f"{field}.datatype", f"{pb.datatype!r}; expected one of {_KNOWN}")
    shape = tuple(pb.shape)
    if any(size < 0 for size in shape):
        raise InvalidRequest(f"{field}.shape", f"{list(shape)}; expected sizes of 0 or more")
    if raw is None:
        values = _typed(field, pb, shape)
    elif pb.HasField("contents") and pb.contents.ByteSize():
        raise InvalidRequest(f"{field}.contents", "set beside raw_input_contents")
    elif pb.datatype == BYTES:
        values = _unpack_bytes(field, raw, shape)
    else:
        values = _unpack_numbers(field, pb.datatype, raw, shape)
    return Tensor(pb.name, pb.datatype, shape, values)


def _typed(
    field: str, pb: grpc_service_pb2.ModelInferRequest.InferInputTensor, shape: tuple[int, ...]
) -> Sequence[Any]:
    name = "bytes_contents" if pb.datatype == BYTES else _NUMBERS[pb.datatype][1]
    values: Sequence[Any] = getattr(pb.contents, name)
    if len(values) != math.prod(shape):
        raise InvalidRequest(
            f"{field}.contents.{name}",
            f"{len(values)} elements; a {pb.datatype} of shape {list(shape)} has"
            f" {math.prod(shape)}",
        )
    return values


def _unpack_numbers(field: str, datatype: str, raw: bytes, shape: tuple[int, ...]) -> Sequence[Any]:
    count, letter = math.prod(shape), _NUMBERS[datatype][0]
    size = struct.calcsize(f"<{letter}")
    if len(raw) != count * size:
        raise InvalidRequest(
            field, f"{len(raw)} bytes; a {datatype} of shape {list(shape)} has {count * size}"
        )
    return struct.unpack(f"<{count}{letter}", raw)


def _unpack_bytes(field: str, raw: bytes, shape: tuple[int, ...]) -> Sequence[bytes]:
    values: list[bytes] = []
    at = 0
    while at < len(raw):
        start = at + _LENGTH.size
        end = start + _LENGTH.unpack_from(raw, at)[0] if start <= len(raw) else start
        if end > len(raw):
            raise InvalidRequest(
                field, f"raw BYTES end within element {len(values)}; lengths take 4 bytes each"
            )
        values.append(raw[start:end])
        at = end
    if len(values) != math.prod(shape):
        raise InvalidRequest(
            field, f"{len(values)} BYTES elements; shape {list(shape)} has {math.prod(shape)}"
        )
    return values


def scalar(tensor: Tensor) -> Any:
    """The one element of a tensor of shape [1] or [1, 1]."""
    if tensor.shape not in ((1,), (1, 1)):
        raise InvalidRequest(
            f"inputs.{tensor.name}.shape",
            f"{list(tensor.shape)}; expected [1] or [1, 1]: a request carries one prompt",
        )
    return tensor.values[0]


def row(tensor: Tensor) -> list[Any]:
    """The elements of a tensor of shape [k] or [1, k]."""
    if len(tensor.shape) not in (1, 2) or (len(tensor.shape) == 2 and tensor.shape[0] != 1):
        raise InvalidRequest(
            f"inputs.{tensor.name}.shape",
            f"{list(tensor.shape)}; expected [k] or [1, k]: a request carries one prompt",
        )
    return list(tensor.values)


def text(field: str, raw: bytes) -> str:
    """The text of a BYTES element."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(field, f"not valid UTF-8 at byte {error.start}") from None


def write_tensor(
    response: grpc_service_pb2.ModelInferResponse, tensor: Tensor, *, raw: bool
) -> None:
    """Append an output; all those of a response are raw or none is."""
    pb = response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    if tensor.datatype == BYTES:
        if raw:
            packed = b"".join(_LENGTH.pack(len(value)) + value for value in tensor.values)
            response.raw_output_contents.append(packed)
        else:
            pb.contents.bytes_contents.extend(tensor.values)
        return
    letter, field = _NUMBERS[tensor.datatype]
    if raw:
        response.raw_output_contents.append(
            struct.pack(f"<{len(tensor.values)}{letter}", *tensor.values)
        )
    else:
        getattr(pb.contents, field).extend(tensor.values)
