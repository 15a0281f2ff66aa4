"""Streams with few messages: `Alive`, time limits, and the bound on idle streams."""

import asyncio
import time
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from coordinator.api.grpc.responses import alive
from engine.base.errors import DeadlineExceeded, Overloaded
from engine.pb.diptych.internal.v1 import registry_pb2
from engine.pb.diptych.v1 import inference_pb2, inference_pb2_grpc
from engine.rpc import streams
from engine.rpc.auth import ClusterToken
from engine.rpc.channel import open_channel
from engine.rpc.receive_budget import ReceiveBudget
from engine.rpc.server import RpcServer
from engine.rpc.status import from_rpc_error
from engine.rpc.streams import IdleStreams
from engine.telemetry.metrics import RpcMetrics
from tests.support import http2
from tests.support.http2 import RawConnection


class Slow:
    """Sends one response after `wait_s`, then some more quickly."""

    def __init__(self, wait_s=0.0, number=1):
        self.wait_s, self.number = wait_s, number

    async def Generate(self, request, context):
        await asyncio.sleep(self.wait_s)
        for _ in range(self.number):
            await asyncio.sleep(0.05)
            yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text="x"))

    Chat = Tokenize = Detokenize = ListModels = GetModel = Generate


@asynccontextmanager
async def slow_server(slow, **options):
    server = RpcServer(**options)
    service = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
    server.add_service(service, slow, alive=alive)
    address = f"127.0.0.1:{server.listen('127.0.0.1:0')}"
    await server.start()
    try:
        async with open_channel(address) as channel:
            yield inference_pb2_grpc.InferenceServiceStub(channel)
    finally:
        await server.stop()


async def kinds(call):
    got = []
    while (response := await call.read()) is not grpc.aio.EOF:
        got.append(response.WhichOneof("event"))
    return got


async def test_alive_is_sent_while_a_stream_is_silent():
    async with slow_server(Slow(2.6, 30)) as stub:
        asked = inference_pb2.GenerateRequest(alive=True, request_id="me")
        call = stub.Generate(asked, timeout=20)
        first = await call.read()
        assert first.request_id == "me"
        assert first.HasField("alive")
        got, plain = await asyncio.gather(
            kinds(call), kinds(stub.Generate(inference_pb2.GenerateRequest(), timeout=20))
        )
        assert 1 <= got.count("alive") <= 3
        assert got[-30:] == plain == ["delta"] * 30, "none among the tokens"


async def test_no_alive_while_the_event_loop_hangs():
    async with slow_server(Slow(4.0)) as stub:
        call = stub.Generate(inference_pb2.GenerateRequest(alive=True), timeout=20)
        assert (await call.read()).HasField("alive")
        time.sleep(2.5)  # noqa: ASYNC251
        assert (await kinds(call)).count("alive") <= 2


async def test_a_refusal_after_alive_is_a_status():
    class Refusing(Slow):
        async def Generate(self, request, context):
            await asyncio.sleep(1.5)
            raise Overloaded("full", 3.0)
            yield

    async with slow_server(Refusing()) as stub:
        call = stub.Generate(inference_pb2.GenerateRequest(alive=True), timeout=20)
        assert (await call.read()).HasField("alive")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert isinstance(from_rpc_error(caught.value), Overloaded)


async def test_a_client_that_does_not_read_alive_loses_its_call_at_the_next_message():
    async with slow_server(Slow(2.0), client_timeout_s=0.5) as stub:
        call = stub.Generate(inference_pb2.GenerateRequest(alive=True), timeout=20)
        await asyncio.sleep(3.0)
        assert "delta" in await kinds(call), "its window takes a message: nothing is lost"


REFLECT = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
REGISTER = "/diptych.internal.v1.RegistryService/Register"
WATCH = b"/grpc.health.v1.Health/Watch"
LIST = b"\x3a\x01*"  # ServerReflectionRequest{list_services: "*"}


class Chatty:
    """A stream both ways."""

    async def ReportStall(self, request, context):
        return registry_pb2.StallNoted()

    async def Register(self, messages, context):
        async for _ in messages:
            yield registry_pb2.CoordinatorMessage()


@asynccontextmanager
async def registry(*, token=None, is_counted=True, **options):
    counts = CollectorRegistry()
    server = RpcServer(RpcMetrics(counts), **options)
    service = registry_pb2.DESCRIPTOR.services_by_name["RegistryService"]
    server.add_service(service, Chatty(), token=token, is_counted=is_counted)
    address = f"127.0.0.1:{server.listen('127.0.0.1:0')}"
    await server.start()
    try:
        yield address, counts
    finally:
        await server.stop()


async def end_of(call):
    """How, and after how long, a silent stream ends."""
    began_s = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call.read(), 20)
    return from_rpc_error(caught.value), time.monotonic() - began_s


