"""Chaos: faults every few seconds under load, for as long as one asks.

    python -m tests.faults.chaos --minutes 30 [--seed N] [--out DIR] [--lane tcp]

A seed fixes what is asked and what is broken; when each thing happens to which request is the
machine's affair. Exit status 1 if there was one wrong answer, leaked block, unexplained error,
process that ended unasked, or traceback.

    [ faults and load ~ 90 s | calm: undo, finish, all back, nothing held ] ... report
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from tests.faults import checks
from tests.faults.chaos_faults import Faults
from tests.faults.chaos_load import Callers
from tests.faults.chaos_report import Findings, Report
from tests.faults.oracle import Oracle
from tests.faults.tcp_proxy import TcpProxy
from tests.support.cluster import Cluster, Shape
from tests.support.network import Namespaces
from tests.support.vitals import vitals

_ROUND_S = 90.0
_NUM_CALLERS = 5
_FINISH_S = 200.0  # for what was asked before the calm
_WHOLE_S = 90.0
_REST_S = 60.0
_TCP = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "eth0"}
# Tracebacks that a fault explains; each with its reason.
EXPLAINED: dict[str, str] = {}


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--out", type=Path, help="folder for the report and the logs")
    parser.add_argument("--lane", choices=("auto", "tcp"), default="auto", help="of NIXL's reads")
    options = parser.parse_args()
    print(f"chaos: seed {options.seed}, {options.minutes:g} minutes", flush=True)
    out = options.out or Path(tempfile.mkdtemp(prefix="chaos-"))
    out.mkdir(parents=True, exist_ok=True)
    spaces = Namespaces.usable()
    tcp = options.lane == "tcp" and spaces
    network = Namespaces() if spaces else TcpProxy()
    shape = Shape(env=_TCP if tcp else {})
    with Cluster(out, shape, network) as cluster:
        oracle = Oracle.ask(cluster.address("coordinator-0"))
        report = asyncio.run(_run(cluster, oracle, options.seed, options.minutes))
    report.shape = (
        f"2 coordinators, 2 prefill and 2 decode workers, {_NUM_CALLERS} callers,"
        f" {'network namespaces' if spaces else 'a proxy between processes'},"
        f" reads over {'TCP' if tcp else 'memory'}"
    )
    report.write(out)
    print(report.page(), flush=True)
    print(f"chaos: seed {options.seed}; report and logs in {out}", flush=True)
    return 1 if report.failures else 0


async def _run(cluster: Cluster, oracle: Oracle, seed: int, minutes: float) -> Report:
    faults, findings = Faults(cluster, seed), Findings()
    callers = Callers(cluster, oracle, seed, _NUM_CALLERS)
    most: dict[str, int] = defaultdict(int)
    begun = time.monotonic()
    callers.start()
    try:
        while (left_s := begun + 60 * minutes - time.monotonic()) > 0:
            callers.resume()
            await faults.go_on(min(_ROUND_S, left_s))
            await _calm(cluster, callers, findings)
            for place in cluster.places:
                most[place.name] = max(most[place.name], vitals(place.pid).resident_bytes)
            _say(begun, faults, callers, findings)
    finally:
        await callers.stop()
    _look_at_logs(cluster, findings)
    lost = sum(
        line.get("event") == "attempt lost"
        for name in cluster.coordinators
        for line in cluster.log_lines(name)
    )
    took = (time.monotonic() - begun) / 60
    return Report(seed, took, "", faults.count, callers.tally, findings, dict(most), lost)


async def _calm(cluster: Cluster, callers: Callers, findings: Findings) -> None:
    """Every request ends, every process is back, nothing is held."""
    try:
        await callers.pause(_FINISH_S)
    except TimeoutError:
        findings.leaks.append(f"requests that did not end within {_FINISH_S:g} s")
    try:
        await asyncio.to_thread(cluster.until_whole, _WHOLE_S)
        await asyncio.to_thread(checks.at_rest, cluster, _REST_S)
    except AssertionError as error:
        findings.leaks.append(f"{time.strftime('%H:%M:%S')} {error}")
    findings.quiet_points += 1


def _look_at_logs(cluster: Cluster, findings: Findings) -> None:
    for place in cluster.places:
        bad = [end.status for end in place.ends if not end.wanted]
        if bad:
            findings.ended.append(f"{place.name}: exit statuses {bad}")
        for text in checks.tracebacks(cluster.log_text(place.name)):
            if not any(pattern in text for pattern in EXPLAINED):
                findings.tracebacks.append(f"{place.name}: {text}")


def _say(begun: float, faults: Faults, callers: Callers, findings: Findings) -> None:
    tally = callers.tally
    print(
        f"chaos: {(time.monotonic() - begun) / 60:5.1f} min, {sum(faults.count.values())} faults,"
        f" {tally.finished} finished, {tally.cancelled} cancelled, {len(tally.wrong)} wrong,"
        f" {len(findings.leaks)} leaks, {sum(tally.allowed.values())} allowed errors,"
        f" {len(tally.unexplained)} unexplained",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
