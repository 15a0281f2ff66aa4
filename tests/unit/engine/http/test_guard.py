"""The hosts that a server accepts, and the pages that may call it."""

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from engine.base.option_values import parse_hosts
from engine.http.guard import AllowedHosts, host_of, refusals_counter
from engine.http.server import make_app, serve_http

LOCAL = ("localhost", "localhost:8000", "LOCALHOST", "localhost.", "127.0.0.1", "127.8.9.10:1")
LOCAL += ("[::1]", "[::1]:8000", "::1".join("[]"))
EVIL = ("evil.example", "evil.example:8000", "localhost.evil.example", "notlocalhost", "")
EVIL += ("127.0.0.1.evil.example", "10.0.0.1", "0.0.0.0", "localhost:x", "[::1", "[::1]x", "a b")
EVIL += ("localhost@evil.example", "evil.example#localhost", "2130706433", "0x7f.1", "localhost,x")


@pytest.mark.parametrize("listen", ["127.0.0.1:8000", "localhost:8000", "[::1]:8000"])
def test_a_loopback_listener_has_local_names(listen):
    hosts = AllowedHosts.of("", listen, "::1" if "[" in listen else "127.0.0.1")
    assert [host for host in LOCAL if host not in hosts] == []
    assert [host for host in EVIL if host in hosts] == []


def test_allowed_hosts_add_names():
    hosts = AllowedHosts.of("chat.example.com, *.Pods.local", "127.0.0.1:1", "127.0.0.1")
    for host in ("chat.example.com:443", "CHAT.example.com", "a.b.pods.local", "localhost"):
        assert host in hosts
    for host in ("example.com", "x.chat.example.com", "pods.local", "xpods.local", "10.0.0.1"):
        assert host not in hosts
    assert "evil.example" in AllowedHosts.of("*", "127.0.0.1:1", "127.0.0.1")


def test_an_address_has_many_spellings():
    hosts = AllowedHosts.of("a.example., [2001:DB8:0::1],*.b.", "127.0.0.1:1", "127.0.0.1")
    for host in ("a.example", "a.example.", "[2001:db8::1]:8", "[2001:db8:0:0::1]", "x.b"):
        assert host in hosts, host
    for host in ("[2001:db8::2]", "[::ffff:10.0.0.1]", "b"):
        assert host not in hosts, host
    assert "[::ffff:127.0.0.1]" in hosts and "[::ffff:7f00:1]:8000" in hosts
    mapped = AllowedHosts.of("", "[::ffff:127.0.0.1]:1", "::ffff:127.0.0.1")
    assert "localhost" in mapped and "evil.example" not in mapped


def test_a_cluster_needs_no_configuration():
    everywhere = AllowedHosts.of("", "0.0.0.0:8000", "0.0.0.0")
    assert "diptych.default.svc.cluster.local:8000" in everywhere
    named = AllowedHosts.of("diptych.default.svc", "0.0.0.0:8000", "0.0.0.0")
    assert "diptych.default.svc:8000" in named
    assert "10.1.2.3:8000" in named, "a probe calls the pod's address"
    assert "evil.example" not in named


@pytest.mark.parametrize("text", ["", "*", "a", "a,b.c", "*.a.b", "10.0.0.1", "[::1]", "my_host"])
def test_valid_host_lists(text):
    assert parse_hosts(text) == text


@pytest.mark.parametrize("text", ["a:80", "http://a", "a/b", "*,a", "*a", "a b", ",", "*."])
def test_invalid_host_lists(text):
    with pytest.raises(ValueError, match="expected NAME"):
        parse_hosts(text)


def test_malformed_hosts():
    assert host_of("[::1") == host_of("a:b") == host_of("[::1]8") == ""


async def ask(origins="", allowed="", **kinds):
    """Statuses of requests by name; each is (method, headers)."""

    async def hello(_request):
        return PlainTextResponse("hello\n")

    registry = CollectorRegistry()
    app = make_app(registry, lambda: True, [Route("/", hello, methods=["GET", "POST", "DELETE"])])
    server = await serve_http(
        app,
        "127.0.0.1:0",
        allowed_hosts=allowed,
        origins=origins,
        refused=refusals_counter(registry),
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://{server.address}") as client:
            answers = {
                name: await client.request(method, "/", headers=headers)
                for name, (method, headers) in kinds.items()
            }
    finally:
        await server.stop()
    counted = {
        reason: registry.get_sample_value("diptych_http_refusals_total", {"reason": reason}) or 0
        for reason in ("host", "origin")
    }
    return answers, counted


async def test_another_host_is_refused_in_json():
    answers, counted = await ask(
        rebound=("GET", {"Host": "evil.example"}),
        named=("GET", {"Host": "localhost"}),
        preflight=("OPTIONS", {"Host": "evil.example", "Origin": "http://evil.example"}),
    )
    assert {name: a.status_code for name, a in answers.items()} == {
        "rebound": 403,
        "named": 200,
        "preflight": 403,
    }
    error = answers["rebound"].json()["error"]
    assert error["code"] == "host_not_allowed"
    assert "evil.example" in error["message"] and "--allowed-hosts" in error["message"]
    assert counted == {"host": 2, "origin": 0}


async def test_pages_of_other_origins_are_refused():
    evil = {"Origin": "http://evil.example"}
    answers, counted = await ask(
        origins="https://chat.example.com",
        post=("POST", evil),
        delete=("DELETE", evil),
        null=("POST", {"Origin": "null"}),
        cross=("POST", {**evil, "Sec-Fetch-Site": "cross-site"}),
        get=("GET", evil),
        own=("POST", {"Origin": "http://localhost:8000", "Host": "localhost:8000"}),
        proxied=("POST", {"Origin": "https://ui.example", "Sec-Fetch-Site": "same-origin"}),
        named=("POST", {"Origin": "https://chat.example.com"}),
        program=("POST", {}),
    )
    refused = {name for name, answer in answers.items() if answer.status_code == 403}
    assert refused == {"post", "delete", "null", "cross"}
    assert counted == {"host": 0, "origin": 4}
    assert answers["post"].json()["error"]["code"] == "origin_not_allowed"


async def test_any_origin_may_be_allowed():
    answers, _ = await ask(origins="*", post=("POST", {"Origin": "http://any.example"}))
    assert answers["post"].status_code == 200
