"""A real server on a real port, called over the wire."""

import asyncio
import json
import subprocess
import sys
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry

from engine.base.errors import ConfigError, InvalidRequest, Unavailable
from engine.pb.diptych.internal.v1 import registry_pb2, registry_pb2_grpc, worker_pb2
from engine.pb.diptych.v1 import inference_pb2, inference_pb2_grpc
from engine.rpc.channel import ChannelPool, open_channel
from engine.rpc.listener import Listener
from engine.rpc.server import RpcServer
from engine.rpc.status import PUSHBACK_KEY, from_rpc_error
from engine.telemetry.metrics import RpcMetrics

GENERATE = "/diptych.v1.InferenceService/Generate"
TOKENIZE = "/diptych.v1.InferenceService/Tokenize"


class Scripted:
    """An InferenceService whose behaviour depends on the model name."""

    def __init__(self):
        self.closed = asyncio.Event()
        self.attempts = 0

    async def Generate(self, request, context):
        self.attempts += 1
        try:
            match request.model:
                case "bug":
                    raise ZeroDivisionError("a bug")
                case "invalid":
                    raise InvalidRequest("stop.stop", "expected at most 16")
                case "flaky" if self.attempts < 3:
                    raise Unavailable("not yet", retry_after_s=0.02)
                case "inner":
                    await asyncio.gather(self.cancelled())
            yield inference_pb2.GenerateResponse(request_id=request.request_id)
            if request.model == "late":
                raise Unavailable("lost", num_emitted=1)
            if request.model == "endless":
                while True:
                    await asyncio.sleep(0.01)
                    yield inference_pb2.GenerateResponse()
            if request.model == "silent":
                await asyncio.sleep(60)
        finally:
            self.closed.set()

    async def cancelled(self):
        raise asyncio.CancelledError

    async def Tokenize(self, request, context):
        if request.model == "none":
            return None
        return inference_pb2.TokenizeResponse(token_ids=[len(request.text)])

    Chat = Generate
    Detokenize = ListModels = GetModel = Tokenize


class Registry:
    async def ReportStall(self, request, context):
        return registry_pb2.StallNoted()

    async def Register(self, requests, context):
        async for message in requests:
            yield registry_pb2.CoordinatorMessage(
                welcome=registry_pb2.Welcome(coordinator_id=message.hello.worker_id)
            )


@asynccontextmanager
async def serving(*options):
    registry = CollectorRegistry()
    server, scripted = RpcServer(RpcMetrics(registry)), Scripted()
    services = inference_pb2.DESCRIPTOR.services_by_name
    server.add_service(services["InferenceService"], scripted)
    services = registry_pb2.DESCRIPTOR.services_by_name
    server.add_service(services["RegistryService"], Registry())
    port = server.listen("127.0.0.1:0")
    await server.start()
    async with open_channel(f"127.0.0.1:{port}", *options) as channel:
        yield server, scripted, channel, port, registry
    await server.stop()


async def collect(call):
    return [message async for message in call]


async def test_unary_and_streams():
    async with serving() as (_, _, channel, _, _):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        answer = await stub.Tokenize(inference_pb2.TokenizeRequest(text="abc"))
        assert list(answer.token_ids) == [3]
        got = await collect(stub.Generate(inference_pb2.GenerateRequest(request_id="r")))
        assert [m.request_id for m in got] == ["r"]
        call = registry_pb2_grpc.RegistryServiceStub(channel).Register()
        for name in ("a", "b"):
            await call.write(registry_pb2.WorkerMessage(hello=registry_pb2.Hello(worker_id=name)))
            assert (await call.read()).welcome.coordinator_id == name
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


@pytest.mark.parametrize("method", [GENERATE, TOKENIZE])
@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\xff\xff\xff\xff", "malformed bytes"),
        (b"\x0a\x02\xc3\x28", "not valid UTF-8"),  # field 1, a string with a broken sequence
    ],
)
async def test_malformed_bytes(method, raw, words):
    async with serving() as (_, _, channel, _, _):
        if method == GENERATE:
            call = collect(channel.unary_stream(method)(raw))
        else:
            call = channel.unary_unary(method)(raw)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert words in caught.value.details()


