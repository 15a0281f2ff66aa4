"""Bytes that no client should send: what is no HTTP/2, HTTP/2 against its rules, calls against
gRPC's, and the like for a port that speaks HTTP/1.1.
"""

from __future__ import annotations

import random
import struct
import zlib

from tests.faults.port import GENERATE, request
from tests.support import http2
from tests.support.http2 import frame, grpc_message

_SEED = 11
_BEGIN = http2.PREFACE + http2.settings()
_CALL = frame(http2.HEADERS, http2.END_HEADERS, 1, http2.call_headers(GENERATE))


def _headers(block: bytes, flags: int = http2.END_HEADERS, stream: int = 1) -> bytes:
    return _BEGIN + frame(http2.HEADERS, flags, stream, block)


def _long_headers(path: bytes) -> bytes:
    """The headers of a call in as many frames as they take."""
    block = http2.call_headers(path)
    parts = [block[i : i + 16_000] for i in range(0, len(block), 16_000)]
    kinds = [http2.HEADERS, *[http2.CONTINUATION] * (len(parts) - 1)]
    flags = [*[0] * (len(parts) - 1), http2.END_HEADERS]
    return b"".join(frame(k, f, 1, p) for k, f, p in zip(kinds, flags, parts, strict=True))


def garbage() -> dict[str, bytes]:
    """For the gRPC port, by what is wrong with it."""
    draw = random.Random(_SEED)
    message = grpc_message(request(2).SerializeToString())
    return {
        "random": draw.randbytes(100_000),
        "zeros": bytes(100_000),
        "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "HTTP/1.1 POST": b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n" + b"x" * 100_000,
        "another preface": b"PRI * HTTP/3.0\r\n\r\nSM\r\n\r\n",
        "random after the preface": _BEGIN + draw.randbytes(100_000),
        "a frame of 16 MiB": _BEGIN + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(1000),
        "data without a call": _BEGIN + frame(http2.DATA, 0, 1, b"x" * 100),
        "data on stream 0": _BEGIN + frame(http2.DATA, 0, 0, b"x" * 100),
        "headers on an even stream": _headers(http2.call_headers(GENERATE), stream=2),
        "a window of 2^31": _BEGIN + frame(http2.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff") * 2,
        "a window of 0": _BEGIN + frame(http2.WINDOW_UPDATE, 0, 0, bytes(4)),
        "settings of 5 bytes": http2.PREFACE + frame(http2.SETTINGS, payload=b"12345"),
        "settings, 20,000 times": http2.PREFACE + http2.settings({1: 0}) * 20_000,
        "pings, 20,000 times": _BEGIN + frame(http2.PING, payload=b"12345678") * 20_000,
        "a continuation of nothing": _BEGIN + frame(http2.CONTINUATION, 0, 1, b"x"),
        "continuations without end": _headers(b"\x00\x01a\x01b", flags=0)
        + frame(http2.CONTINUATION, 0, 1, b"\x00\x01a" + b"\x7f\x80\x01" + b"v" * 255) * 20_000,
        "resets, 5,000 times": _BEGIN
        + b"".join(
            frame(http2.HEADERS, http2.END_HEADERS, i, http2.call_headers(GENERATE))
            + frame(http2.RST_STREAM, 0, i, bytes(4))
            for i in range(1, 10_000, 2)
        ),
        "an index that is not there": _headers(b"\xff\xff\xff\xff\x0f"),
        "an index of 4 KB, 12,000 times": _headers(
            b"\x40\x01a\x7f\xa1\x1e" + b"v" * 4000 + b"\xbe" * 12_000
        ),
        "a table of 4 GiB": _headers(b"\x3f\xe1\xff\xff\xff\x0f"),
        "no path": _headers(http2.header_block((b":method", b"POST"), (b":scheme", b"http"))),
        "GET": _headers(
            http2.header_block(
                (b":method", b"GET"),
                (b":scheme", b"http"),
                (b":path", GENERATE),
                (b":authority", b"x"),
            )
        ),
        "a path that is no UTF-8": _headers(
            http2.call_headers(b"/diptych.v1\xff\xfe/Generate\x80")
        ),
        "an empty path": _headers(http2.call_headers(b"")),
        "a path of 60 KB": _BEGIN + _long_headers(b"/" + b"p" * 60_000),
        "a path of 600 KB": _BEGIN + _long_headers(b"/" + b"p" * 600_000),
        "metadata that is no UTF-8": _headers(
            http2.call_headers(GENERATE, (b"x-note", b"\xff\xfe"))
        ),
        "a name that is no UTF-8": _headers(http2.call_headers(GENERATE, (b"\xff\xfe", b"x"))),
        "a name with capitals": _headers(http2.call_headers(GENERATE, (b"X-Note", b"x"))),
        "a bad -bin value": _headers(http2.call_headers(GENERATE, (b"x-bin", b"!!!!"))),
        "a bad timeout": _headers(http2.call_headers(GENERATE, (b"grpc-timeout", b"soon"))),
        "a timeout of 0": _headers(http2.call_headers(GENERATE, (b"grpc-timeout", b"0n"))),
        "a timeout of centuries": _headers(
            http2.call_headers(GENERATE, (b"grpc-timeout", b"99999999H"))
        ),
        "another content type": _headers(
            http2.header_block(
                (b":method", b"POST"),
                (b":scheme", b"http"),
                (b":path", GENERATE),
                (b":authority", b"x"),
                (b"content-type", b"text/html"),
            )
        ),
        "an unknown encoding": _headers(http2.call_headers(GENERATE, (b"grpc-encoding", b"zip")))
        + frame(http2.DATA, http2.END_STREAM, 1, grpc_message(b"x", compressed=True)),
        "a message of 4 GiB": _BEGIN
        + _CALL
        + frame(http2.DATA, 0, 1, b"\x00\xff\xff\xff\xff" + b"x" * 100),
        "a message with a bad flag": _BEGIN
        + _CALL
        + frame(http2.DATA, 1, 1, b"\x07\x00\x00\x00\x01x"),
        "a message and half a second one": _BEGIN
        + _CALL
        + frame(http2.DATA, 1, 1, message + b"\x00\x00\x00"),
        "two messages in a unary call": _BEGIN + _CALL + frame(http2.DATA, 1, 1, message * 2),
        "half a message, ended": _BEGIN
        + _CALL
        + frame(http2.DATA, 1, 1, b"\x00\x00\x00\x00\x09abc"),
        "headers twice": _BEGIN + _CALL + _CALL,
        "a stream that depends on its own number": _BEGIN
        + frame(http2.PRIORITY, 0, 1, b"\x00\x00\x00\x01\x10"),
        "goodbye": _BEGIN + frame(http2.GOAWAY, 0, 0, bytes(8)),
    }


def gzip_of_zeros(size: int) -> bytes:
    """A gzip of so many zeros, a multiple of 1 MiB, made without them: one MiB again and again."""
    chunk, count = bytes(1 << 20), size >> 20
    squeezer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    part = squeezer.compress(chunk) + squeezer.flush(zlib.Z_FULL_FLUSH)
    checksum = 0
    for _ in range(count):
        checksum = zlib.crc32(chunk, checksum)
    head = b"\x1f\x8b\x08" + bytes(6) + b"\xff"
    return head + part * count + squeezer.flush() + struct.pack("<II", checksum, size % 2**32)


def http_garbage() -> dict[str, bytes]:
    """For the HTTP port."""
    draw = random.Random(_SEED)
    return {
        "random": draw.randbytes(100_000),
        "a preface of HTTP/2": _BEGIN,
        "no version": b"GET /health\r\n\r\n",
        "a bad method": b"G\x00T /health HTTP/1.1\r\nHost: x\r\n\r\n",
        "no host": b"GET /health HTTP/1.1\r\n\r\n",
        "huge headers": b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 10_000_000 + b"\r\n\r\n",
        "a million headers": b"GET /health HTTP/1.1\r\nHost: x\r\n"
        + b"X: y\r\n" * 1_000_000
        + b"\r\n",
        "a huge target": b"GET /" + b"x" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        "a huge body": b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 20000000\r\n\r\n"
        + bytes(20_000_000),
        "a negative length": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        "two lengths": b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        "a target that is not ASCII": b"GET /\xff%ff%zz%00 HTTP/1.1\r\nHost: x\r\n\r\n",
        "a target of escapes": b"GET /%ff%zz%00%2e%2e HTTP/1.1\r\nHost: x\r\n\r\n",
        "bad chunks": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n",
        "a thousand in a row": b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 1_000,
        "an upgrade": b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
        "a way out": b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    }