@pytest.mark.parametrize("path", [REFLECT, REGISTER])
async def test_a_stream_without_a_first_message_ends(path):
    async with (
        registry(client_timeout_s=0.5) as (address, counts),
        open_channel(address) as channel,
    ):
        error, took_s = await end_of(channel.stream_stream(path)())
        assert isinstance(error, DeadlineExceeded)
        assert took_s < 3
        labels = {"method": path.rpartition(".")[2], "code": "deadline_exceeded"}
        assert counts.get_sample_value("diptych_rpc_failures_total", labels) == 1


@pytest.mark.parametrize(("path", "message"), [(REFLECT, LIST), (REGISTER, b"")])
async def test_a_stream_that_has_gone_idle_ends_ten_times_later(path, message):
    async with registry(client_timeout_s=0.3) as (address, _), open_channel(address) as channel:
        call = channel.stream_stream(path)()
        for _ in range(4):  # each message restarts the time limit
            await call.write(message)
            assert await call.read() is not grpc.aio.EOF
            await asyncio.sleep(1.0)
        error, took_s = await end_of(call)
        assert isinstance(error, DeadlineExceeded)
        assert "no message within 3 s" in error.message
        assert 1.5 < took_s < 6


async def test_a_watch_stays_open_and_ends_for_a_client_that_does_not_read():
    async with (
        registry(client_timeout_s=0.3) as (address, counts),
        open_channel(address) as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(4):
                await watch.read()
        with RawConnection(address) as raw:
            raw.begin({http2.INITIAL_WINDOW_SIZE: 0})
            raw.request(WATCH, b"")
            labels = {"method": "Health/Watch", "code": "deadline_exceeded"}
            await asyncio.to_thread(raw.wait_for_end, 1, 2.0)  # it answers pings
        assert counts.get_sample_value("diptych_rpc_failures_total", labels) == 1


async def test_idle_streams_are_bounded_per_connection_and_counted_down(monkeypatch):
    monkeypatch.setattr(streams.IdleStreams.__init__, "__defaults__", (3, 5))
    async with registry() as (address, _):
        channels = [open_channel(address, ("grpc.channel_id", i)) for i in range(3)]

        async def watch(channel):
            call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            await call.read()
            return call

        calls = [await watch(channels[0]) for _ in range(3)]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch(channels[0])
        assert "3 streams of this method are open on this connection" in caught.value.details()
        assert isinstance(from_rpc_error(caught.value), Overloaded)
        calls += [await watch(channels[1]) for _ in range(2)]
        with pytest.raises(grpc.aio.AioRpcError, match="on this server"):
            await watch(channels[2])
        stub = health_pb2_grpc.HealthStub(channels[2])
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == 1
        call = channels[2].stream_stream(REFLECT)()  # another method's streams are not counted
        await call.write(LIST)
        assert await call.read()
        calls[0].cancel()
        for _ in range(100):
            await asyncio.sleep(0.05)
            try:
                await watch(channels[2])
                break
            except grpc.aio.AioRpcError:
                continue
        else:
            raise AssertionError("its place was not given back")
        for channel in channels:
            await channel.close()


async def test_streams_without_token_do_not_count(monkeypatch):
    monkeypatch.setattr(streams.IdleStreams.__init__, "__defaults__", (2, 2))
    token = ClusterToken("t" * 32)
    async with registry(token=token) as (address, _), open_channel(address) as channel:
        strangers = [channel.stream_stream(REGISTER)() for _ in range(20)]
        await asyncio.sleep(0.3)  # each is read for a second before it is refused
        worker = channel.stream_stream(REGISTER)(metadata=token.metadata)
        await worker.write(b"")
        assert await asyncio.wait_for(worker.read(), 5) is not grpc.aio.EOF
        for stranger in strangers:
            stranger.cancel()


async def test_idle_streams_are_cut_off_for_requests_and_workers_do_not_count():
    """Each waits for a message of up to the maximum size."""
    budget = ReceiveBudget(32 << 20)
    options = {"budget": budget, "max_request_bytes": 16 << 20, "is_counted": False}
    async with registry(**options) as (address, _), open_channel(address) as channel:
        workers = [channel.stream_stream(REGISTER)() for _ in range(4)]
        for worker in workers:
            await worker.write(b"")
            assert await worker.read() is not grpc.aio.EOF
        assert budget.in_flight == 0
        silent = [channel.stream_stream(REFLECT)() for _ in range(8)]
        await asyncio.sleep(0.3)
        assert budget.in_flight == 32 << 20
        stub = health_pb2_grpc.HealthStub(channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)).status == 1
        for worker in workers:
            await worker.write(b"")
            assert await worker.read() is not grpc.aio.EOF
        for call in (*workers, *silent):
            call.cancel()


def test_counts_of_streams_return_to_zero():
    kept = IdleStreams(2, 3)
    with kept.opened("a"), kept.opened("a"), kept.opened("b"):
        for peer, where in (("a", "connection"), ("c", "server")):
            with pytest.raises(Overloaded, match=where), kept.opened(peer):
                raise AssertionError
    assert not kept._by_peer
