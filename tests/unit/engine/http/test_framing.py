"""A request with an ambiguous end gets 400, and its connection is closed."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from engine.http.guard import refusals_counter
from engine.http.server import make_app, serve_http

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
TAIL = b"0\r\n\r\n"


def post(*lines: bytes, body: bytes = b"", version: bytes = b"1.1", end: bytes = b"\r\n") -> bytes:
    head = [b"POST /length HTTP/" + version, b"Host: localhost", *lines]
    return end.join(head) + end + end + body


REFUSED = {
    "both lengths": post(b"Content-Length: 5", CHUNKED.strip(), body=TAIL),
    "both, the other way": post(CHUNKED.strip(), b"Content-Length: 5", body=TAIL),
    "both, length 0": post(CHUNKED.strip(), b"Content-Length: 0", body=TAIL),
    "length twice": post(b"Content-Length: 5", b"Content-Length: 5", body=b"12345"),
    "two lengths": post(b"Content-Length: 5", b"content-length: 6", body=b"12345"),
    "a list": post(b"Content-Length: 5, 5", body=b"12345"),
    "a list of two": post(b"Content-Length: 5, 6", body=b"12345"),
    "a list with a gap": post(b"Content-Length: 5,", body=b"12345"),
    "a sign": post(b"Content-Length: +5", body=b"12345"),
    "minus": post(b"Content-Length: -5", body=b"12345"),
    "hex": post(b"Content-Length: 0x5", body=b"12345"),
    "underscore": post(b"Content-Length: 1_0", body=b"1234512345"),
    "a fraction": post(b"Content-Length: 5.0", body=b"12345"),
    "spaces within": post(b"Content-Length: 1 0", body=b"1234512345"),
    "empty": post(b"Content-Length:", body=b""),
    "overflow": post(b"Content-Length: " + b"9" * 30, body=b"12345"),
    "digits of another script": post("Content-Length: ٥".encode(), body=b"12345"),
    "identity": post(b"Transfer-Encoding: identity", b"Content-Length: 5", body=b"12345"),
    "identity alone": post(b"Transfer-Encoding: identity"),
    "chunked twice": post(b"Transfer-Encoding: chunked, chunked", body=TAIL),
    "two codings": post(CHUNKED.strip(), CHUNKED.strip(), body=TAIL),
    "xchunked": post(b"Transfer-Encoding: xchunked", body=TAIL),
    "gzip, chunked": post(b"Transfer-Encoding: gzip, chunked", body=TAIL),
    "a vertical tab": post(b"Transfer-Encoding: \x0bchunked", body=TAIL),
    "a quote": post(b'Transfer-Encoding: "chunked"', body=TAIL),
    "a parameter": post(b"Transfer-Encoding: chunked;q=1", body=TAIL),
    "a coding in a fold": post(b"X: y", b" Transfer-Encoding: chunked", body=TAIL),
    "a folded coding": post(b"Transfer-Encoding:", b" chunked", body=TAIL),
    "a tab fold": post(b"X: y", b"\tz"),
    "space before the colon": post(b"Content-Length : 5", body=b"12345"),
    "tab before the colon": post(b"Transfer-Encoding\t: chunked", body=TAIL),
    "no colon": post(b"Content-Length 5", body=b"12345"),
    "no name": post(b": 5"),
    "CONNECT with a path": b"CONNECT /length HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "NUL in a name": post(b"Content\x00-Length: 5", body=b"12345"),
    "NUL in a value": post(b"X: a\x00b"),
    "CR in a value": post(b"X: a\rContent-Length: 5"),
    "CR at the end": post(b"X: a\r"),
    "bare LF": post(b"Content-Length: 5", body=b"12345", end=b"\n"),
    "one bare LF": post(b"X: y\nContent-Length: 5", body=b"12345"),
    "LF before the blank line": b"GET /length HTTP/1.1\r\nHost: localhost\n\r\n",
    "an LF as the blank line": b"GET /length HTTP/1.1\r\nHost: localhost\r\n\n",
    "LF first": b"\n" + post(),
    "chunks in HTTP/1.0": post(CHUNKED.strip(), body=TAIL, version=b"1.0"),
    "chunks in HTTP/1.0, kept": post(
        CHUNKED.strip(), b"Connection: keep-alive", body=TAIL, version=b"1.0"
    ),
    "HTTP/0.9": post(version=b"0.9"),
    "HTTP/2.0": post(version=b"2.0"),
    "HTTP/1.10": post(version=b"1.10"),
    "lower case": post().replace(b"HTTP/", b"http/", 1),
    "absolute form": post().replace(b"/length", b"http://localhost/length", 1),
    "authority form": b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no slash": post().replace(b"/length", b"length", 1),
    "two spaces": post().replace(b" /length", b"  /length", 1),
    "no host": b"GET /length HTTP/1.1\r\n\r\n",
    "two hosts": post(b"Host: localhost"),
    **{
        f"chunk {name}": post(CHUNKED.strip(), body=chunk)
        for name, chunk in {
            "0x": b"0x5\r\n12345\r\n" + TAIL,
            "sign": b"+5\r\n12345\r\n" + TAIL,
            "minus": b"-5\r\n12345\r\n" + TAIL,
            "underscore": b"1_0\r\n1234512345123451\r\n" + TAIL,
            "overflow": b"fffffffffffffffff\r\n12345\r\n" + TAIL,
            "space before": b" 5\r\n12345\r\n" + TAIL,
            "space after": b"5 \r\n12345\r\n" + TAIL,
            "no size": b"\r\n12345\r\n" + TAIL,
            "no hex": b"g\r\n" + TAIL,
            "LF": b"5\n12345\r\n" + TAIL,
            "LF in an extension": b"5;a\nb\r\n12345\r\n" + TAIL,
            "CR in an extension": b"5;a\rb\r\n12345\r\n" + TAIL,
            "NUL in an extension": b"5;a\x00b\r\n12345\r\n" + TAIL,
            "a long extension": b"5;" + b"a" * 300 + b"\r\n12345\r\n" + TAIL,
            "an endless extension": b"5;" + b"a" * 600,
            "longer than its size": b"5\r\n123456\r\n" + TAIL,
            "LF after the data": b"5\r\n12345\n" + TAIL,
            "a trailer with LF": b"0\r\nX: y\n\r\n",
            "a folded trailer": b"0\r\nX: y\r\n z\r\n\r\n",
            "a trailer of two lengths": b"0\r\nContent-Length: 5, 6\r\n\r\n",
            "crumbs": b"1\r\nx\r\n" * 20_000 + TAIL,
            "extensions": (b"1;" + b"a" * 200 + b"\r\nx\r\n") * 200 + TAIL,
        }.items()
    },
}

SERVED = {
    "a length": (post(b"Content-Length: 5", body=b"12345"), b"5\n"),
    "a length in spaces": (post(b"Content-Length: \t 5 ", body=b"12345"), b"5\n"),
    "no body": (post(), b"0\n"),
    "chunks": (post(CHUNKED.strip(), body=b"5\r\n12345\r\n003\r\nabc\r\n" + TAIL), b"8\n"),
    "Chunked": (post(b"TRANSFER-ENCODING: Chunked", body=b"A\r\n1234567890\r\n" + TAIL), b"10\n"),
    "an extension": (post(CHUNKED.strip(), body=b"5;a=b\r\n12345\r\n" + TAIL), b"5\n"),
    "trailers": (post(CHUNKED.strip(), body=b"5\r\n12345\r\n0\r\nX: y\r\n\r\n"), b"5\n"),
    "small chunks": (post(CHUNKED.strip(), body=b"1\r\nx\r\n" * 2000 + TAIL), b"2000\n"),
    "chunks of lines": (
        post(CHUNKED.strip(), body=(b"50\r\n" + b"x" * 80 + b"\r\n") * 20_000 + TAIL),
        b"1600000\n",
    ),
}


@pytest.fixture
async def server():
    async def length(request: Request):
        return PlainTextResponse(f"{len(await request.body())}\n")

    async def smuggled(_request):
        return PlainTextResponse("smuggled\n")

    registry = CollectorRegistry()
    routes = [
        Route("/length", length, methods=["POST", "GET"]),
        Route("/smuggled", smuggled),
    ]
    it = await serve_http(
        make_app(registry, lambda: True, routes),
        "127.0.0.1:0",
        client_timeout_s=5,
        refused=refusals_counter(registry),
    )
    it.registry = registry
    yield it
    await it.stop()


async def exchange(server, *sent: bytes) -> bytes:
    """All bytes until the server closes; b"" after a reset."""
    host, _, port = server.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for data in sent:
            writer.write(data)
            await asyncio.sleep(0.01)
        return await asyncio.wait_for(reader.read(), 4)
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize("name", REFUSED)
async def test_an_ambiguous_request_ends_the_connection(server, name):
    got = await exchange(server, REFUSED[name] + SMUGGLED + SMUGGLED)
    assert b"smuggled" not in got
    assert got.startswith(b"HTTP/1.1 400 "), got
    assert b"200 OK" not in got
    assert b"connection: close" in got.lower()
    counted = server.registry.get_sample_value("diptych_http_refusals_total", {"reason": "framing"})
    assert counted == 1


@pytest.mark.parametrize("name", SERVED)
async def test_an_unambiguous_request_is_served_and_so_is_the_next(server, name):
    request, answer = SERVED[name]
    last = SMUGGLED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    got = await exchange(server, request + last)
    assert got.count(b"HTTP/1.1 200 ") == 2, got
    assert answer in got
    assert got.endswith(b"smuggled\n")


async def test_requests_before_an_ambiguous_one_are_served(server):
    got = await exchange(server, SMUGGLED + REFUSED["both lengths"] + SMUGGLED)
    assert got.count(b"HTTP/1.1 200 ") == 1
    assert got.count(b"HTTP/1.1 400 ") == 1
    assert got.count(b"smuggled\n") == 1


async def test_a_request_in_single_bytes_has_the_same_result(server):
    request = REFUSED["length twice"] + SMUGGLED
    got = await exchange(server, *(request[i : i + 1] for i in range(len(request))))
    assert b"smuggled" not in got
    assert not got or got.startswith(b"HTTP/1.1 400 ")


async def test_the_response_names_the_reason(server):
    got = await exchange(server, REFUSED["both lengths"])
    assert got.endswith(b"Transfer-Encoding and Content-Length: expected one\n")


async def test_http_1_0_is_served_once(server):
    got = await exchange(server, b"GET /smuggled HTTP/1.0\r\n\r\n" + SMUGGLED)
    assert got.count(b"smuggled\n") == 1
