"""Clients that gRPC's server would never cut off, or that would kill it."""

import asyncio
import gc
import gzip
import time
import zlib
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2
from prometheus_client import CollectorRegistry

from engine.base.errors import TooLarge
from engine.pb.diptych.v1 import inference_pb2
from engine.rpc import listener as listener_module
from engine.rpc.channel import MAX_MESSAGE_BYTES, open_channel
from engine.rpc.server import RpcServer
from engine.rpc.unpack import unpack
from engine.telemetry.metrics import RpcMetrics
from tests.support import http2
from tests.support.http2 import RawConnection, frame, grpc_message

GENERATE = b"/diptych.v1.InferenceService/Generate"
TOKENIZE = "/diptych.v1.InferenceService/Tokenize"


class Endless:
    def __init__(self):
        self.begun = asyncio.Event()
        self.closed = asyncio.Event()

    async def Generate(self, request, context):
        try:
            while True:
                self.begun.set()
                yield inference_pb2.GenerateResponse(request_id="x" * 1000)
                await asyncio.sleep(0.001)
        finally:
            self.closed.set()

    async def Tokenize(self, request, context):
        return inference_pb2.TokenizeResponse(token_ids=[len(request.text)])

    Chat = Generate
    Detokenize = ListModels = GetModel = Tokenize


@asynccontextmanager
async def serving(**options):
    registry, endless = CollectorRegistry(), Endless()
    server = RpcServer(RpcMetrics(registry), **options)
    server.add_service(inference_pb2.DESCRIPTOR.services_by_name["InferenceService"], endless)
    address = f"127.0.0.1:{server.listen('127.0.0.1:0')}"
    await server.start()
    try:
        yield address, endless, registry
    finally:
        await server.stop()


async def ends(raw, stream, timeout_s=5.0):
    return await asyncio.to_thread(raw.wait_for_end, stream, timeout_s)


def failures(registry, method, code):
    labels = {"method": method, "code": code}
    return registry.get_sample_value("diptych_rpc_failures_total", labels)


async def code_of(channel, path, raw, **how):
    try:
        await channel.unary_unary(path)(raw, timeout=5, **how)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_a_call_that_ends_without_a_message():
    async with serving() as (address, _, registry):
        with RawConnection(address) as raw:
            raw.begin()
            for path in (GENERATE, TOKENIZE.encode()):
                assert await ends(raw, raw.open_stream(path, end=True))
        for method in ("Generate", "Tokenize"):
            assert failures(registry, f"InferenceService/{method}", "invalid_argument") == 1


async def test_a_request_that_never_arrives():
    async with serving(client_timeout_s=0.6) as (address, _, registry):
        with RawConnection(address) as raw:
            raw.begin()
            silent, half = raw.open_stream(GENERATE), raw.open_stream(TOKENIZE.encode())
            raw.send(frame(http2.DATA, 0, half, grpc_message(b"abc", length=100)))
            assert await ends(raw, silent)
            assert await ends(raw, half)
        assert failures(registry, "InferenceService/Generate", "deadline_exceeded") == 1


async def test_a_client_that_does_not_read():
    async with serving(client_timeout_s=0.6) as (address, endless, registry):
        with RawConnection(address) as raw:
            raw.begin({http2.INITIAL_WINDOW_SIZE: 0})
            raw.request(GENERATE, b"")
            await asyncio.wait_for(endless.begun.wait(), 5)
            assert not await ends(raw, 1, 1.5)  # otherwise it behaves: it answers pings
            assert endless.closed.is_set(), "what it held is released"
            assert failures(registry, "InferenceService/Generate", "deadline_exceeded") == 1
            for stream in (0, 1):
                raw.send(frame(http2.WINDOW_UPDATE, 0, stream, (2**20).to_bytes(4, "big")))
            assert await ends(raw, 1), "a client that reads again gets the reason"


async def test_a_connection_that_does_not_answer_pings():
    async with serving(client_timeout_s=0.6) as (address, endless, registry):
        with RawConnection(address, polite=False) as raw:
            raw.begin()
            raw.request(GENERATE, b"")
            await asyncio.wait_for(endless.begun.wait(), 5)
            await asyncio.wait_for(endless.closed.wait(), 5)
        assert failures(registry, "InferenceService/Generate", "deadline_exceeded") is None


async def test_a_deadline_while_the_client_does_not_read(caplog):
    """It is no failure of the server: no error in the log, none in the counters."""
    async with serving() as (address, endless, registry):
        with RawConnection(address) as raw:
            raw.begin({http2.INITIAL_WINDOW_SIZE: 0})
            for _ in range(8):
                raw.request(GENERATE, b"", (b"grpc-timeout", b"300m"))
            await asyncio.wait_for(endless.closed.wait(), 5)
            await asyncio.sleep(0.3)
        assert failures(registry, "InferenceService/Generate", "internal") is None
    # gRPC has one poller a process, which passes late events to loops of tests that have ended.
    records = [r for r in caplog.records if "PollerCompletionQueue" not in r.getMessage()]
    assert not [r for r in records if r.levelname == "ERROR" or r.exc_info]


