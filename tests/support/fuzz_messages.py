"""Inputs for the fuzz of the public API, made from the protobuf descriptors; each is a function of
(seed, index) alone.

    descriptor --wire bytes by hand--> one message --joined, mutated--> Input

Bytes are written by hand and not by protobuf, so that they may say what protobuf would not: numbers
too large for their field, strings that are no UTF-8, both sides of a oneof, a field twice, fields
that are not in the schema.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import (
    Descriptor,
    FieldDescriptor,
    MethodDescriptor,
    OneofDescriptor,
)
from google.protobuf.message import DecodeError, Message

from engine.pb.diptych.v1 import admin_pb2, inference_pb2
from engine.pb.inference import grpc_service_pb2
from engine.pb.vllm import vllm_engine_pb2
from tests.support.fuzz_values import NEEDED, TAME, edge, long_string

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_OF_BYTES = (
    FieldDescriptor.TYPE_STRING,
    FieldDescriptor.TYPE_BYTES,
    FieldDescriptor.TYPE_MESSAGE,
)
_COUNTS = (0, 1, 1, 2, 3, 17)
_MANY = 1000
_NUM_LONG = 2  # strings of 1e5 characters in one message, at most
_MOST_TEXT = 4_000_000  # bytes of text in one message: it shall fit in 64 MiB
_MOST_MESSAGES = 2_500  # within one: a thousand messages of a thousand calls take a second to write
# How often a method is called, and how wild its input is.
_WEIGHTS = {
    "Generate": 30,
    "Chat": 25,
    "Tokenize": 12,
    "Detokenize": 12,
    "GetModel": 6,
    "DrainWorker": 7,
    "ListModels": 4,
    "ListWorkers": 4,
}
# The protocols of others on the same port, in a run of their own.
_BESIDE_WEIGHTS = {
    "GRPCInferenceService.ModelInfer": 30,
    "GRPCInferenceService.ModelStreamInfer": 20,
    "GRPCInferenceService.ServerReady": 1,
    "GRPCInferenceService.ModelReady": 3,
    "GRPCInferenceService.ModelMetadata": 3,
    "GRPCInferenceService.ModelConfig": 3,
    "VllmEngine.Generate": 30,
    "VllmEngine.Abort": 5,
    "VllmEngine.HealthCheck": 2,
    "VllmEngine.GetModelInfo": 2,
    "VllmEngine.GetServerInfo": 1,
}
_WILDNESS = (0.0, 0.0, 0.02, 0.05, 0.2, 1.0)


def _methods() -> dict[str, MethodDescriptor]:
    services = (
        inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
        admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
    )
    return {method.name: method for service in services for method in service.methods}


METHODS = _methods()


def _methods_beside() -> dict[str, MethodDescriptor]:
    services = (
        grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
        vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"],
    )
    return {f"{s.name}.{method.name}": method for s in services for method in s.methods}


BESIDE = _methods_beside()


@dataclass(frozen=True, slots=True)
class Input:
    """What one call sends. `kind`: how it was made."""

    index: int
    method: str
    kind: str
    raw: bytes

    @property
    def descriptor(self) -> MethodDescriptor:
        """The method's."""
        return METHODS.get(self.method) or BESIDE[self.method]

    @property
    def path(self) -> str:
        """The method on the wire."""
        return f"/{self.descriptor.containing_service.full_name}/{self.descriptor.name}"

    def parse(self) -> Message | None:
        """The request as protobuf reads it; None where these bytes are none."""
        message_class: type[Message] = message_factory.GetMessageClass(self.descriptor.input_type)
        try:
            return message_class.FromString(self.raw)
        except DecodeError:
            return None


def make_input(seed: int, index: int) -> Input:
    """The input `index` of the run `seed`."""
    return draw_input(Random(f"{seed}:{index}"), index)


def make_input_beside(seed: int, index: int) -> Input:
    """The same for the protocols beside ours."""
    return draw_input(Random(f"{seed}:{index} beside"), index, _BESIDE_WEIGHTS)


