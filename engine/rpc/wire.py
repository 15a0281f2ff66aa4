"""Counts the fields of a protobuf message before it is parsed.

Parsing is one call that holds the GIL, and each nested message, even an empty one of two bytes,
becomes an object of 50 bytes or more. Counting walks the wire format by the descriptors, lets other
threads run in between, and stops at the bound. Malformed bytes are left to the parser.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor

Descriptor = Any  # of a message; its type depends on protobuf's implementation

MAX_FIELDS = 524_288  # fields of a request with all nested messages; a packed list is one
SMALL_BYTES = 64 * 1024  # smaller messages need no count

_VARINT, _FIXED64, _BYTES, _START_GROUP, _END_GROUP, _FIXED32 = range(6)


def has_too_many_fields(raw: bytes, kind: Descriptor, at_most: int = MAX_FIELDS) -> bool:
    """Whether a message of type `kind` has more than `at_most` fields, nested ones included."""
    messages = _messages_of(kind)
    ends: list[tuple[int, dict[int, Descriptor]]] = []  # of the enclosing messages
    at, end, count = 0, len(raw), 0
    while True:
        while at >= end:
            if not ends:
                return False
            end, messages = ends.pop()
        count += 1
        if count > at_most:
            return True
        tag, at = _varint(raw, at)
        wire = tag & 7
        if wire == _VARINT:
            _, at = _varint(raw, at)
        elif wire == _FIXED64:
            at += 8
        elif wire == _FIXED32:
            at += 4
        elif wire == _BYTES:
            size, at = _varint(raw, at)
            nested = messages.get(tag >> 3)
            if at + size > end:
                return False
            if nested is None:
                at += size
            else:
                ends.append((end, messages))
                end, messages = at + size, _messages_of(nested)
        elif wire not in (_START_GROUP, _END_GROUP):
            return False


_KNOWN: dict[Descriptor, dict[int, Descriptor]] = {}


def _messages_of(kind: Descriptor) -> dict[int, Descriptor]:
    """The types of message fields of `kind`, by field number."""
    if (found := _KNOWN.get(kind)) is None:
        found = _KNOWN[kind] = {
            field.number: field.message_type
            for field in kind.fields
            if field.type == FieldDescriptor.TYPE_MESSAGE
        }
    return found


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """A number and the position after it; the end of `raw` if it is truncated."""
    value = shift = 0
    for i in range(at, min(at + 10, len(raw))):
        byte = raw[i]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, i + 1
        shift += 7
    return value, len(raw)
