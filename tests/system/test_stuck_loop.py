"""A local worker whose event loop is stuck is replaced, though a thread of it reports the stall."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.support.greedy import greedy
from tests.support.paths import ROOT
from tests.support.stack import EXACT, Stack, metrics_of
from tests.support.timeouts import Timeouts

SHORT = greedy(128)
SEAM = """import signal, time
signal.signal(signal.SIGUSR2, lambda *_: time.sleep(3600))
"""
pytestmark = pytest.mark.timeout(300)


def test_a_worker_whose_event_loop_is_stuck_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SEAM)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    flags = (*EXACT, *Timeouts(worker_hang_s=5, worker_wait_s=60).stack_flags)
    with Stack(tmp_path, *flags) as stack:
        first = stuck = stack.pid_of("decode-0")
        tokens: list[int] = []
        for event in stack.client.generate(SHORT["prompt"], timeout_s=120, max_tokens=64):
            tokens += getattr(event, "token_ids", ())
            if len(tokens) > 10 and stuck:
                os.kill(stuck, signal.SIGUSR2)
                stuck = 0
        assert tokens == SHORT["tokens"]
        assert stack.pid_of("decode-0") != first
        counts = metrics_of(stack.http_address)
        assert counts["diptych_worker_hangs_total"] == 1
        assert counts["diptych_worker_stalls_total"] == 1
        log = stack.logs()["coordinator"]
        assert log.index("a worker's event loop stalls") < log.index("local worker hangs")
        assert "has sent nothing" not in log, "its stream was kept until it was killed"
        stack.assert_at_rest()
