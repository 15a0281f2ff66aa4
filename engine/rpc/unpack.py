"""Compressed requests, unpacked within the bound that holds for plain ones.

gRPC would unpack a message before its size is looked at, so it hands messages on as they came
(`grpc.per_message_decompression` is off). It does not show which of them are compressed, but they
show it themselves: gzip begins with a tag that no protobuf has, and zlib, which gRPC calls deflate,
ends with a checksum of all of it.

Small messages are unpacked at once. The others wait for one of a few threads, so that a few of them
are in memory at a time, however many callers send some.
"""

from __future__ import annotations

import asyncio
import zlib

from engine.errors import TooLarge
from engine.rpc.channel import MAX_MESSAGE_BYTES

SERVER_OPTIONS = (("grpc.per_message_decompression", 0),)

_GZIP, _ZLIB = b"\x1f\x8b", 0x78  # 32 KiB windows, as all of gRPC's zlib has
_GZIP_BITS, _ZLIB_BITS = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS
_PIECE_BYTES = 1 << 20
_SMALL_BYTES = 1 << 14  # compressed; of these a bomb is 16 MiB, some 20 ms
_AT_ONCE = 2


class Unpacker:
    """Unpacks the requests of one server."""

    def __init__(self, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def plain(self, raw: bytes) -> bytes:
        """`raw`, unpacked if it is compressed. Raises TooLarge, ValueError for half a message."""
        if not _looks_compressed(raw):
            return raw
        if len(raw) <= _SMALL_BYTES:
            return unpack(raw, self._max_bytes)
        async with self._slots:
            return await asyncio.to_thread(unpack, raw, self._max_bytes)


def unpack(raw: bytes, max_bytes: int) -> bytes:
    """See Unpacker.plain."""
    if not _looks_compressed(raw):
        return raw
    is_gzip = raw.startswith(_GZIP)
    unpacker = zlib.decompressobj(_GZIP_BITS if is_gzip else _ZLIB_BITS)
    pieces: list[bytes] = []
    size, rest = 0, raw
    try:
        while not unpacker.eof:
            pieces.append(unpacker.decompress(rest, _PIECE_BYTES))
            size += len(pieces[-1])
            if size > max_bytes:
                raise TooLarge(f"request: unpacked it is larger than {max_bytes} bytes")
            if not pieces[-1] and not unpacker.eof:
                raise zlib.error("cut off")
            rest = unpacker.unconsumed_tail
        if unpacker.unused_data:
            raise zlib.error("more than one message")
    except zlib.error as error:
        if not is_gzip:  # a protobuf may begin like that
            return raw
        raise ValueError(str(error)) from None
    return b"".join(pieces)


def _looks_compressed(raw: bytes) -> bool:
    if raw.startswith(_GZIP):
        return True
    return len(raw) > 1 and raw[0] == _ZLIB and (raw[0] << 8 | raw[1]) % 31 == 0
