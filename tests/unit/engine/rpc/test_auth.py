"""The cluster token: its file, the metadata of a call, and a real server that checks it."""

import asyncio
import json
import os
import subprocess
from contextlib import asynccontextmanager
from io import StringIO

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry

from engine.base.errors import ConfigError, PermissionDenied, Unauthenticated
from engine.base.option_groups import AuthOptions, LogOptions
from engine.pb.diptych.internal.v1 import registry_pb2, registry_pb2_grpc
from engine.pb.diptych.v1 import inference_pb2, inference_pb2_grpc
from engine.rpc.auth import ClusterToken, stays_on_this_machine, token_for
from engine.rpc.channel import ChannelPool, open_channel
from engine.rpc.server import RpcServer
from engine.telemetry.log import configure_logging
from engine.telemetry.metrics import RpcMetrics

OLD, NEW = "old-secret-0123456789abcdef", "new-secret-0123456789abcdef"


def token(tmp_path, *lines, name="token"):
    path = tmp_path / name
    path.write_text("\n".join(lines))
    path.chmod(0o600)
    return ClusterToken.load(str(path))


def bearer(secret):
    return (("user-agent", "x"), ("authorization", f"Bearer {secret}"))


# --- the file


def test_a_file_of_several_lines_accepts_all_and_sends_the_first(tmp_path):
    both = token(tmp_path, "", f"  {NEW} ", OLD, "")
    assert both.metadata == (("authorization", f"Bearer {NEW}"),)
    both.check(bearer(NEW))
    both.check(bearer(OLD))
    both.check((("authorization", f"bearer {OLD}"),))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "at least 16 bytes"),
        (b" \n\n", "at least 16 bytes"),
        (b"fifteen-bytes!!\n", "at least 16 bytes"),
        (NEW.encode() + b"\nshort", "at least 16 bytes"),
        (b"x" * 1025, "at most"),
        (b"\n".join([NEW.encode()] * 9), "at most"),
        (b"a phrase of several words", "without spaces"),
        (bytes(range(128, 160)), "openssl rand -hex 32"),
    ],
)
def test_a_file_without_a_valid_secret_is_refused_and_not_shown(tmp_path, content, words):
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        ClusterToken.load(str(path))
    message = caught.value.message
    assert message.startswith(f"--cluster-token-file {path}: ") and words in message
    assert NEW not in message and "phrase" not in message


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"--cluster-token-file .*nowhere: No such file"):
        ClusterToken.load(str(tmp_path / "nowhere"))


def test_the_secret_is_not_shown(tmp_path):
    ours = token(tmp_path, NEW)
    assert NEW not in f"{ours} {ours!r}"
    for metadata in ((), bearer(OLD)):
        with pytest.raises((Unauthenticated, PermissionDenied)) as caught:
            ours.check(metadata)
        assert NEW not in str(caught.value) and OLD not in str(caught.value)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_a_world_readable_file_is_logged(tmp_path, mode):
    lines = StringIO()
    configure_logging(LogOptions(log_format="json"), stream=lines)
    path = tmp_path / "token"
    path.write_text(NEW)
    path.chmod(mode)
    ClusterToken.load(str(path))
    assert ("every user" in lines.getvalue()) == (mode == 0o644)
    assert NEW not in lines.getvalue()


@pytest.mark.parametrize("metadata", [None, (), (("user-agent", "x"),), (("cookie", OLD),)])
def test_a_call_without_a_token(tmp_path, metadata):
    with pytest.raises(Unauthenticated, match="--cluster-token-file"):
        token(tmp_path, OLD).check(metadata)


@pytest.mark.parametrize(
    "value",
    [
        f"Bearer {NEW}",
        f"Bearer {OLD[:-1]}",
        f"Bearer {OLD}x",
        f"Bearer {OLD.upper()}",
        "Bearer ",
        "Bearer",
        "",
        f"Basic {OLD}",
        OLD,
        b"\xff",
    ],
)
def test_a_call_with_a_wrong_token(tmp_path, value):
    with pytest.raises(PermissionDenied, match="--cluster-token-file"):
        token(tmp_path, OLD).check((("authorization", value),))


