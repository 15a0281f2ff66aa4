"""Connections to the HTTP port without a complete request."""

import asyncio
import itertools
import socket
import struct
import time

import httpx
import pytest
import uvloop
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from engine.http.server import make_app, serve_http

HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
async def address():
    async def slow(_request):
        await asyncio.sleep(1.0)
        return PlainTextResponse("slow\n")

    async def length(request: Request):
        return PlainTextResponse(f"{len(await request.body())}\n")

    async def endless(_request):
        async def lines():
            while True:
                yield b"x" * 100
                await asyncio.sleep(0.01)

        return StreamingResponse(lines())

    routes = [
        Route("/slow", slow),
        Route("/length", length, methods=["POST"]),
        Route("/endless", endless, methods=["POST"]),
    ]
    app = make_app(CollectorRegistry(), lambda: True, routes)
    server = await serve_http(app, "127.0.0.1:0", client_timeout_s=0.5)
    yield server.address
    await server.stop()


async def talk(address, first, more=b"", every_s=0.1):
    """(response bytes, seconds until the server closed) of a client that continues with `more`."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    begun_s = time.monotonic()
    writer.write(first)

    async def trickle():
        for i in range(len(more)):
            await asyncio.sleep(every_s)
            writer.write(more[i : i + 1])

    task = asyncio.create_task(trickle())
    try:
        got = await asyncio.wait_for(reader.read(), 10)
    except ConnectionError:
        got = b""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    writer.close()
    return got, time.monotonic() - begun_s


@pytest.mark.parametrize(
    ("first", "more"),
    [
        (b"", b""),
        (b"GET /hea", b""),
        (HEAD, b"X: " + b"y" * 90),
        (b"POST /length HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n", b"z" * 98),
        (b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n", b"z" * 98),
    ],
    ids=["nothing", "half a line", "a slow head", "a slow body", "a body for no route"],
)
async def test_incomplete_requests_are_cut_off(address, first, more):
    _, seconds = await talk(address, first, more)
    assert 0.4 < seconds < 3.0


async def test_a_complete_request_may_take_any_time(address):
    close = b"Connection: close\r\n\r\n"
    got, _ = await talk(address, HEAD + close)
    assert got.endswith(b"ok\n")
    got, seconds = await talk(address, b"GET /slow HTTP/1.1\r\nHost: x\r\n" + close)
    assert got.endswith(b"slow\n")
    assert seconds > 0.9
    got, _ = await talk(
        address, b"POST /length HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n" + close, b"abc", 0.05
    )
    assert got.endswith(b"3\n")


async def test_a_client_that_does_not_read_is_cut_off():
    """Its response releases what it holds; a slow reader gets all of it."""
    closed = asyncio.Event()

    async def endless(_request):
        async def lines():
            try:
                while True:
                    yield b"x" * 65536
                    await asyncio.sleep(0.001)
            finally:
                closed.set()

        return StreamingResponse(lines())

    app = make_app(CollectorRegistry(), lambda: True, [Route("/endless", endless)])
    server = await serve_http(app, "127.0.0.1:0", client_timeout_s=0.5)
    host, _, port = server.address.rpartition(":")
    try:
        reader, writer = await asyncio.open_connection(host, int(port), limit=65536)
        writer.write(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
        for _ in range(20):
            assert await asyncio.wait_for(reader.read(65536), 5)
            await asyncio.sleep(0.1)
        assert not closed.is_set()
        await asyncio.wait_for(closed.wait(), 5)
        writer.close()
    finally:
        await server.stop()


async def test_a_client_that_does_not_read_the_end_is_cut_off():
    """The rest may be too small to pause writing; the connection closes after it."""

    async def much(request):
        return PlainTextResponse(b"x" * request.path_params["n"])

    app = make_app(CollectorRegistry(), lambda: True, [Route("/much/{n:int}", much)])
    server = await serve_http(app, "127.0.0.1:0", client_timeout_s=0.5)
    host, _, port = server.address.rpartition(":")
    crowd = []
    for i in range(90):  # around the size of the kernel's buffer
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((host, int(port)))
        head = f"GET /much/{2_300_000 + i * 16_000} HTTP/1.1\r\nHost: x\r\n"
        sock.sendall(f"{head}Connection: close\r\n\r\n".encode())
        crowd.append(sock)
    connections = server._server.server_state.connections
    deadline = time.monotonic() + 20
    while len(connections) < 30:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    while connections:
        assert time.monotonic() < deadline, f"{len(connections)} are still there"
        await asyncio.sleep(0.1)
    for sock in crowd:
        sock.close()
    await server.stop()


async def test_a_second_request_on_a_connection_gets_a_new_timer(address):
    """The timer of the first has stopped; uvicorn closes idle connections."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    for _ in range(3):
        writer.write(HEAD + b"\r\n")
        assert (await asyncio.wait_for(reader.readuntil(b"ok\n"), 5)).startswith(b"HTTP/1.1 200")
        await asyncio.sleep(0.3)
    writer.close()


CHUNKED = b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("path", [b"/health", b"/length", b"/endless"])
@pytest.mark.parametrize("at_once", [True, False])
async def test_a_request_that_becomes_invalid_leaves_no_traceback(address, path, at_once, caplog):
    """After a valid head it gets 400, or the connection ends if a response has begun."""
    head = b"POST " + path + CHUNKED + b"1\r\na\r\n"
    got, _ = await (
        talk(address, head + b"zzz\r\n")
        if at_once
        else talk(address, head, b"zz\r\n", every_s=0.05)
    )
    begun = path == b"/endless" and not at_once
    assert got[:12] in ((b"HTTP/1.1 200",) if begun else (b"HTTP/1.1 400", b"HTTP/1.1 405"))
    assert got.count(b"HTTP/1.1") == 1
    assert not [r for r in caplog.records if r.exc_info]


