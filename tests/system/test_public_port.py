"""What a stranger, a browser's page and a second user reach of a stack in its default set-up."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from coordinator.client import generate_request
from engine.base.errors import Unauthenticated
from engine.pb.diptych.v1 import admin_pb2, admin_pb2_grpc
from engine.pb.vllm import vllm_engine_pb2 as engine_pb
from engine.pb.vllm import vllm_engine_pb2_grpc
from engine.rpc.auth import ClusterToken
from engine.rpc.channel import open_channel
from tests.support.http_get import http_get
from tests.support.paths import ROOT
from tests.support.stack import DEFAULT, Stack, until

pytestmark = pytest.mark.timeout(300)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
OFF = ("priority", "reflection")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("guarded")
    with Stack(folder, *DEFAULT, "--disable", ",".join(OFF)) as it:
        yield it


def command(stack: Stack, *words: str, **popen: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "coordinator.cli", *words, "--server", stack.address],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=120,
        **popen,  # type: ignore[call-overload]
    )


def raw(address: str, data: bytes) -> bytes:
    """All that comes back until the other side closes, or for two seconds."""
    host, _, port = address.rpartition(":")
    got = b""
    with socket.create_connection((host, int(port)), timeout=2) as sock:
        sock.sendall(data)
        try:
            while part := sock.recv(65536):
                got += part
        except (TimeoutError, ConnectionError):
            pass
    return got


async def drained(address: str, token: ClusterToken | None = None) -> grpc.StatusCode:
    async with open_channel(address, token=token) as channel:
        request = admin_pb2.DrainWorkerRequest(worker_id="decode-0")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await admin_pb2_grpc.AdminServiceStub(channel).DrainWorker(request, timeout=10)
        return caught.value.code()


def test_a_stranger_drains_nothing(guarded: Stack) -> None:
    before = {w.worker_id: w.incarnation for w in guarded.workers()}
    assert asyncio.run(drained(guarded.address)) is grpc.StatusCode.UNAUTHENTICATED
    other = ClusterToken.random()
    assert asyncio.run(drained(guarded.address, other)) is grpc.StatusCode.PERMISSION_DENIED
    with pytest.raises(Unauthenticated):
        guarded.client._ask(
            [stub.DrainWorker for stub in guarded.client._admin],
            admin_pb2.DrainWorkerRequest(worker_id="decode-0"),
            10,
        )
    assert {w.worker_id: w.incarnation for w in guarded.workers()} == before


def test_a_wrong_file_is_named_and_the_own_user_needs_none(guarded: Stack, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("another-cluster-of-ours")
    wrong = command(guarded, "drain", "decode-0", "--cluster-token-file", str(file))
    assert wrong.returncode == 1
    assert "another cluster's token" in wrong.stderr and "--cluster-token-file" in wrong.stderr
    before = {w.worker_id: w.incarnation for w in guarded.workers()}["decode-0"]
    done = command(guarded, "drain", "decode-0")
    assert (done.returncode, done.stdout) == (0, "decode-0 has ended\n"), done.stderr
    until(lambda: guarded.ready(), 120, "another one is there", 0.2)
    assert {w.worker_id: w.incarnation for w in guarded.workers()}["decode-0"] != before


def test_requests_have_pseudonyms_for_strangers(guarded: Stack) -> None:
    request = generate_request("One", max_tokens=2000, ignore_eos=True, request_id="private-4711")
    call = guarded.client._inference[0].Generate(request, timeout=120)
    try:
        next(iter(call))
        (decode,) = guarded.workers("decode")
        seen = set()
        for address in (guarded.http_address, decode.http_address):
            plain = http_get(f"http://{address}/debug/holds", 10)
            assert "private-4711" not in plain.text
            seen |= {h["owner"] for h in plain.json()["holds"] if h["kind"] == "request"}
            full = http_get(f"http://{address}/debug/holds", 10, guarded.operator)
            assert "private-4711" in full.text
            wrong = dict(ClusterToken.random().metadata)
            assert http_get(f"http://{address}/debug/holds", 10, wrong).status_code == 403
        assert len(seen) == 1, "one pseudonym in all processes"
        shown = command(guarded, "status", "--holds")
        assert "private-4711" in shown.stdout, shown.stderr
        assert "switched off: priority, reflection" in shown.stdout
    finally:
        call.cancel()


async def test_no_process_describes_itself(guarded: Stack) -> None:
    path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
    for address in (guarded.address, *(w.address for w in guarded.workers())):
        async with open_channel(address) as channel:
            # Nothing is written: gRPC fails a write to a call that has ended as INTERNAL.
            call = channel.stream_stream(path)(timeout=10)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED, address


async def test_an_abort_of_a_stranger_ends_nothing(guarded: Stack) -> None:
    alone = ("grpc.use_local_subchannel_pool", 1)
    async with (
        open_channel(guarded.address, alone) as first,
        open_channel(guarded.address, alone) as second,
    ):
        request = engine_pb.GenerateRequest(
            request_id="shared",
            text="One, two,",
            sampling_params=engine_pb.SamplingParams(max_tokens=200, ignore_eos=True),
            stream=True,
        )
        call = vllm_engine_pb2_grpc.VllmEngineStub(first).Generate(request, timeout=60)
        messages = aiter(call)
        await anext(messages)
        abort = engine_pb.AbortRequest(request_ids=["shared"])
        await vllm_engine_pb2_grpc.VllmEngineStub(second).Abort(abort, timeout=10)
        *_, last = [message async for message in messages]
        assert last.complete.finish_reason == "length"


def test_pages_and_smugglers_get_nothing_of_any_http_port(guarded: Stack) -> None:
    smuggled = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for address in (guarded.http_address, *(w.http_address for w in guarded.workers())):
        rebound = raw(address, b"GET /metrics HTTP/1.1\r\nHost: evil.example\r\n\r\n")
        assert rebound.startswith(b"HTTP/1.1 403 ") and b"host_not_allowed" in rebound
        head = b"POST /health HTTP/1.1\r\nHost: localhost\r\n"
        both = head + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        got = raw(address, both + smuggled)
        assert got.startswith(b"HTTP/1.1 400 ") and b"diptych_" not in got
        crossed = raw(address, head + b"Origin: http://evil.example\r\nContent-Length: 0\r\n\r\n")
        assert b"origin_not_allowed" in crossed


def test_a_browser_gets_nothing_of_a_grpc_port(guarded: Stack) -> None:
    """HTTP/1.1 is all that it sends without TLS, whatever the body holds."""
    body = PREFACE + bytes(9)
    post = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    addresses = (guarded.address, *(w.address for w in guarded.workers()))
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda address: raw(address, post + body), addresses))
    for got in answers:
        # A frame of settings and the reason of the end are all that gRPC sends.
        assert len(got) < 500 and b"HTTP/1.1" not in got.replace(b"HTTP/1.x", b"")
    until(lambda: guarded.ready(), 10, "all goes on")


def test_no_process_of_the_stack_writes_a_core(guarded: Stack) -> None:
    for pid in guarded.pids():
        limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
        (core,) = [line.split() for line in limits if line.startswith("Max core file size")]
        assert core[4] == "0"
        assert int(Path(f"/proc/{pid}/coredump_filter").read_text(), 16) == 0
    (pid,) = guarded.pids("decode-0")
    assert " dd" in Path(f"/proc/{pid}/smaps").read_text(), "the pool is marked"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_told_what_is_missing(guarded: Stack) -> None:
    script = (
        "import encodings.idna, os, sys\n"
        "from coordinator.cli import main\n"
        "import coordinator.commands.generate, coordinator.commands.status\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        f"sys.exit(main(['drain', 'decode-0', '--server', '{guarded.address}']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    assert "no cluster token: give --cluster-token-file" in done.stderr