def test_the_token_of_local_workers_is_in_a_memfd_of_their_user():
    ours, others = ClusterToken.random(), ClusterToken.random()
    path = ours.share()
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert ClusterToken.load(path).metadata == ours.metadata != others.metadata
    read = ["cat", path]
    assert subprocess.run(read, capture_output=True, check=False).returncode == 0
    if os.getuid() == 0:
        foreign = subprocess.run(read, capture_output=True, check=False, user=65534, group=65534)
        assert foreign.returncode != 0 and not foreign.stdout


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("127.0.0.1:0", True),
        ("127.1.2.3:5", True),
        ("localhost:5", True),
        ("[::1]:5", True),
        ("0.0.0.0:5", False),
        ("[::]:5", False),
        ("10.0.0.1:5", False),
        ("[fd00::1]:5", False),
        ("localhost.example:5", False),
    ],
)
def test_only_addresses_of_this_machine_need_no_token(tmp_path, address, here):
    path = tmp_path / "token"
    path.write_text(OLD)
    given = token_for(AuthOptions(str(path)), "--listen", address)
    assert given is not None and given.metadata[0][1].endswith(OLD)
    assert stays_on_this_machine(address) == here
    if here:
        assert token_for(AuthOptions(), "--listen", address) is None
    else:
        with pytest.raises(ConfigError, match="--cluster-token-file") as caught:
            token_for(AuthOptions(), "--listen", address)
        assert caught.value.message.startswith(f"--listen {address}: ")


# --- a server that checks it


class Guarded:
    """Counts the calls that reach it."""

    def __init__(self):
        self.calls = 0
        self.closed = asyncio.Event()
        self.metadata = []

    async def ReportStall(self, request, context):
        self.calls += 1
        return registry_pb2.StallNoted()

    async def Register(self, requests, context):
        self.calls += 1
        async for message in requests:
            yield registry_pb2.CoordinatorMessage(
                welcome=registry_pb2.Welcome(coordinator_id=message.hello.worker_id)
            )

    async def Generate(self, request, context):
        self.calls += 1
        try:
            yield inference_pb2.GenerateResponse(request_id=request.request_id)
            await asyncio.sleep(60 if request.model == "silent" else 0)
        finally:
            self.closed.set()

    async def Tokenize(self, request, context):
        self.calls += 1
        self.metadata.append(dict(context.invocation_metadata()))
        return inference_pb2.TokenizeResponse(token_ids=[len(request.text)])

    Chat = Generate
    Detokenize = ListModels = GetModel = Tokenize


@asynccontextmanager
async def guarded(asked, **options):
    registry = CollectorRegistry()
    server, servicer = RpcServer(RpcMetrics(registry)), Guarded()
    services = inference_pb2.DESCRIPTOR.services_by_name
    server.add_service(services["InferenceService"], servicer, token=asked, **options)
    services = registry_pb2.DESCRIPTOR.services_by_name
    server.add_service(services["RegistryService"], servicer, token=asked)
    port = server.listen("127.0.0.1:0")
    await server.start()
    try:
        yield servicer, f"127.0.0.1:{port}", registry
    finally:
        await server.stop()


async def register(channel):
    call = registry_pb2_grpc.RegistryServiceStub(channel).Register()
    await call.write(registry_pb2.WorkerMessage(hello=registry_pb2.Hello(worker_id="w")))
    answer = await call.read()
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    return answer.welcome.coordinator_id


async def report_stall(channel):
    await registry_pb2_grpc.RegistryServiceStub(channel).ReportStall(registry_pb2.Stall())


async def generate(channel):
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    call = stub.Generate(inference_pb2.GenerateRequest(request_id="r"))
    return [message.request_id async for message in call]


async def tokenize(channel):
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    return list((await stub.Tokenize(inference_pb2.TokenizeRequest(text="abc"))).token_ids)


async def malformed(channel):
    return await channel.unary_unary("/diptych.v1.InferenceService/Tokenize")(b"\xff\xff")


