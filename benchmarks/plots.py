"""Pictures of a result: latency distributions, throughput against batch, step time by phase.

A phase's time is what our workers' own histograms gained during a run; the roofline beside it is
what the step's bytes and FLOPs need at the machine's measured rates.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.limits import ModelCost, floor_ms
from benchmarks.metrics import gaps_s, ttft_s
from benchmarks.plan import Result

_STEP = re.compile(r"decode:diptych_engine_step_seconds_(sum|count)\{(.*)\}")
_PHASE = re.compile(r'phase="([^"]*)"')
_CONTEXT = 160  # tokens of the batch workloads, on average: 128 in and half of 64 out
_WHOLE = "total"  # the phase that is the sum of all
_TTFT_AXIS_MS = (10, 100_000)
_GAP_AXIS_MS = (0.1, 10_000)  # gaps within a message are 0 and shown at the left edge


def draw(data: Mapping[str, Any], out: Path) -> list[Path]:
    """All pictures that the results have data for, as PNG files in `out`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    images = []
    for name, plot in (
        ("latency", _latency),
        ("throughput", _throughput),
        ("steps", _steps),
    ):
        figure = plot(data, out, pyplot)
        if figure is not None:
            path = out / f"{name}.png"
            figure.savefig(path, dpi=110, bbox_inches="tight")
            pyplot.close(figure)
            images.append(path)
    return images


def _values(out: Path, run: Mapping[str, Any], role: str) -> tuple[list[float], list[float]]:
    """Times to first token and gaps of a run's raw records, in milliseconds."""
    name = f"{run['workload']}-{run['system']}-{run['repetition']}.json"
    records = [r for r in Result.read(out / "raw" / name).records if not r.error and r.counts]
    chosen = [r for r in records if r.role == role]
    gaps = [gap * 1000 for r in chosen for gap in gaps_s(r)]
    return [ttft_s(r) * 1000 for r in chosen], gaps


def _latency(data: Mapping[str, Any], out: Path, pyplot: Any) -> Any:
    """Cumulative distributions, one row of axes a workload and role."""
    cells: dict[tuple[str, str], dict[str, tuple[list[float], list[float]]]] = {}
    for run in data["runs"]:
        for role in run.get("roles", ()):
            if not run["workload"].startswith(("W", "short", "soak")):
                continue
            systems = cells.setdefault((run["workload"], role), {})
            first, gaps = systems.setdefault(run["system"], ([], []))
            more_first, more_gaps = _values(out, run, role)
            first += more_first
            gaps += more_gaps
    if not cells:
        return None
    figure, axes = pyplot.subplots(len(cells), 2, figsize=(11, 2.6 * len(cells)), squeeze=False)
    colors = _colors(data, pyplot)
    for row, ((workload, role), systems) in zip(axes, sorted(cells.items()), strict=True):
        for system, pair in systems.items():
            for axis, values in zip(row, pair, strict=True):
                shown = [max(v, _GAP_AXIS_MS[0]) for v in values]
                axis.ecdf(shown, label=system, color=colors[system], linewidth=1.2)
        title = workload if role == "all" else f"{workload}, {role}"
        row[0].set_title(f"{title}: time to first token, ms", fontsize=9)
        row[1].set_title(f"{title}: between tokens, ms", fontsize=9)
        for axis, limits in zip(row, (_TTFT_AXIS_MS, _GAP_AXIS_MS), strict=True):
            axis.set_xscale("log")
            axis.set_xlim(*limits)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("")
            axis.grid(alpha=0.3)
        row[1].legend(fontsize=6, loc="lower right")
    figure.tight_layout()
    return figure


def _throughput(data: Mapping[str, Any], out: Path, pyplot: Any) -> Any:
    """Output tokens a second against the number of streams."""
    rates: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in data["runs"]:
        if run["workload"].startswith("batch-") and "roles" in run:
            rate = run["roles"]["all"]["output_tokens_per_s"]
            if rate:
                rates[run["system"]][_streams(run)].append(rate)
    if not rates:
        return None
    figure, axis = pyplot.subplots(figsize=(7, 4))
    colors = _colors(data, pyplot)
    for system, points in rates.items():
        xs = sorted(points)
        means = [sum(points[x]) / len(points[x]) for x in xs]
        axis.plot(xs, means, marker="o", label=system, color=colors[system])
    axis.set_xscale("log", base=2)
    axis.set_xlabel("streams")
    axis.set_ylabel("output tokens/s")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return figure


def step_phases(counters: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds a decode step by phase, from what the histograms gained in a run."""
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    for name, value in counters.items():
        if match := _STEP.fullmatch(name):
            phase = _PHASE.search(match[2])
            totals = sums if match[1] == "sum" else counts
            totals[phase[1] if phase else _WHOLE] += value
    steps = max(counts.values(), default=0.0)
    return {phase: total / steps * 1000 for phase, total in sums.items()} if steps else {}


def _steps(data: Mapping[str, Any], out: Path, pyplot: Any) -> Any:
    """Bars of phases for each batch size without drafts, and the roofline."""
    limits = data["head"]["machine"].get("limits")
    bars: dict[int, dict[str, float]] = {}
    for run in data["runs"]:
        phases = step_phases(run.get("counters", {}))
        if phases and run["system"] == "ours-nospec" and run["workload"].startswith("batch-"):
            bars[_streams(run)] = phases
    if not bars:
        return None
    batches = sorted(bars)
    figure, axis = pyplot.subplots(figsize=(7, 4))
    positions = range(len(batches))
    bottom = [0.0] * len(batches)
    phases = dict.fromkeys(phase for batch in batches for phase in bars[batch])
    for phase in [p for p in phases if p != _WHOLE] or list(phases):
        heights = [bars[batch].get(phase, 0.0) for batch in batches]
        axis.bar(positions, heights, bottom=bottom, label=phase, width=0.6)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    if limits:
        model = {k: v for k, v in data["head"]["model"].items() if k != "name"}
        floors = [floor_ms(ModelCost(**model), limits, b, _CONTEXT) for b in batches]
        left, right = [p - 0.4 for p in positions], [p + 0.4 for p in positions]
        axis.hlines(floors, left, right, colors="black", label="roofline")
    axis.set_xticks(list(positions), [str(b) for b in batches])
    axis.set_xlabel("streams")
    axis.set_ylabel("ms a decode step")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3, axis="y")
    return figure


def _streams(run: Mapping[str, Any]) -> int:
    return int(run["workload"].removeprefix("batch-"))


def _colors(data: Mapping[str, Any], pyplot: Any) -> dict[str, Any]:
    """One color a system in all pictures."""
    systems = dict.fromkeys(run["system"] for run in data["runs"])
    return {name: pyplot.get_cmap("tab20")(i % 20) for i, name in enumerate(systems)}