async def test_malformed_bytes_inside_a_request_stream():
    async with serving() as (_, _, channel, _, _):
        call = channel.stream_stream("/diptych.internal.v1.RegistryService/Register")()
        await call.write(b"\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_bug_is_internal_logged_and_counted(caplog):
    async with serving() as (_, _, channel, _, registry):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for model in ("bug", "inner"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(
                    collect(stub.Generate(inference_pb2.GenerateRequest(model=model))), 5
                )
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            assert "a bug" not in caught.value.details()
        count = registry.get_sample_value(
            "diptych_rpc_failures_total",
            {"method": "InferenceService/Generate", "code": "internal"},
        )
        assert count == 2


async def test_an_error_after_the_first_message_keeps_its_details():
    async with serving() as (_, _, channel, _, _):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(inference_pb2.GenerateRequest(model="late"))
        await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        error = from_rpc_error(caught.value)
        assert isinstance(error, Unavailable)
        assert error.num_emitted == 1
        assert dict(caught.value.trailing_metadata())[PUSHBACK_KEY] == "1000"


async def test_headers_wait_for_the_first_token_so_that_clients_retry():
    policy = {
        "methodConfig": [
            {
                "name": [{"service": "diptych.v1.InferenceService"}],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.01s",
                    "maxBackoff": "0.1s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
    async with serving(("grpc.service_config", json.dumps(policy))) as (_, script, channel, _, _):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        got = await collect(stub.Generate(inference_pb2.GenerateRequest(model="flaky")))
        assert (len(got), script.attempts) == (1, 3)


@pytest.mark.parametrize("model", ["endless", "silent"])
async def test_a_cancelled_call_closes_the_servicer(model):
    async with serving() as (_, scripted, channel, _, registry):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(inference_pb2.GenerateRequest(model=model))
        await call.read()
        call.cancel()
        await asyncio.wait_for(scripted.closed.wait(), 5)
        assert not next(iter(registry.collect())).samples  # a cancellation is no failure


async def test_a_deadline_closes_the_servicer():
    async with serving() as (_, scripted, channel, _, _):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub.Generate(inference_pb2.GenerateRequest(model="silent"), timeout=0.2))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(scripted.closed.wait(), 5)


async def test_a_used_port_is_refused_with_a_reason():
    async with serving() as (_, _, _, port, _):
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*in use"):
            RpcServer().listen(f"127.0.0.1:{port}")


async def test_a_port_that_is_briefly_busy_is_retried(monkeypatch):
    """A worker restarts on the port of its predecessor, which its peers still dial."""
    bind, failures = Listener._bind, [1, 2, 3]
    monkeypatch.setattr(
        Listener,
        "_bind",
        lambda self, address: 0 if failures and failures.pop() else bind(self, address),
    )
    assert RpcServer().listen("127.0.0.1:0") > 0
    assert not failures


async def test_a_large_message_passes():
    async with serving() as (_, _, channel, _, _):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        text = "x" * 20_000_000
        answer = await stub.Tokenize(inference_pb2.TokenizeRequest(text=text))
        assert list(answer.token_ids) == [len(text)]


async def test_health_and_reflection():
    async with serving() as (server, _, channel, _, _):
        stub = health_pb2_grpc.HealthStub(channel)
        ask = health_pb2.HealthCheckRequest(service="diptych.v1.InferenceService")
        assert (await stub.Check(ask)).status == health_pb2.HealthCheckResponse.SERVING
        await server.set_serving(False)
        assert (await stub.Check(ask)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        listing = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        names = {s.name for s in (await listing.read()).list_services_response.service}
        assert {"diptych.v1.InferenceService", "grpc.health.v1.Health"} <= names


async def test_pool_keeps_one_channel_an_address_and_forgets():
    pool = ChannelPool()
    first = pool.get("127.0.0.1:1")
    assert pool.get("127.0.0.1:1") is first
    other = pool.get("127.0.0.1:2")
    pool.keep_only({"127.0.0.1:2"})
    assert pool.get("127.0.0.1:1") is not first
    assert pool.get("127.0.0.1:2") is other
    await pool.close()
    assert first.get_state() is other.get_state() is grpc.ChannelConnectivity.SHUTDOWN


def test_the_wire_is_torch_free():
    code = (
        "import sys, engine.rpc.server, engine.rpc.convert, engine.http.server; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert worker_pb2.DESCRIPTOR.services_by_name["DecodeService"].methods_by_name["Decode"]


async def test_a_burst_is_accepted():
    """By default gRPC cancels pending calls beyond 1,000, at random."""
    async with serving() as (_, scripted, channel, _, _):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def code():
            call = stub.Generate(inference_pb2.GenerateRequest(), timeout=60)
            async for _ in call:
                pass
            return await call.code()

        codes = await asyncio.gather(*(code() for _ in range(3500)), return_exceptions=True)
        assert set(codes) == {grpc.StatusCode.OK}
        assert scripted.attempts == 3500
