"""Unpacks compressed requests within the size limit of plain ones.

gRPC unpacks a message before it checks its size, so `grpc.per_message_decompression` is off. gRPC
does not show which messages are compressed, but their content does: gzip begins with a tag that no
protobuf has, and zlib (gRPC's "deflate") ends with a checksum.

Small messages are unpacked at once. Others wait for one of a few threads, so that only a few
unpacked messages are in memory at a time.
"""

from __future__ import annotations

import asyncio
import zlib

from engine.base.errors import TooLarge
from engine.rpc.channel import MAX_MESSAGE_BYTES

SERVER_OPTIONS = (("grpc.per_message_decompression", 0),)

_GZIP, _ZLIB = b"\x1f\x8b", 0x78  # 32 KiB window, which gRPC's zlib always uses
_GZIP_BITS, _ZLIB_BITS = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS
_PIECE_BYTES = 1 << 20
_SMALL_BYTES = 1 << 12  # compressed; at most 4 MiB unpacked
_AT_ONCE = 2


class Unpacker:
    """Unpacks the requests of one server."""

    def __init__(self, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def plain(self, raw: bytes) -> bytes:
        """`raw`, unpacked if compressed. Raises TooLarge; ValueError for an incomplete message."""
        if not _looks_compressed(raw):
            return raw
        if len(raw) <= _SMALL_BYTES:
            return unpack(raw, self._max_bytes)
        async with self._slots:
            return await asyncio.to_thread(unpack, raw, self._max_bytes)


def unpack(raw: bytes, max_bytes: int) -> bytes:
    """See Unpacker.plain. The size is measured before all of the message is held."""
    if not _looks_compressed(raw):
        return raw
    bits = _GZIP_BITS if raw.startswith(_GZIP) else _ZLIB_BITS
    try:
        piece, size = _measure(raw, bits, max_bytes)
        return piece if len(piece) == size else zlib.decompress(raw, bits, size)
    except zlib.error as error:
        if bits == _ZLIB_BITS:  # an uncompressed protobuf may begin like zlib
            return raw
        raise ValueError(str(error)) from None


def _measure(raw: bytes, bits: int, max_bytes: int) -> tuple[bytes, int]:
    """The first piece of the unpacked message, and the size of all of it. Raises TooLarge."""
    unpacker = zlib.decompressobj(bits)
    first = piece = unpacker.decompress(raw, _PIECE_BYTES)
    size = len(piece)
    while not unpacker.eof:
        piece = unpacker.decompress(unpacker.unconsumed_tail, _PIECE_BYTES)
        size += len(piece)
        if size > max_bytes:
            break
        if not piece and not unpacker.eof:
            raise zlib.error("cut off")
    if size > max_bytes:
        raise TooLarge(f"request: larger than {max_bytes} bytes when unpacked")
    if unpacker.unused_data:
        raise zlib.error("more than one message")
    return first, size


def _looks_compressed(raw: bytes) -> bool:
    if raw.startswith(_GZIP):
        return True
    return len(raw) > 1 and raw[0] == _ZLIB and (raw[0] << 8 | raw[1]) % 31 == 0
