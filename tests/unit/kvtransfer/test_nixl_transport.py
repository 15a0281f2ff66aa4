"""The errors where NIXL cannot be used, and its silence where it can."""

import os
import subprocess
import sys
import time

START = """
import sys
{before}
from engine.base.errors import ConfigError
from kvtransfer.nixl_transport import NixlTransport
try:
    NixlTransport("me").close()
except ConfigError as error:
    print(error)
    sys.exit(2)
"""


def start(before: str = "", **env: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", START.format(before=before)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout


def test_missing_nixl_is_named() -> None:
    code, out = start("sys.modules['nixl'] = None")
    assert code == 2 and "nixl" in out and "diptych[worker]" in out


def test_unusable_lanes_are_named() -> None:
    code, out = start(UCX_TLS="self")
    assert code == 2 and "UCX_TLS" in out


def test_an_end_that_hangs_with_the_gil_ends_the_process() -> None:
    """A sleep in C that keeps the GIL stands for the hang; no Python thread could end it."""
    script = """
import ctypes
from kvtransfer import nixl_transport
nixl_transport.HANG_S = 0.3
with nixl_transport._ended_if_it_hangs():
    pass
with nixl_transport._ended_if_it_hangs():
    ctypes.PyDLL(None).sleep(20)
"""
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1 and time.monotonic() - begun < 15
    assert "most recent call first" in done.stderr


def test_nothing_is_printed_and_logging_is_left_as_it_was() -> None:
    check = "import atexit, logging; atexit.register(lambda: print(logging.raiseExceptions))"
    assert start(check) == (0, "True\n")