def draw_input(random: Random, index: int = 0, weights: Mapping[str, int] | None = None) -> Input:
    """Any input; `random` may be hypothesis's, which can shrink it."""
    weights = weights or _WEIGHTS
    (method,) = random.choices([*weights], [*weights.values()])
    descriptor = (METHODS.get(method) or BESIDE[method]).input_type
    writer = Writer(random, random.choice(_WILDNESS))
    raw = writer.message(descriptor)
    kind = "sensible" if writer.wildness == 0 else "wild"
    drawn = random.random()
    if drawn < 0.05:
        kind, raw = "joined", raw + Writer(random, random.choice(_WILDNESS)).message(descriptor)
    elif drawn < 0.30:
        kind, raw = "mutated", mutate(random, raw)
    elif drawn < 0.32:
        kind, raw = "random", random.randbytes(random.choice((1, 2, 7, 64, 1000)))
    return Input(index, method, kind, raw)


class Writer:
    """Writes messages; each decision goes off the road with the probability `wildness`."""

    def __init__(self, random: Random, wildness: float) -> None:
        self.wildness = wildness
        self._random = random
        self._presence = random.choice((0.1, 0.4, 0.9))
        self._num_long = _NUM_LONG if random.random() < 0.1 else 0
        self._room = _MOST_TEXT
        self._num_messages = 0

    def message(self, descriptor: Descriptor) -> bytes:
        """The bytes of a message."""
        chosen = {o.name: self._random.choice(o.fields).name for o in _real(descriptor)}
        parts = []
        for field in descriptor.fields:
            oneof = field.containing_oneof
            alone = oneof is None or oneof.name not in chosen
            if oneof and not alone and chosen[oneof.name] != field.name and not self._wild():
                continue
            if self._is_present(descriptor, field, oneof.name if oneof and not alone else ""):
                parts.append(self._field(descriptor, field))
        if self._wild():
            self._random.shuffle(parts)
        if parts and self._wild():
            parts.append(self._random.choice(parts))
        if self._wild():
            parts.append(self._unknown())
        return b"".join(parts)

    def _wild(self) -> bool:
        return self._random.random() < self.wildness

    def _is_present(self, descriptor: Descriptor, field: FieldDescriptor, oneof: str) -> bool:
        if not self._wild():
            tame = _tame(descriptor, field)
            if tame is None and {field.name, f"{descriptor.name}.{field.name}"} & TAME.keys():
                return False
            if {field.name, oneof, f"{descriptor.name}.{field.name}"} & NEEDED:
                return True
        return self._random.random() < self._presence

    def _field(self, descriptor: Descriptor, field: FieldDescriptor) -> bytes:
        tame = _tame(descriptor, field)
        sensible = tame is not None and not self._wild()
        if _is_map(field):
            pairs = tame(self._random) if sensible and tame else self._pairs(field)
            return b"".join(self._entry(field, key, value) for key, value in pairs)
        if field.message_type is not None and sensible and tame:
            return b"".join(_delimited(field.number, raw) for raw in tame(self._random))
        if field.message_type is not None:
            once = not field.is_repeated or (field.name == "resume" and not self._wild())
            count = 1 if once or self._num_messages > _MOST_MESSAGES else self._count()
            self._num_messages += count
            return b"".join(
                _delimited(field.number, self.message(field.message_type)) for _ in range(count)
            )
        if not field.is_repeated:
            return self._scalar(field, tame(self._random) if sensible and tame else None)
        if sensible and tame:
            values = tame(self._random)
        else:
            values = [self._edge(field) for _ in range(self._count())]
        if _wire_type(field) == _BYTES or self._wild():  # numbers may come unpacked
            return b"".join(self._scalar(field, value) for value in values)
        return _delimited(field.number, b"".join(_payload(field, value) for value in values))

    def _count(self) -> int:
        if not self._wild():
            return max(1, self._random.choice(_COUNTS))
        return _MANY if self._random.random() < 0.05 else self._random.choice(_COUNTS)

    def _scalar(self, field: FieldDescriptor, value: Any = None) -> bytes:
        value = self._edge(field) if value is None else value
        return _tag(field.number, _wire_type(field)) + _payload(field, value)

    def _edge(self, field: FieldDescriptor) -> Any:
        if field.message_type is not None:  # of a map
            return self.message(field.message_type)
        if _wire_type(field) != _BYTES:
            return edge(self._random, field)
        value = long_string(self._random) if self._num_long else edge(self._random, field)
        self._num_long = max(0, self._num_long - 1)
        self._room -= len(value)
        return value if self._room > 0 else b"a"

    def _pairs(self, field: FieldDescriptor) -> Sequence[tuple[Any, Any]]:
        key, value = _entry_fields(field)
        count = self._count() if self._num_messages <= _MOST_MESSAGES else 1
        self._num_messages += count if value.message_type is not None else 0
        return [(self._edge(key), self._edge(value)) for _ in range(count)]

    def _entry(self, field: FieldDescriptor, key: Any, value: Any) -> bytes:
        key_field, value_field = _entry_fields(field)
        parts = [self._scalar(key_field, key), self._scalar(value_field, value)]
        if self._wild():
            parts.pop(self._random.randrange(2))  # a map entry need not have both
        return _delimited(field.number, b"".join(parts))

    def _unknown(self) -> bytes:
        """A field that no version of the protocol has, of any wire type."""
        number = self._random.choice((15, 99, 1000, 19000, 2**29 - 1))
        kind = self._random.choice((_VARINT, _FIXED64, _BYTES, _FIXED32))
        payload = {
            _VARINT: varint(self._random.getrandbits(64)),
            _FIXED64: self._random.randbytes(8),
            _BYTES: varint(5) + self._random.randbytes(5),
            _FIXED32: self._random.randbytes(4),
        }[kind]
        return _tag(number, kind) + payload