async def test_a_method_name_that_is_no_utf8_does_not_affect_others(caplog, monkeypatch):
    """It kills a grpc.aio server; the listener replaces it, and running calls continue."""
    monkeypatch.setattr(listener_module, "_POLL_S", 600.0)  # the end of the accept task is enough
    async with serving() as (address, _, registry), open_channel(address) as channel:
        answer = channel.unary_stream(GENERATE.decode())(b"")
        assert await answer.read()
        for times in (1, 2):
            with RawConnection(address) as raw:
                raw.begin()
                raw.open_stream(b"/diptych.v1.\xff\xfe/\x80", end=True)
                deadline = time.monotonic() + 5
                while failures(registry, "server", "died") != times:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.02)
            async with open_channel(address) as another:
                assert await code_of(another, TOKENIZE, b"") is grpc.StatusCode.OK
            for _ in range(50):
                assert await answer.read() is not grpc.aio.EOF
        answer.cancel()
    gc.collect()
    assert not [r for r in caplog.records if r.exc_info and r.exc_info[0]]


async def test_malformed_bytes_to_health_and_reflection(caplog):
    async with serving() as (address, _, _), open_channel(address) as channel:
        check = "/grpc.health.v1.Health/Check"
        assert await code_of(channel, check, b"\xff") is grpc.StatusCode.INVALID_ARGUMENT
        assert await code_of(channel, check, b"") is grpc.StatusCode.OK
        assert await code_of(channel, check, b"\x0a\x01x") is grpc.StatusCode.NOT_FOUND
        for version in ("v1", "v1alpha"):
            path = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
            call = channel.stream_stream(path)()
            await call.write(b"\xff")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")
        assert await watch.read() == b"\x08\x01"
        watch.cancel()
    assert not [r for r in caplog.records if r.exc_info]


@pytest.mark.parametrize("packing", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_requests_are_unpacked(packing):
    async with serving() as (address, _, _), open_channel(address) as channel:
        tokenize = channel.unary_unary(TOKENIZE)
        for size in (0, 1, 100, 10_000, 3_000_000):
            request = inference_pb2.TokenizeRequest(text="a" * size).SerializeToString()
            answer = await tokenize(request, compression=packing, timeout=10)
            (counted,) = inference_pb2.TokenizeResponse.FromString(answer).token_ids
            assert counted == size
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")
        service = health_pb2.HealthCheckRequest(service="s" * 5000).SerializeToString()
        call = watch(service, compression=packing, timeout=10)
        assert await call.read() == b"\x08\x03"  # an unknown service
        call.cancel()


@pytest.mark.parametrize("packing", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_the_size_limit_applies_to_unpacked_messages(caplog, packing):
    bomb = bytes(MAX_MESSAGE_BYTES + 1)
    async with serving() as (address, _, registry), grpc.aio.insecure_channel(address) as channel:
        code = await code_of(channel, TOKENIZE, bomb, compression=packing)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert failures(registry, "InferenceService/Tokenize", "resource_exhausted") == 1
    assert not [r for r in caplog.records if r.levelname == "ERROR" or r.exc_info]


async def test_a_corrupt_compressed_request_is_an_invalid_argument():
    good = gzip.compress(inference_pb2.TokenizeRequest(text="a" * 900).SerializeToString())
    async with serving() as (address, _, registry):
        with RawConnection(address) as raw:
            raw.begin()
            for packed in (good[:-9], good[:-8] + bytes(8), good + good, good[:2]):
                stream = raw.open_stream(TOKENIZE.encode(), (b"grpc-encoding", b"gzip"))
                body = grpc_message(packed, compressed=True)
                raw.send(frame(http2.DATA, http2.END_STREAM, stream, body))
                assert await ends(raw, stream)
        assert failures(registry, "InferenceService/Tokenize", "invalid_argument") == 4


def test_unpacking():
    many = bytes(range(256)) * 20_000
    for size in (0, 1, 2**20 - 1, 2**20, 2**20 + 1, len(many)):
        assert unpack(gzip.compress(many[:size], 1), size) == many[:size]
        assert unpack(zlib.compress(many[:size], 1), size) == many[:size]
    with pytest.raises(TooLarge):
        unpack(gzip.compress(many, 1), len(many) - 1)
    packed = zlib.compress(b"a" * 1000)
    assert unpack(packed, 1000) == b"a" * 1000
    assert unpack(gzip.compress(b""), 0) == b""
    for plain in (b"", b"x", b"\x78", b"\x78\x01", b"\x78\x9c" + b"a" * 50, packed[:-1]):
        assert unpack(plain, 1000) == plain  # field 15 of a protobuf
    for bomb in (packed, gzip.compress(b"a" * 1000)):
        with pytest.raises(TooLarge):
            unpack(bomb, 999)


async def test_metadata_that_is_no_utf8_leaves_no_traceback(caplog):
    async with serving() as (address, _, _):
        with RawConnection(address) as raw:
            raw.begin()
            assert await ends(raw, raw.request(TOKENIZE.encode(), b"", (b"x-note", b"\xff\xfe")))
    assert not [r for r in caplog.records if r.exc_info]


async def test_silent_connections_are_closed():
    async with serving() as (address, _, _):
        socks = [http2.connect(address) for _ in range(3)]
        socks[1].sendall(http2.PREFACE)
        socks[2].sendall(http2.PREFACE + http2.settings())  # never acknowledges settings
        closed = (asyncio.to_thread(http2.closed_by_peer, sock, 15.0) for sock in socks)
        assert await asyncio.gather(*closed) == [True] * 3
        for sock in socks:
            sock.close()