async def test_a_client_that_disconnects_within_a_body_leaves_no_traceback(address, caplog):
    host, _, port = address.rpartition(":")
    for _ in range(3):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /length HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nabc")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
    await asyncio.sleep(0.1)
    assert not [r for r in caplog.records if r.exc_info]


# Actions of clients are no errors of the server.

WHOLE = HEAD + b"\r\n"
SAID = {
    "nothing": b"",
    "ten bytes": WHOLE[:10],
    "a request": WHOLE,
    "two requests": WHOLE * 2,
    "half a body": b"POST /length HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nabc",
    "a slow answer": b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n",
    "a bad chunk": b"POST /length HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "garbage": bytes(range(256)),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a huge head": HEAD + b"X: " + b"y" * 200_000,
    "a websocket": HEAD + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "a tunnel": b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "a star": b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    "a bad path": b"GET /%ff%00//..//%zz HTTP/1.1\r\nHost: x\r\n\r\n",
}
ENDS = ("reads 10 bytes", "reads", "closes", "resets", "half-closes")


async def _misbehave(address: str, said: bytes, end: str) -> None:
    host, _, port = address.rpartition(":")
    sock = socket.create_connection((host, int(port)))
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_sendall(sock, said)
        if end == "half-closes":
            sock.shutdown(socket.SHUT_WR)
        if end.startswith("reads") or end == "half-closes":
            async with asyncio.timeout(0.3):
                await loop.sock_recv(sock, 10 if end == "reads 10 bytes" else 65536)
    except (OSError, TimeoutError):
        pass
    if end != "closes":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_no_action_of_a_client_is_an_error_in_the_log(caplog, run):
    async def slow(_request):
        await asyncio.sleep(0.2)
        return PlainTextResponse("slow\n")

    async def length(request: Request):
        return PlainTextResponse(f"{len(await request.body())}\n")

    async def scene():
        routes = [Route("/slow", slow), Route("/length", length, methods=["POST"])]
        app = make_app(CollectorRegistry(), lambda: True, routes)
        server = await serve_http(app, "127.0.0.1:0", client_timeout_s=0.5, keepalive_s=0.4)
        cases = list(itertools.product(SAID.values(), ENDS)) * 2
        await asyncio.gather(*(_misbehave(server.address, *case) for case in cases))
        await asyncio.sleep(0.8)  # all timers of these connections
        got, _ = await talk(server.address, HEAD + b"Connection: close\r\n\r\n")
        await server.stop()
        return got

    assert run(scene()).startswith(b"HTTP/1.1 200")
    assert not [r for r in caplog.records if r.levelname == "ERROR" or r.exc_info]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("path", ["/length", "/PRI"])
async def test_a_request_may_arrive_in_pieces(address, size, path):
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    said = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc"
    for at in range(0, 4 * size, size):  # "P" may begin HTTP/2's preface, too
        writer.write(said[at : at + size].encode())
        await asyncio.sleep(0.01)
    writer.write(said[4 * size :].encode())
    got = await asyncio.wait_for(reader.read(), 5)
    assert got.startswith(b"HTTP/1.1 200" if path == "/length" else b"HTTP/1.1 404")
    writer.close()


@pytest.mark.parametrize("to", [b"h2c", b"websocket"])
async def test_an_unsupported_upgrade_is_not_logged(address, caplog, to):
    said = HEAD + b"Connection: Upgrade, close\r\nUpgrade: " + to + b"\r\n\r\n"
    got, _ = await talk(address, said)
    assert got.startswith(b"HTTP/1.1 200")
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]


ACCEPTS = [
    "application/openmetrics-text;version=abc",
    "application/openmetrics-text;version=",
    "application/openmetrics-text; version=1.0.0; escaping=nonsense",
    "application/openmetrics-text;version=99.9.9",
    "application/openmetrics-text;version=1.0.0.0.0",
    "application/openmetrics-text;version=-1.0.0",
    "application/openmetrics-text;version=1.0.0\u00e9",
    "application/openmetrics-text;version=\u00b2.0.0",
    "application/openmetrics-text;version==;;=,",
    "text/plain;version=x.y",
    "text/plain;version=1e5.0",
    ",;,;=;",
    "*/*;q=x",
    "\x80\xff",
    "a" * 5000,
]


async def test_any_accept_header_gets_metrics(address):
    async with httpx.AsyncClient(base_url=f"http://{address}") as http:
        for accept in ACCEPTS:
            got = await http.get("/metrics", headers={"accept": accept.encode("latin-1")})
            assert got.status_code == 200, accept
        got = await http.get("/metrics", headers={"accept": "application/openmetrics-text"})
        assert got.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")


async def test_a_path_may_end_in_a_slash(address):
    async with httpx.AsyncClient(base_url=f"http://{address}") as http:
        for path in ("/metrics/", "/health/", "/health/ready/", "/health//"):
            assert (await http.get(path)).status_code == 200
        assert (await http.post("/length/", content=b"abc")).text == "3\n"
        for path in ("/", "/nothing/"):
            assert (await http.get(path)).status_code == 404


async def test_an_idle_connection_is_closed_after_keepalive_s():
    app = make_app(CollectorRegistry(), lambda: True)
    server = await serve_http(app, "127.0.0.1:0", client_timeout_s=0.2, keepalive_s=1.0)
    _, took_s = await talk(server.address, WHOLE)
    assert 0.9 < took_s < 3
    await server.stop()
