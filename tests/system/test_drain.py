"""Workers replaced one by one while requests run: callers see a pause and nothing else."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.greedy import greedy
from tests.support.paths import ROOT
from tests.support.stack import QUICK, Stack, until

LONG, SHORT = greedy(1500)["prompt"], greedy(128)["prompt"]
pytestmark = pytest.mark.timeout(300)


def _drain(stack: Stack, worker: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "coordinator.cli", "drain", worker]
    command += ["--server", stack.address, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_each_worker_is_replaced_under_load(tmp_path: Path) -> None:
    with Stack(tmp_path, *QUICK, prefill=1, decode=2) as stack:
        undisturbed = [stack.generate(p, max_tokens=24)[0] for p in (SHORT, LONG)]
        wrong: list[object] = []
        done, stop = [0], threading.Event()

        def ask(prompt: list[int], expected: list[int]) -> None:
            while not stop.is_set():
                try:
                    tokens = stack.generate(prompt, max_tokens=24)[0]
                except Exception as error:
                    wrong.append(error)
                    return
                done[0] += 1
                if tokens != expected:
                    wrong.append(tokens)
                stop.wait(0.5)  # cores for the workers that start

        asked = list(zip((SHORT, LONG, SHORT), (*undisturbed, undisturbed[0]), strict=True))
        threads = [threading.Thread(target=ask, args=args) for args in asked]
        for thread in threads:
            thread.start()
        try:
            for worker, flags in (
                ("decode-0", ()),
                ("prefill-0", ()),
                ("decode-1", ("--deadline", "0.2")),
            ):
                before, answers = stack.pid_of(worker), done[0]
                ended = _drain(stack, worker, *flags)
                assert (ended.returncode, ended.stdout) == (0, f"{worker} has ended\n"), ended
                until(lambda: stack.pids(worker) not in ([], [before]), 30, f"{worker} is back")  # noqa: B023
                until(stack.ready, 60, "all workers are ready")
                until(lambda: done[0] > answers, 60, "answers go on")  # noqa: B023
        finally:
            stop.set()
            for thread in threads:
                thread.join(120)
        assert not wrong
        assert done[0] > 3
        stack.assert_at_rest()
        refused = _drain(stack, "decode-9")
        assert refused.returncode == 1
        assert "known: decode-0, decode-1, prefill-0" in refused.stderr
