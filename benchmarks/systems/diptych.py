"""Diptych: `coordinator start` with default flags, on free ports."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from benchmarks.plan import Endpoint
from benchmarks.systems.base import Command, Launch, System, free_port, scrape
from benchmarks.workloads import Needs
from coordinator.client import Client
from engine.base.errors import DiptychError

_COUNTERS = ("diptych_engine_step_seconds", "diptych_spec_decode", "diptych_kv_stale_reads_total")


def systems(model: str, flags: tuple[str, ...] = ()) -> tuple[System, ...]:
    """Diptych with its default drafter, and without."""
    return (
        System(
            "ours",
            "Diptych, as it comes",
            partial(_launch, model, flags),
            missing=str,
            speculative=True,
        ),
        System(
            "ours-nospec",
            "Diptych, `--drafter none`",
            partial(_launch, model, ("--drafter", "none", *flags)),
            missing=str,
        ),
    )


def _launch(model: str, flags: tuple[str, ...], needs: Needs, folder: Path) -> Launch:
    server, http = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    argv = [sys.executable, "-m", "coordinator.cli", "start", "--model", model]
    argv += ["--listen", server, "--http", http, "--log-dir", str(folder)]
    argv += ["--max-model-len", str(needs.max_model_len)]
    argv += ["--max-num-seqs", str(max(64, needs.max_streams)), *flags]
    return Launch(
        Endpoint("diptych", server),
        (Command("coordinator", tuple(argv)),),
        is_ready=partial(_is_ready, server),
        counters=partial(_counters, server),
    )


def _is_ready(server: str) -> bool:
    """Whether a worker of each role is ready."""
    try:
        with Client(server) as client:
            ready = {w.role for w in client.workers(timeout_s=2.0) if w.state == "ready"}
    except DiptychError:
        return False
    return ready >= {"prefill", "decode"}


def _counters(server: str) -> dict[str, float]:
    """Step times and drafts of all workers, by role."""
    totals: dict[str, float] = {}
    with Client(server) as client:
        workers = client.workers()
    for worker in workers:
        samples = scrape((f"http://{worker.http_address}/metrics",), _COUNTERS)
        totals |= {f"{worker.role}:{name}": value for name, value in samples.items()}
    return totals
