"""Counts what a message will become before it is parsed.

Parsing is one call with the GIL held, and each message within a message, empty ones of two bytes
too, becomes an object of 50 bytes and more. Counting walks the wire by the descriptors, in steps
between which other threads run, and stops at the bound. Bytes that are no message are passed on:
the parser says so.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor

Descriptor = Any  # of a message: each implementation of protobuf has a type of its own

MAX_FIELDS = 524_288  # fields of a request, of all messages in it; a packed list is one
SMALL_BYTES = 64 * 1024  # what a message of this size becomes is little

_VARINT, _FIXED64, _BYTES, _START_GROUP, _END_GROUP, _FIXED32 = range(6)


def has_too_many_fields(raw: bytes, kind: Descriptor, at_most: int = MAX_FIELDS) -> bool:
    """Whether `raw` holds more than `at_most` fields of `kind` and of the messages in it."""
    messages = _messages_of(kind)
    ends: list[tuple[int, dict[int, Descriptor]]] = []  # of the messages around this one
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
            below = messages.get(tag >> 3)
            if at + size > end:
                return False
            if below is None:
                at += size
            else:
                ends.append((end, messages))
                end, messages = at + size, _messages_of(below)
        elif wire not in (_START_GROUP, _END_GROUP):
            return False


_KNOWN: dict[Descriptor, dict[int, Descriptor]] = {}


def _messages_of(kind: Descriptor) -> dict[int, Descriptor]:
    """The fields of `kind` that are messages, by number."""
    if (found := _KNOWN.get(kind)) is None:
        found = _KNOWN[kind] = {
            field.number: field.message_type
            for field in kind.fields
            if field.type == FieldDescriptor.TYPE_MESSAGE
        }
    return found


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """A number and the position behind it; past the end where it is cut off."""
    value = shift = 0
    for i in range(at, min(at + 10, len(raw))):
        byte = raw[i]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, i + 1
        shift += 7
    return value, len(raw)
