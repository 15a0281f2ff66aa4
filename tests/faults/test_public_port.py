"""The public port under abuse: whatever comes in, the process lives, nothing stays held, and proper
requests are answered rightly and in time. tests/faults/port.py checks that after every scenario.
"""

from __future__ import annotations

import random
import resource
import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from engine.pb.diptych.v1 import inference_pb2 as pb
from engine.rpc.channel import MAX_REQUEST_BYTES
from engine.rpc.status import DETAILS_KEY
from tests.faults.garbage import garbage, gzip_of_zeros, http_garbage
from tests.faults.port import FULL, GENERATE, SHORT, Port, file_limit, request
from tests.faults.waiters import NUM_HTTP_CONNECTIONS, WAITERS
from tests.support import http2
from tests.support.fuzz_checks import DOCUMENTED, GUARDED
from tests.support.fuzz_messages import METHODS, Input, Writer, mutate
from tests.support.http2 import closed_by_peer, connect, frame, grpc_message
from tests.support.stack import Stack, until
from tests.support.vitals import MIB, MORE_FILES, PeakMemory

pytestmark = pytest.mark.timeout(300)
SEED = 11
NUM_CONNECTIONS, NUM_CONNECTIONS_SHORT = 5_000, 1_000
METHODS_SHORT = {"Generate", "Chat", "Tokenize", "DrainWorker"}
TEXT = GENERATE.decode()


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory, full: bool) -> Iterator[Port]:
    """Started with few descriptors: `coordinator start` takes what it may have."""
    folder, patience = tmp_path_factory.mktemp("port"), FULL if full else SHORT
    with ExitStack() as exit_stack:
        with file_limit(1024):
            stack = exit_stack.enter_context(Stack(folder, *patience.flags))
        yield Port(stack, patience)


