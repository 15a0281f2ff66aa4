"""What must hold after a scenario, whatever was broken in it.

- at rest: in every pool free + cached + held = total with held back to 0; /debug/holds is empty
- steady: a process that lived through it has no more threads, descriptors or memory than before
- quiet logs: no traceback that the scenario does not explain, no process that ended unasked
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from tests.support.cluster import BLOCK_BYTES, NUM_BLOCKS, Cluster
from tests.support.http_get import http_get
from tests.support.stack import metrics_of
from tests.support.vitals import Vitals, vitals

REST_S = 10.0
# Pools become resident as they are used, and allocators keep what they had.
_MORE_BYTES = NUM_BLOCKS * BLOCK_BYTES + (160 << 20)


@dataclass(frozen=True, slots=True)
class Before:
    """One place at the beginning of a scenario."""

    pid: int
    vitals: Vitals | None
    log_bytes: int
    num_ends: int


def before(cluster: Cluster) -> dict[str, Before]:
    """All places as they are now."""
    return {
        place.name: Before(
            place.pid if place.alive else 0,
            vitals(place.pid) if place.alive else None,
            place.log.stat().st_size if place.log.exists() else 0,
            len(place.ends),
        )
        for place in cluster.places
    }


def samples(http_address: str) -> dict[str, float]:
    """`metrics_of` without our prefix."""
    return {k.removeprefix("diptych_"): value for k, value in metrics_of(http_address).items()}


def holds(http_address: str, token: Iterable[tuple[str, str]] = ()) -> dict[str, Any]:
    """What /debug/holds shows; with the cluster's token, request ids too."""
    response = http_get(f"http://{http_address}/debug/holds", headers=dict(token))
    response.raise_for_status()
    report: dict[str, Any] = response.json()
    return report


def num_held(http_address: str) -> int:
    """The number of blocks that are held now."""
    return int(samples(http_address).get("kv_blocks{state=held}", 0))


def unrest(cluster: Cluster) -> list[str]:
    """What is not at rest, one line each."""
    found = []
    for name in (*cluster.coordinators, *cluster.workers):
        if cluster[name].held:
            continue
        try:
            seen = samples(cluster.http(name))
            report = holds(cluster.http(name))
        except httpx.HTTPError as error:
            found.append(f"{name}: {error!r}")
            continue
        for gauge in ("num_requests_running", "num_requests_waiting", "kv_quarantined_blocks"):
            if seen.get(gauge):
                found.append(f"{name}: {gauge} {seen[gauge]:g}")
        found += [f"{name}: holds {hold}" for hold in report["holds"]]
        if name in cluster.workers:
            found += [f"{name}: {wrong}" for wrong in _pool_wrong(report["pool"])]
    return found


def _pool_wrong(pool: Mapping[str, Any]) -> list[str]:
    """free + cached + held = total, held = 0, and every held block has an owner."""
    if not pool["answers"]:
        return ["its engine does not answer"]
    found = []
    if pool["free"] + pool["cached"] + pool["held"] != NUM_BLOCKS or pool["total"] != NUM_BLOCKS:
        found.append(f"{pool}: expected {NUM_BLOCKS} in all")
    if pool["held"] or pool["unexplained"]:
        found.append(f"{pool['held']} blocks held, {pool['unexplained']} of them unexplained")
    return found


def at_rest(cluster: Cluster, timeout_s: float = REST_S) -> None:
    """Everything is given back within the bound, and the coordinators' tables say so too."""
    deadline = time.monotonic() + timeout_s
    while left := unrest(cluster) + _rows_not_at_rest(cluster):
        assert time.monotonic() < deadline, f"not at rest within {timeout_s:g} s: {left}"
        time.sleep(0.1)


def _rows_not_at_rest(cluster: Cluster) -> list[str]:
    found = []
    for coordinator in cluster.coordinators:
        if cluster[coordinator].held:
            continue
        for name, row in cluster.rows(coordinator).items():
            if name not in cluster.workers or cluster[name].held:
                continue
            total = row.free_blocks + row.cached_blocks + row.held_blocks
            if row.held_blocks or total != row.total_blocks or row.num_running or row.num_waiting:
                found.append(f"{coordinator} sees {name}: {row.held_blocks} of {total} held")
    return found


def steady(cluster: Cluster, then: Mapping[str, Before]) -> None:
    """Processes that are the same as before have grown by no more than what comes and goes."""
    for place in cluster.places:
        was = then.get(place.name)
        if was is None or was.vitals is None or not place.alive or place.pid != was.pid:
            continue
        deadline = time.monotonic() + 10
        while (now := vitals(place.pid)).grew(was.vitals, _MORE_BYTES):
            assert time.monotonic() < deadline, f"{place.name} grew: {was.vitals} -> {now}"
            time.sleep(0.2)


def quiet(cluster: Cluster, then: Mapping[str, Before], explained: Sequence[str] = ()) -> None:
    """No traceback in the logs since, but for those that match one of `explained`."""
    for place in cluster.places:
        was = then.get(place.name)
        ends = place.ends[was.num_ends if was else 0 :]
        unwanted = [end.status for end in ends if not end.wanted]
        assert not unwanted, f"{place.name} ended unasked: {unwanted}\n{cluster.tail(place.name)}"
        for text in tracebacks(cluster.log_text(place.name, was.log_bytes if was else 0)):
            assert any(re.search(pattern, text) for pattern in explained), (
                f"{place.name} logged a traceback:\n{text}"
            )


def tracebacks(text: str) -> list[str]:
    """Those in a log: whole JSON lines, or plain lines from shortly before on."""
    lines = text.splitlines()
    return [
        line if line.startswith("{") else "\n".join(lines[max(0, i - 2) : i + 40])
        for i, line in enumerate(lines)
        if "Traceback (most recent call last)" in line
    ]
