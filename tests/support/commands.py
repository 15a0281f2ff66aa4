"""Commands that end without a signal, run beside the tests that do not look at them.

start(key, ...) --> waits for its turn --> runs, a few at a time --> result(key)
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from tests.support.paths import ROOT

_TIMEOUT_S = 120.0  # of one command


def run_command(module: str, *args: str) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ARG ...` to its end."""
    return subprocess.run(
        [sys.executable, "-m", module, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=_TIMEOUT_S,
    )


class Commands:
    """A context manager; commands that have not begun at its end do not run."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._ends: dict[Hashable, Future[subprocess.CompletedProcess[str]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self, key: Hashable, module: str, *args: str) -> None:
        """Run `python -m MODULE ARG ...` after those that were started before."""
        assert key not in self._ends
        self._ends[key] = self._pool.submit(run_command, module, *args)

    def result(self, key: Hashable) -> subprocess.CompletedProcess[str]:
        """Exit status and output of a command, when it has ended."""
        return self._ends[key].result()