# -- messages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(METHODS))
def test_malformed_bytes(port: Port, method: str, full: bool) -> None:
    """Mutated, cut and random bytes: the caller's fault, in words."""
    if not full and method not in METHODS_SHORT:
        pytest.skip("the same door as the others'")
    draw = random.Random(f"{SEED} {method}")
    descriptor = METHODS[method]
    whole = Writer(draw, 0.0).message(descriptor.input_type)
    raws = [b"\xff" * 10, b"\x0b" * 5_000, b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\xc3\x28"]
    raws += [mutate(draw, whole) for _ in range(300 if full else 30)]
    raws += [whole[: len(whole) * i // 8] for i in range(8)]
    raws += [draw.randbytes(n) for n in (1, 10, 100, 10_000)]
    if method in ("Generate", "Chat"):  # what is a request after all may want a long answer
        raws = [raw for raw in raws if Input(0, method, "", raw).parse() is None]
    num_malformed = 0
    with port.scenario(), port.channel() as channel:
        for raw in raws:
            case = Input(0, method, "", raw)
            malformed = case.parse() is None
            num_malformed += malformed
            code, details = end_of(channel, case.path, raw, stream=descriptor.server_streaming)
            assert code in DOCUMENTED | (GUARDED if method == "DrainWorker" else frozenset())
            if malformed and code not in GUARDED:
                assert code is grpc.StatusCode.INVALID_ARGUMENT
                assert field_of(details) == "request"
    assert num_malformed >= 4


SERVICES_BESIDE = {
    "/inference.GRPCInferenceService/ModelInfer": False,
    "/inference.GRPCInferenceService/ModelStreamInfer": True,
    "/vllm.grpc.engine.VllmEngine/Generate": True,
    "/grpc.health.v1.Health/Check": False,
    "/grpc.health.v1.Health/Watch": True,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": True,
    "/diptych.internal.v1.RegistryService/Register": True,
    "/diptych.internal.v1.RegistryService/ReportStall": False,
}


def test_malformed_bytes_to_the_services_beside(port: Port) -> None:
    with port.scenario(), port.channel() as channel:
        for path, stream in SERVICES_BESIDE.items():
            for raw in (b"\xff\xff", b"\x0a\x02\xc3\x28", b"\x0a\x7f"):
                code, _ = end_of(channel, path, raw, stream=stream)
                expected = {grpc.StatusCode.INVALID_ARGUMENT}
                if "internal" in path:
                    expected |= {grpc.StatusCode.UNAUTHENTICATED}
                assert code in expected, f"{path}: {code}"


def test_methods_and_messages_that_are_not_there(port: Port) -> None:
    with port.scenario(), port.channel() as channel:
        for path in ("/diptych.v1.InferenceService/Nothing", "/nobody/Nothing", "/", "//"):
            code, _ = end_of(channel, path, b"", stream=False)
            assert code is grpc.StatusCode.UNIMPLEMENTED
        failed = port.failures("invalid_argument")
        with port.raw() as raw:  # the call ends without a message: gRPC gives no answer to that
            raw.begin()
            for path in (GENERATE, b"/diptych.v1.InferenceService/Tokenize"):
                assert raw.wait_for_end(raw.open_stream(path, end=True), 5)
        assert port.failures("invalid_argument") == failed + 2


def test_oversized_messages(port: Port, full: bool) -> None:
    """Up to 16 MiB is read and refused in words, more is refused by the transport unread."""
    room = MAX_REQUEST_BYTES - len(pb.GenerateRequest(text="x" * 2**24).SerializeToString()) + 2**24
    ids = pb.TokenIds(ids=[1] * 1_000_000)
    invalid, exhausted = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED
    cases: list[tuple[pb.GenerateRequest, grpc.StatusCode, str]] = [
        (pb.GenerateRequest(text="a" * room), invalid, "text"),
        (pb.GenerateRequest(text="a" * (room + 1)), exhausted, ""),
        (pb.GenerateRequest(text="a" * (2 * room)), exhausted, ""),
        (pb.GenerateRequest(text="word " * 3_000_000), invalid, "text"),
        (pb.GenerateRequest(text="é" * 8_000_000), invalid, "text"),
        (pb.GenerateRequest(token_ids=ids), invalid, "token_ids.ids"),
        (pb.GenerateRequest(text="a", stop=pb.Stop(stop=["x"] * 1_000_000)), invalid, "request"),
        (pb.GenerateRequest(text="a", stop=pb.Stop(stop=["x"] * 500_000)), invalid, "stop.stop"),
        (
            pb.GenerateRequest(text="a", cache_salt="x" * 15_000_000),
            invalid,
            "cache_salt",
        ),
    ]
    with port.scenario(growth_bytes=256 * MIB), PeakMemory(port.memory) as memory:
        for _ in range(3 if full else 1):
            for asked, expected, field in cases:
                with port.channel() as channel:
                    raw = asked.SerializeToString()
                    code, details = end_of(channel, TEXT, raw, stream=True)
                assert (code, field_of(details) if field else "") == (expected, field)
    # One message at a time: what came in pieces, the whole of it, and what protobuf makes of it.
    assert memory.growth()["coordinator"] < 6 * MAX_REQUEST_BYTES


def test_detokenizing_a_million_tokens_hinders_nobody(port: Port, full: bool) -> None:
    raw = pb.DetokenizeRequest(token_ids=[5000] * 1_000_000).SerializeToString()
    with port.scenario(growth_bytes=256 * MIB), port.channel() as channel:
        for _ in range(3 if full else 1):
            path = "/diptych.v1.InferenceService/Detokenize"
            code, _ = end_of(channel, path, raw, stream=False)
            assert code is grpc.StatusCode.OK


def test_a_compressed_bomb(port: Port) -> None:
    """1 MiB that would be 1 GiB: the limit of a message holds for what is unpacked."""
    with port.scenario(), PeakMemory(port.memory) as memory:
        for size in (2**20, 2**26, 2**30):
            raw = gzip_of_zeros(size)
            with port.raw() as bomb:
                bomb.begin()
                stream = bomb.open_stream(GENERATE, (b"grpc-encoding", b"gzip"))
                body = grpc_message(raw, compressed=True)
                for at in range(0, len(body), 16384):
                    with suppress(OSError):
                        bomb.send(frame(http2.DATA, 0, stream, body[at : at + 16384]))
                with suppress(OSError):
                    bomb.send(frame(http2.DATA, http2.END_STREAM, stream))
                assert bomb.wait_for_end(stream, 10)
    assert memory.growth()["coordinator"] < 128 * MIB
    raw = request(2, salt="a" * 900).SerializeToString()
    with port.channel() as channel:
        assert list(channel.unary_stream(TEXT)(raw, timeout=10, compression=grpc.Compression.Gzip))


def test_too_much_metadata(port: Port) -> None:
    with port.scenario(), port.channel() as channel:
        raw = request(2).SerializeToString()
        for size in (8_000, 32_000):
            code, _ = end_of(channel, TEXT, raw, stream=True, metadata=[("x-note", "m" * size)])
            assert code is grpc.StatusCode.OK
        for size in (128_000, 1_000_000):
            code, _ = end_of(channel, TEXT, raw, stream=True, metadata=[("x-note", "m" * size)])
            assert code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL)
        code, _ = end_of(channel, TEXT, raw, stream=True)
        assert code is grpc.StatusCode.OK


# -- readers and writers that stop -----------------------------------------------------------------


def test_a_connection_reset_in_mid_stream(port: Port) -> None:
    """Cancelled down the chain: blocks are free within a second (and what two short undisturbed
    answers take, for on the test machine others compute at the same time).
    """
    limit_s = 1.0 + 2 * port.typical_s
    with port.scenario():
        for how in ("reset", "close", "rst_stream"):
            raw, name = port.raw(), f"broken-{how}"
            raw.begin()
            body = request(1500, request_id=name).SerializeToString()
            stream = raw.request(GENERATE, body)
            seen = (f for f in raw.read_frames(20) if f.kind == http2.DATA)
            assert next(seen)
            assert port.held_for("decode-0", name)
            if how == "reset":
                raw.reset()
            elif how == "close":
                raw.sock.close()
            else:
                raw.send(frame(http2.RST_STREAM, 0, stream, (8).to_bytes(4, "big")))
            until(lambda name=name: not port.held_for("decode-0", name), limit_s, f"{how}: free")  # type: ignore[misc]
            until(lambda name=name: not port.held_for("coordinator", name), limit_s, f"{how}: free")  # type: ignore[misc]
            raw.sock.close()


@pytest.mark.parametrize("waiter", WAITERS)
def test_a_waiter_leaves_the_port_open(port: Port, waiter: str, full: bool) -> None:
    """Each alone (tests/faults/waiters.py)."""
    if not full:
        pytest.skip("each alone; the next scenario has them all at once")
    with file_limit(2 * NUM_HTTP_CONNECTIONS), port.scenario(growth_bytes=128 * MIB):
        WAITERS[waiter](port)


def test_all_who_let_the_port_wait_at_once(port: Port) -> None:
    with file_limit(2 * NUM_HTTP_CONNECTIONS), port.scenario(growth_bytes=128 * MIB):
        with ThreadPoolExecutor(len(WAITERS)) as pool:
            running = {name: pool.submit(wait, port) for name, wait in WAITERS.items()}
        for name, done in running.items():
            assert done.exception() is None, f"{name}: {done.exception()!r}"


# -- crowds ----------------------------------------------------------------------------------------


def test_5000_connections(port: Port, full: bool) -> None:
    """All at once, each with preface and settings; proper requests are served meanwhile."""
    num_connections = NUM_CONNECTIONS if full else NUM_CONNECTIONS_SHORT
    with file_limit(num_connections + 2_000) as allowed:
        if allowed < num_connections + 500:
            pytest.skip(f"only {allowed} descriptors are allowed here")
        _, hard = resource.prlimit(port.pids["coordinator"], resource.RLIMIT_NOFILE)
        soft, _ = resource.prlimit(port.pids["coordinator"], resource.RLIMIT_NOFILE)
        assert soft == hard, "the coordinator takes all descriptors that it may have"
        with port.scenario(growth_bytes=192 * MIB) as bystander:
            resident = []
            for _ in range(2):
                was, served = port.vitals(), len(bystander.seconds)
                crowd = [greeted(port.address) for _ in range(num_connections)]
                for sock in crowd:
                    sock.settimeout(20)
                    assert sock.recv(9), "a connection was not accepted"
                now = port.vitals()
                assert not any(closed_by_peer(s, 0.001) for s in crowd), "all are open at once"
                # Scrapes and pings of others come and go meanwhile.
                assert now.num_files >= was.num_files - MORE_FILES + num_connections
                until(lambda n=served: len(bystander.seconds) >= n + 3, 60, "proper answers")  # type: ignore[misc]
                resident.append(now.resident_bytes - was.resident_bytes)
                for sock in crowd:
                    sock.close()
                until(
                    lambda was=was: port.vitals().num_files <= was.num_files + MORE_FILES,  # type: ignore[misc]
                    20,
                    "descriptors are given back",
                )
            print(f"{num_connections} connections take {[n // MIB for n in resident]} MiB")
        assert resident[1] < resident[0] + 64 * MIB


def greeted(address: str) -> socket.socket:
    """A connection that has said its preface."""
    sock = connect(address, 20)
    sock.sendall(http2.PREFACE + http2.settings())
    return sock


def test_ten_thousand_calls_on_one_connection_that_say_nothing(port: Port) -> None:
    with port.scenario(growth_bytes=192 * MIB):
        raw = port.raw()
        raw.begin()
        for _ in range(10_000):
            try:
                raw.open_stream(GENERATE)
            except OSError:
                break  # cut off: as good
        raw.reset()


# -- bytes -----------------------------------------------------------------------------------------


def test_garbage_on_the_port(port: Port, full: bool) -> None:
    """Bytes that are no HTTP/2, or HTTP/2 that no client speaks (tests/faults/garbage.py).

    One of them ends gRPC's server. Another one takes its place some milliseconds later; a call in
    between is sent again, and is answered then. All is sent twice: the allocator keeps what
    thousands of calls at once took, and memory must not grow again.
    """
    resident = []
    with port.scenario(growth_bytes=1920 * MIB, num_told_to_ask_again=20):
        for _ in range(7 if full else 2):
            for name, raw in garbage().items():
                sock = connect(port.address)
                with suppress(OSError):  # the server may cut us off in the middle
                    sock.sendall(raw)
                closed_by_peer(sock, 0.05)
                sock.close()
                until(port.answers, 2.0, f"after {name!r} a proper call is answered")
            resident.append(port.vitals().resident_bytes)
        print(f"resident after each: {[n // MIB for n in resident]} MiB")
    assert resident[1] < resident[0] + 48 * MIB


def test_tls_on_the_port(port: Port) -> None:
    with port.scenario():
        for where in (port.address, port.stack.http_address):
            context = ssl.create_default_context()
            with connect(where) as sock, pytest.raises((ssl.SSLError, OSError)):
                context.wrap_socket(sock, server_hostname="localhost")


# -- HTTP ------------------------------------------------------------------------------------------


def test_garbage_on_the_http_port(port: Port) -> None:
    with port.scenario(growth_bytes=128 * MIB):
        for name, raw in http_garbage().items():
            sock = connect(port.stack.http_address)
            with suppress(OSError):
                sock.sendall(raw)
            closed_by_peer(sock, 0.1)
            sock.close()
            assert port.health().startswith(b"HTTP/1.1 200"), f"after {name!r}"


# -- asking ----------------------------------------------------------------------------------------


def end_of(
    channel: grpc.Channel,
    path: str,
    raw: bytes,
    *,
    stream: bool,
    metadata: list[tuple[str, str]] | None = None,
) -> tuple[grpc.StatusCode, dict[str, Any]]:
    """How a call with these bytes ends: its status and its trailers."""
    call: Any
    try:
        if stream:
            many = channel.unary_stream(path)
            for _ in many(raw, timeout=60, metadata=metadata):
                pass
        else:
            channel.unary_unary(path)(raw, timeout=60, metadata=metadata)
    except grpc.RpcError as error:
        call = error
        return call.code(), dict(call.trailing_metadata() or ())
    return grpc.StatusCode.OK, {}


def field_of(trailers: dict[str, Any]) -> str:
    """The field that a refusal names."""
    for detail in status_pb2.Status.FromString(trailers[DETAILS_KEY]).details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            return str(bad.field_violations[0].field)
    raise AssertionError("no BadRequest")