def mutate(random: Random, raw: bytes) -> bytes:
    """The same bytes with a few of them changed, gone, doubled or new."""
    data = bytearray(raw)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        at = random.randrange(len(data) + 1)
        size = random.choice((1, 1, 2, 8, 64))
        match random.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << random.randrange(8)
            case 1 if data:
                data[at % len(data)] = random.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = random.randbytes(size)
            case 4:
                data[at:at] = data[at : at + size]
            case 5:
                del data[at:]
            case _:  # a length, or a group, that goes nowhere
                data[at:at] = random.choice((b"\xff" * 9 + b"\x01", b"\x0b" * 200, b"\x0a\xff\x7f"))
    return bytes(data)


def varint(value: int) -> bytes:
    """Base 128, a negative number as 64 bits."""
    value &= 2**64 - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _real(descriptor: Descriptor) -> list[OneofDescriptor]:
    """Its oneofs, without those that stand for `optional`."""
    return [o for o in descriptor.oneofs if not (len(o.fields) == 1 and o.name.startswith("_"))]


def _tame(descriptor: Descriptor, field: FieldDescriptor) -> Any:
    return TAME.get(f"{descriptor.name}.{field.name}") or TAME.get(field.name)


def _is_map(field: FieldDescriptor) -> bool:
    kind = field.message_type
    return bool(kind is not None and kind.GetOptions().map_entry)


def _entry_fields(field: FieldDescriptor) -> tuple[FieldDescriptor, FieldDescriptor]:
    assert field.message_type is not None
    fields = field.message_type.fields_by_name
    return fields["key"], fields["value"]


def _wire_type(field: FieldDescriptor) -> int:
    if field.type in _OF_BYTES:
        return _BYTES
    if field.type == FieldDescriptor.TYPE_FLOAT:
        return _FIXED32
    return _FIXED64 if field.type == FieldDescriptor.TYPE_DOUBLE else _VARINT


def _payload(field: FieldDescriptor, value: Any) -> bytes:
    match _wire_type(field):
        case 2:
            return varint(len(value)) + bytes(value)
        case 5:
            return struct.pack("<f", value)
        case 1:
            return struct.pack("<d", value)
    return varint(int(value))


def _tag(number: int, kind: int) -> bytes:
    return varint(number << 3 | kind)


def _delimited(number: int, raw: bytes) -> bytes:
    return _tag(number, _BYTES) + varint(len(raw)) + raw
