"""Callers that let the public port wait: they stop reading, writing or living, and keep the line.

Each returns when the port has got rid of him, and fails where it does not in time: after
`--client-timeout-s`, and somewhat later on a machine where others work (`gone_s`). They may all be
there at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

from engine.pb.diptych.v1 import inference_pb2 as pb
from tests.faults.port import GENERATE, PROMPT, Port, request
from tests.support import http2
from tests.support.http2 import closed_by_peer, connect, frame, grpc_message
from tests.support.stack import until

NUM_NEVER = 12
NUM_HTTP_CONNECTIONS = 1_000


def never_read(port: Port) -> None:
    """No window at all, no deadline: the answers are written, their blocks are free, and the calls
    end because they are not read.
    """
    names = [f"never-{i}" for i in range(NUM_NEVER)]
    gone_s = port.patience.gone_s
    with port.raw() as raw:
        raw.begin({http2.INITIAL_WINDOW_SIZE: 0})
        for name in names:
            raw.request(GENERATE, request(40, request_id=name).SerializeToString())
        pings = threading.Thread(target=lambda: list(raw.read_frames(gone_s)), daemon=True)
        pings.start()  # a good connection in all else, or it would be cut off for that
        until(lambda: port.held_for("decode-0", *names), 20, "the decode worker writes them")
        until(lambda: not port.held_for("decode-0", *names), gone_s, "their blocks are free")
        until(lambda: not port.held_for("coordinator", *names), gone_s, "nothing is admitted")


def stops_reading(port: Port) -> None:
    """A real client with a small window takes one message and goes to sleep."""
    asked = request(port.patience.sleeper_tokens, request_id="sleeper")
    gone_s = port.patience.gone_s + 10
    with port.channel(("grpc.http2.lookahead_bytes", 1024)) as channel:
        call = channel.unary_stream(
            GENERATE.decode(), response_deserializer=pb.GenerateResponse.FromString
        )
        answer = call(asked.SerializeToString(), timeout=120)
        next(answer)
        assert port.held_for("decode-0", "sleeper")
        until(lambda: not port.held_for("decode-0", "sleeper"), gone_s, "its blocks are free")
        answer.cancel()
        until(lambda: not port.held_for("coordinator", "sleeper"), 5, "it is let go")


_SLEEPER = """
import sys, time
from coordinator.client import Client
with Client(sys.argv[1]) as client:
    events = client.generate({prompt}, max_tokens={tokens}, ignore_eos=True, request_id="stopped")
    next(events); print("begun", flush=True)
    for event in events: pass
"""


def is_stopped(port: Port) -> None:
    """SIGSTOP: its connection looks alive, until keepalive ends it."""
    gone_s = port.patience.gone_s
    code = _SLEEPER.format(prompt=PROMPT, tokens=port.patience.stopped_tokens)
    client = subprocess.Popen(
        [sys.executable, "-c", code, port.address],
        stdout=subprocess.PIPE,
    )
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == b"begun\n"
        os.kill(client.pid, signal.SIGSTOP)
        assert port.held_for("decode-0", "stopped")
        until(lambda: not port.held_for("decode-0", "stopped"), gone_s + 30, "its blocks are free")
        until(lambda: not port.held_for("coordinator", "stopped"), gone_s, "it is let go")
    finally:
        client.kill()
        client.wait()
        if client.stdout is not None:
            client.stdout.close()


def falls_silent(port: Port) -> None:
    """Half-open connections: each is cut off in time, whatever it has said before."""
    preface = http2.PREFACE + http2.settings()
    body = frame(http2.DATA, 0, 1, grpc_message(request(3).SerializeToString(), length=500))
    headers = frame(http2.HEADERS, http2.END_HEADERS, 1, http2.call_headers(GENERATE))
    # With the settings acknowledged a connection is a good one, and only pings tell.
    whole = preface + frame(http2.SETTINGS, http2.ACK)
    openings = {
        "silent": b"",
        "half a preface": http2.PREFACE[:10],
        "a preface": preface,
        "half a frame": preface + frame(http2.HEADERS, 0, 1, b"x" * 50)[:20],
        "headers without an end": preface + frame(http2.HEADERS, 0, 1, b"\x00\x01a\x01b"),
        "a call without a message": preface + headers,
        "half a message": preface + headers + body,
        "a good beginning": whole,
        "a good beginning and half a frame": whole + headers[:20],
        "a good beginning and half a message": whole + headers + body,
    }
    sockets = {}
    for name, opening in openings.items():
        for i in range(10):
            sock = sockets[f"{name} {i}"] = connect(port.address)
            sock.sendall(opening)
    begun_s, closed_s = time.monotonic(), {}
    for name, sock in sockets.items():
        left = port.patience.gone_s - (time.monotonic() - begun_s)
        assert closed_by_peer(sock, left), f"{name}: still open"
        closed_s[name] = time.monotonic() - begun_s
        sock.close()
    print({k: round(v, 1) for k, v in closed_s.items() if k.endswith(" 0")})


def writes_slowly(port: Port) -> None:
    """Every ping is answered, so the connection is well; its calls are ended all the same."""
    with port.raw() as raw:
        raw.begin()
        silent = raw.open_stream(GENERATE)
        slow = raw.open_stream(GENERATE)
        body = grpc_message(request(3).SerializeToString())
        begun_s, sent, ended = time.monotonic(), 0, set()
        while ended != {silent, slow}:
            assert time.monotonic() - begun_s < port.patience.gone_s, (
                f"{ended} of {silent} and {slow} ended"
            )
            if slow not in ended and sent < len(body) - 1:  # a byte a second
                raw.send(frame(http2.DATA, 0, slow, body[sent : sent + 1]))
                sent += 1
            for found in raw.read_frames(1.0):
                ended |= {found.stream} if found.ends_stream else set()
        again = raw.request(GENERATE, request(3).SerializeToString())
        assert raw.wait_for_end(again, 20), "the connection itself goes on"


def half_asks_by_http(port: Port) -> None:
    """A thousand silent, slow and half-asked ones: all are cut off, others are served meanwhile."""
    openings = (
        b"",
        b"GET /hea",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: y",
        b"POST / HTTP/1.1\r\n",
    )
    crowd = [connect(port.stack.http_address) for _ in range(NUM_HTTP_CONNECTIONS)]
    for i, sock in enumerate(crowd):
        sock.sendall(openings[i % len(openings)])
    begun_s = time.monotonic()
    while time.monotonic() - begun_s < 5:  # a byte a second is no sign of life
        for sock in crowd[1::4]:
            with suppress(OSError):
                sock.sendall(b"x")
        assert port.health().startswith(b"HTTP/1.1 200")
        time.sleep(1.0)
    for sock in crowd:
        left = port.patience.gone_s - (time.monotonic() - begun_s)
        assert closed_by_peer(sock, left), "still open"
        sock.close()
    print(f"all of the HTTP port closed after {time.monotonic() - begun_s:.1f} s")


WAITERS = {
    "readers that never read": never_read,
    "a reader that stops reading": stops_reading,
    "a client that is stopped": is_stopped,
    "half-open connections": falls_silent,
    "slow writers and silent calls": writes_slowly,
    "1,000 half-asked HTTP connections": half_asks_by_http,
}
