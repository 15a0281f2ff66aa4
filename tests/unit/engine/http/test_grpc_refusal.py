"""A gRPC client on an HTTP port gets an error that names the gRPC port."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from prometheus_client import CollectorRegistry

from coordinator.client import Client
from engine.base.errors import Mismatch
from engine.http.grpc_refusal import PREFACE, GrpcRefusal
from engine.http.server import make_app, serve_http
from engine.pb.diptych.v1 import admin_pb2, admin_pb2_grpc
from engine.rpc.channel import open_channel
from tests.support.http_get import http_get

pytestmark = pytest.mark.timeout(60)
SETTINGS = b"\0\0\0\4\0\0\0\0\0"
HEADERS = b"\0\0\2\1\4\0\0\0\1xx"
DATA = b"\0\0\3\0\0\0\0\0\1abc"


async def test_a_real_client_gets_the_message_and_http_still_works() -> None:
    server = await serve_http(
        make_app(CollectorRegistry(), lambda: True), "127.0.0.1:0", grpc_port=50051
    )
    said = "this is an HTTP port; the gRPC port of this process is 50051"
    channel = open_channel(server.address)
    stub = admin_pb2_grpc.AdminServiceStub(channel)
    for _ in range(3):  # on one connection
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.ListWorkers(admin_pb2.ListWorkersRequest(), timeout=10)
        assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert raised.value.details() == said
    await channel.close()
    answer = await asyncio.to_thread(http_get, f"http://{server.address}/health")
    assert answer.text == "ok\n"

    def ask() -> None:
        with Client(server.address) as client, pytest.raises(Mismatch, match=said):
            list(client.generate("x", timeout_s=10))

    await asyncio.to_thread(ask)
    await server.stop()


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_any_split_of_the_bytes(size: int) -> None:
    data = PREFACE + SETTINGS + HEADERS + DATA + DATA
    refusal = GrpcRefusal("50 % of ports; " + "\u00e4" * 90)
    out = b""
    for at in range(0, len(data), size):
        answer = refusal.take(data[at : at + size])
        assert answer is not None
        out += answer
    assert out.startswith(SETTINGS)
    assert b"50 %25 of ports" in out
    assert b"%C3%A4" * 90 in out
    assert out.count(b"grpc-status") == 1


def test_a_call_is_refused_after_its_first_message() -> None:
    refusal = GrpcRefusal("x")
    assert b"grpc-status" not in (refusal.take(PREFACE + SETTINGS + HEADERS) or b"")
    assert b"grpc-status" in (refusal.take(DATA) or b"")
    without_message = HEADERS[:4] + b"\5" + HEADERS[5:-3] + b"\3xx"
    assert b"grpc-status" in (refusal.take(without_message) or b"")


@pytest.mark.parametrize(
    "data", [b"PRI * HTTP/1.1\r\n", PREFACE + b"\xff\xff\xff\0\0\0\0\0\0", b"PRINT"]
)
def test_bytes_that_are_no_http2(data: bytes) -> None:
    assert GrpcRefusal("x").take(data) is None