@pytest.mark.parametrize(
    ("sent", "code"),
    [(None, grpc.StatusCode.UNAUTHENTICATED), (NEW, grpc.StatusCode.PERMISSION_DENIED)],
)
async def test_without_it_no_call_gets_through(tmp_path, sent, code):
    lines = StringIO()
    configure_logging(LogOptions(log_format="json"), stream=lines)
    mine = token(tmp_path, sent, name="sent") if sent else None
    async with guarded(token(tmp_path, OLD)) as (servicer, address, registry):
        async with open_channel(address, token=mine) as channel:
            for ask in (register, report_stall, generate, tokenize, malformed):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await ask(channel)
                assert caught.value.code() is code, ask
        assert servicer.calls == 0
        for method, count in (
            ("RegistryService/Register", 1),
            ("RegistryService/ReportStall", 1),
            ("InferenceService/Generate", 1),
            ("InferenceService/Tokenize", 2),
        ):
            labels = {"method": method, "code": code.name.lower()}
            assert registry.get_sample_value("diptych_rpc_failures_total", labels) == count
    told = [json.loads(line) for line in lines.getvalue().splitlines()]
    told = [line for line in told if line["event"] == "caller refused"]
    assert [line["level"] for line in told] == ["warning"] * 5
    assert all(line["peer"].startswith("ipv4:127.0.0.1:") for line in told)
    assert OLD not in lines.getvalue() and NEW not in lines.getvalue()


async def test_a_refused_stream_is_read_once_for_a_short_time(tmp_path):
    """A refusal before the client's first write would sometimes become INTERNAL in the client."""
    loop = asyncio.get_running_loop()
    async with guarded(token(tmp_path, OLD)) as (_, address, _), open_channel(address) as channel:
        for delay_s, least_s, most_s in ((0.3, 0.3, 0.9), (None, 0.9, 5.0)):
            call = registry_pb2_grpc.RegistryServiceStub(channel).Register()
            began_s = loop.time()
            if delay_s is not None:
                await asyncio.sleep(delay_s)
                await call.write(registry_pb2.WorkerMessage())
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert least_s <= loop.time() - began_s < most_s


@pytest.mark.parametrize("lines", [(OLD,), (OLD, NEW)])
async def test_with_it_every_kind_of_call_gets_through(tmp_path, lines):
    async with guarded(token(tmp_path, NEW, OLD, name="asked")) as (servicer, address, _):
        async with open_channel(address, token=token(tmp_path, *lines)) as channel:
            assert await register(channel) == "w"
            assert await generate(channel) == ["r"]
            assert await tokenize(channel) == [3]
            await channel.channel_ready()
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            await stub.Tokenize(inference_pb2.TokenizeRequest(), metadata=(("x-own", "1"),))
        assert servicer.calls == 4
        assert servicer.metadata[-1]["x-own"] == "1"
        assert servicer.metadata[-1]["authorization"] == f"Bearer {OLD}"


async def test_some_methods_only(tmp_path):
    server = guarded(token(tmp_path, OLD), guarded={"Generate"})
    async with server as (_, address, _), open_channel(address) as channel:
        assert await tokenize(channel) == [3]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(channel)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_health_and_reflection_stay_open(tmp_path):
    async with guarded(token(tmp_path, OLD)) as (_, address, _), open_channel(address) as channel:
        ask = health_pb2.HealthCheckRequest(service="diptych.internal.v1.RegistryService")
        health = await health_pb2_grpc.HealthStub(channel).Check(ask)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        listing = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        assert (await listing.read()).list_services_response.service


@pytest.mark.parametrize("ending", ["cancel", "deadline", "close"])
async def test_a_call_with_a_token_ends_like_any_other(tmp_path, ending):
    """At once, and on both sides."""
    ours = token(tmp_path, OLD)
    async with guarded(ours) as (servicer, address, _):
        pool = ChannelPool(ours)
        stub = inference_pb2_grpc.InferenceServiceStub(pool.get(address))
        timeout = 0.3 if ending == "deadline" else None
        call = stub.Generate(inference_pb2.GenerateRequest(model="silent"), timeout=timeout)
        assert isinstance(call, grpc.aio.UnaryStreamCall)
        await call.read()
        if ending == "cancel":
            call.cancel()
        elif ending == "close":
            await pool.close()
        else:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(servicer.closed.wait(), 1)
        await pool.close()
