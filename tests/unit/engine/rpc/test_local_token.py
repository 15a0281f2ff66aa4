"""The token of a local process is found by its address, for its user only."""

import os
import socket
import subprocess
import sys
import tempfile

import pytest

from engine.rpc import local_token as module
from engine.rpc.auth import OPERATOR_NAME, ClusterToken
from engine.rpc.local_token import local_coordinator, local_token

HOLDER = """
import os, socket, sys
from engine.rpc.auth import ClusterToken
sock = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
if "mapped" in sys.argv: sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
port = int(next((word for word in sys.argv[3:] if word.isdecimal()), 0))
sock.bind((sys.argv[1], port))
sock.listen()
if "alien" in sys.argv: os.setgroups([]); os.setgid(65534); os.setuid(65534)
if sys.argv[2] != "plain":
    name = "diptych-%s-token" % sys.argv[2].replace("shared", "cluster")
    ClusterToken(("the-secret-of-the-holder",)).share(name)
print(sock.getsockname()[1], flush=True)
sys.stdin.read()
"""
TOKEN = ClusterToken(("the-secret-of-the-holder",))
FINDER = """
import encodings.idna, os, sys
from engine.rpc.local_token import local_token
os.setgroups([]); os.setgid(65534); os.setuid(65534)
print(local_token(sys.argv[1]))
"""


@pytest.fixture
def holding():
    """Start a process that listens on a host and holds a token; returns it and its port."""
    started = []

    def start(host, *words):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, host, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process, int(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("listens", "words", "asked"),
    [
        ("127.0.0.1", (), ("127.0.0.1", "localhost")),
        ("0.0.0.0", (), ("127.0.0.1", "127.4.5.6", "localhost")),
        ("::ffff:127.0.0.1", ("mapped",), ("127.0.0.1",)),
        ("::", ("mapped",), ("127.0.0.1", "[::1]")),
        ("::1", (), ("[::1]",)),
    ],
)
def test_a_token_is_found_by_address(holding, listens, words, asked):
    try:
        _, port = holding(listens, "shared", *words)
    except ValueError:
        pytest.skip(f"nothing can listen on {listens} here")
    for host in asked:
        assert local_token(f"{host}:{port}") == TOKEN, host


def test_no_token_at_other_addresses(holding):
    _, port = holding("127.0.0.1", "shared")
    for address in (f"127.0.0.1:{port ^ 1}", f"127.0.0.2:{port}", f"192.0.2.1:{port}", "x", "x:y"):
        assert local_token(address) is None, address
    _, port = holding("0.0.0.0", "shared")
    assert local_token(f"192.0.2.1:{port}") is None, "not of this machine"


def test_no_token_of_a_killed_process(holding):
    process, port = holding("127.0.0.1", "shared")
    process.kill()
    process.wait()
    assert local_token(f"127.0.0.1:{port}") is None
    holding("127.0.0.1", "plain", str(port))  # another process has the port now
    assert local_token(f"127.0.0.1:{port}") is None


def test_a_process_without_a_token_has_none(holding):
    _, port = holding("127.0.0.1", "plain")
    assert local_token(f"127.0.0.1:{port}") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_does_not_get_it(holding):
    _, port = holding("127.0.0.1", "shared")
    done = subprocess.run(
        [sys.executable, "-c", FINDER, f"127.0.0.1:{port}"], capture_output=True, text=True
    )
    assert done.stdout.strip() == "None", done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_the_token_is_for_the_address_of_its_process_only(holding, monkeypatch):
    _, port = holding("127.0.0.3", "shared")
    holding("127.0.0.2", "plain", str(port), "alien")
    found = [(socket.AF_INET, 0, 0, "", (f"127.0.0.{i}", port)) for i in (2, 3)]
    monkeypatch.setattr(module.socket, "getaddrinfo", lambda *_, **__: found)
    assert local_coordinator(f"both.example:{port}") == (f"127.0.0.3:{port}", TOKEN)


def test_a_token_of_operators_is_not_for_workers(holding):
    _, port = holding("127.0.0.1", "operator")
    address = f"127.0.0.1:{port}"
    assert local_coordinator(address) == (address, TOKEN)
    assert local_token(address) is None
    assert OPERATOR_NAME == "diptych-operator-token"


def test_only_a_memfd_of_another_process_is_read(tmp_path):
    """A link of the same name could lead root to any file, or to a pipe that blocks."""
    file, pipe = tmp_path / "secret", tmp_path / "pipe"
    file.write_text("a-secret-of-another-user")
    os.mkfifo(pipe)
    shm = "/dev/shm" if os.path.isdir("/dev/shm") else str(tmp_path)
    with tempfile.NamedTemporaryFile(dir=shm) as other:
        other.write(b"a-secret-of-another-user")
        other.flush()
        for path in (str(file), str(pipe), other.name):
            assert module._read(path) is None, path
    assert module._read(TOKEN.share()) == TOKEN
