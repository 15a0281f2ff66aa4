"""Tables from `results.json`: `python -m benchmarks.report DIR [--readme]`.

A figure is the median over repetitions. `--readme` writes the table between the two markers in
`benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.limits import ModelCost, floor_ms
from benchmarks.metrics import median
from benchmarks.workloads import WORKLOADS, Workload

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
_GOODPUT = ((1000, 50), (2000, 100), (5000, 200))  # cells of the grid that the table shows
_COLUMNS = (
    "workload", "role", "system", "TTFT p50 / p99, ms", "between tokens p50 / p99, ms",
    "ms a token p50", "output tokens/s", "prompt tokens/s", "drafts accepted",
    *(f"within {ttft / 1000:g} s, {itl} ms" for ttft, itl in _GOODPUT),
    "peak RSS / PSS, GB", "errors", "against the best peer",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """All repetitions of one system on one workload, one role."""

    workload: str
    role: str
    system: str
    runs: tuple[Mapping[str, Any], ...]

    def middle(self, key: str) -> float | None:
        """Median of a number of the role."""
        return median(run["roles"][self.role].get(key) for run in self.runs)

    def of_run(self, key: str) -> float | None:
        """Median of a number of the whole run."""
        return median(run.get(key) for run in self.runs)

    def share(self, ttft_ms: float, itl_ms: float) -> float | None:
        """Requests within both targets."""
        return median(
            cell["share"]
            for run in self.runs
            for cell in run["roles"][self.role]["goodput"]
            if (cell["ttft_ms"], cell["itl_ms"]) == (ttft_ms, itl_ms)
        )

    @property
    def is_ours(self) -> bool:
        """Whether the system is Diptych."""
        return self.system.startswith("ours")


def rows(data: Mapping[str, Any]) -> list[Row]:
    """In the order of workloads, then as systems first appear."""
    good = [run for run in data["runs"] if "roles" in run]
    systems = dict.fromkeys(run["system"] for run in good)
    found = []
    for workload in WORKLOADS:
        for role in dict.fromkeys(r for x in good if x["workload"] == workload for r in x["roles"]):
            for system in systems:
                runs = tuple(
                    run
                    for run in good
                    if (run["workload"], run["system"]) == (workload, system)
                    and role in run["roles"]
                )
                if runs:
                    found.append(Row(workload, role, system, runs))
    return found


def against_peers(row: Row, table: Iterable[Row]) -> float | None:
    """How many times better than the best peer in the workload's own number; above 1 is better."""
    workload: Workload = WORKLOADS[row.workload]
    headline = workload.headline
    if not row.is_ours or row.role != headline.role:
        return None
    others = [r for r in table if r.workload == row.workload and r.role == row.role]
    peers = [v for r in others if not r.is_ours and (v := r.middle(headline.metric))]
    mine = row.middle(headline.metric)
    if not peers or not mine:
        return None
    return min(peers) / mine if headline.lower_is_better else mine / max(peers)


def _show(value: float | None, digits: int = 0, unit: float = 1.0, after: str = "") -> str:
    return "-" if value is None else f"{value / unit:,.{digits}f}{after}"


def _pair(first: str, second: str) -> str:
    return "-" if first == second == "-" else f"{first} / {second}"


def table(data: Mapping[str, Any]) -> str:
    """One Markdown table of everything."""
    found = rows(data)
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    for row in found:
        get: Callable[[str], float | None] = row.middle
        share = get("acceptance")
        cells = [
            row.workload,
            "" if row.role == "all" else row.role,
            row.system,
            _pair(_show(get("ttft_ms_p50")), _show(get("ttft_ms_p99"))),
            _pair(_show(get("itl_ms_p50"), 1), _show(get("itl_ms_p99"), 1)),
            _show(get("token_ms_p50"), 1),
            _show(get("output_tokens_per_s")),
            _show(get("prompt_tokens_per_s")),
            _show(share, 0, 0.01, "%") if share is not None else "",
            *(_show(row.share(*target), 0, 0.01, "%") for target in _GOODPUT),
            _pair(
                _show(row.of_run("peak_rss_bytes"), 2, 1e9), _show(row.of_run("pss_bytes"), 2, 1e9)
            ),
            _show(get("num_errors")),
            _show(against_peers(row, found), 2, after="x").replace("-", ""),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def workload_list(data: Mapping[str, Any]) -> str:
    """Describes the table's workloads, and names the systems with failed requests."""
    ran = {run["workload"] for run in data["runs"]}
    lines = [f"- {w.name}: {w.title}" for w in WORKLOADS.values() if w.name in ran]
    failed = {(r["workload"], r["system"], r["error"]) for r in data["runs"] if "error" in r}
    lines += [f"- {name} on {system}: {error}" for name, system, error in sorted(failed)]
    return "\n".join(lines)


def head(data: Mapping[str, Any]) -> str:
    """The machine, its limits, and the floor of a decode step."""
    machine, model = data["head"]["machine"], data["head"]["model"]
    count = max((run["repetition"] for run in data["runs"]), default=0)
    text = f"{machine['num_cores']} cores, {machine['processor']}, {machine['memory']}; "
    text += f"commit {machine['commit']}; median of {count} repetitions."
    if data["head"]["prompts"].get("quick"):
        text += " A quick run of a few short requests: these figures mean nothing."
    if limits := machine.get("limits"):
        cost = ModelCost(**{k: v for k, v in model.items() if k != "name"})
        reads = "; ".join(
            f"{size} " + ", ".join(f"{rate:g} ({n} threads)" for n, rate in by_threads.items())
            for size, by_threads in limits["read_gb_s"].items()
        )
        gemm = ", ".join(f"{rate:g} at M={m}" for m, rate in limits["gemm_gflops"].items())
        text += f"\n\nReading memory, GB/s: {reads}. bf16 products, GFLOP/s: {gemm}. "
        floors = (f"{floor_ms(cost, limits, b, 256):.1f} ms at batch {b}" for b in (1, 8, 64))
        text += f"At these rates a decode step at 256 tokens of context needs {', '.join(floors)}; "
        text += "integer products, which packed weights take, may be faster."
    return text


def markdown(data: Mapping[str, Any], images: Iterable[Path], base: Path) -> str:
    """The whole report; images are linked relative to `base`."""
    links = "\n".join(f"![{p.stem}]({os.path.relpath(p, base)})" for p in images)
    return "\n\n".join((head(data), table(data), workload_list(data), links)).strip() + "\n"


def write(out: Path, readme: bool = False) -> None:
    """Table and plots of a folder; into the README as well if wanted."""
    data = json.loads((out / "results.json").read_text())
    images = plots.draw(data, out)
    (out / "table.md").write_text(markdown(data, images, out))
    if readme:
        folder = README.parent / "figures"
        folder.mkdir(exist_ok=True)
        copies = [folder / image.name for image in images]
        for image, copy in zip(images, copies, strict=True):
            copy.write_bytes(image.read_bytes())
        before, _, rest = README.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        text = f"{before}{BEGIN}\n{markdown(data, copies, README.parent)}{END}{after}"
        README.write_text(text)


def main() -> None:
    """Flags, then `write`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the --out of benchmarks.run")
    parser.add_argument("--readme", action="store_true", help="also into benchmarks/README.md")
    args = parser.parse_args()
    write(args.folder, args.readme)


if __name__ == "__main__":
    main()
