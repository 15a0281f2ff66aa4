"""Measure systems on workloads: `python -m benchmarks.run --systems ours,vllm --workloads W1,W2`.

Systems alternate: each repetition runs all of them, one up at a time, on prompts of its own that
are the same for every system. `results.json` in the output folder is written after every run; a run
that is in it is skipped. `benchmarks.report` makes tables and plots of it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import metrics, processes, report
from benchmarks.corpus import DEFAULT_TEXT, Corpus, Plain
from benchmarks.machine import describe_machine, describe_model
from benchmarks.systems import registry
from benchmarks.systems.base import NotReady, Played, Running, System, running
from benchmarks.workloads import GROUPS, WORKLOADS, Lane, Needs, Workload
from benchmarks.workloads import pick as pick_workloads
from benchmarks.workloads import quick as quicken
from coordinator.text.tokenizer import Tokenizer
from engine.base.options import child_environment
from engine.checkpoint.packaged import DEFAULT_MODEL
from engine.checkpoint.source import resolve

_WARM_UP = Lane(Plain((64, 384)), 16, 4, concurrency=2)
_WARM_UP_S = 300.0
_SAMPLE_S = 5.0


class Bench:
    """One output folder, and what has been measured into it."""

    def __init__(self, out: Path, corpus: Corpus, seed: int, head: dict[str, Any]) -> None:
        self._out = out
        self._corpus = corpus
        self._seed = seed
        self._path = out / "results.json"
        self._data: dict[str, Any] = {"runs": []}
        if self._path.exists():
            self._data = json.loads(self._path.read_text())
            if self._data["head"]["prompts"] != head["prompts"]:
                raise ValueError(f"{out} has results of other prompts: {self._data['head']}")
        self._data["head"] = head

    def repetition(
        self, number: int, systems: Iterable[System], workloads: tuple[Workload, ...]
    ) -> None:
        """Every system once, on all workloads that it takes."""
        for needs in dict.fromkeys(w.needs for w in workloads):
            for system in systems:
                wanted = [w for w in workloads if w.needs == needs and system.takes(w)]
                todo = [w for w in wanted if not self._has(system, w, number)]
                if todo:
                    self._run(system, needs, todo, number)

    def _run(self, system: System, needs: Needs, todo: list[Workload], number: int) -> None:
        say(f"repetition {number}: starting {system.name}")
        folder = self._out / "logs" / f"{system.name}-{needs.max_model_len}-{number}"
        try:
            with running(system, needs, folder) as up:
                say(f"  ready after {up.start_s:.1f} s")
                self._warm_up(up, number)
                for workload in todo:
                    self._measure(system, workload, number, up)
        except (NotReady, OSError, subprocess.SubprocessError) as error:
            say(f"  {type(error).__name__}: {error}; see {folder}")
            detail = str(getattr(error, "output", "") or "")[-500:]
            left = [w for w in todo if not self._has(system, w, number)]
            failed = left if isinstance(error, NotReady) else left[:1]
            for workload in failed:
                self._add(system, workload, number, {"error": f"{error} {detail}".strip()})
            if len(failed) < len(left):  # a fresh process for what comes after
                self._run(system, needs, left[len(failed) :], number)

    def _warm_up(self, up: Running, number: int) -> None:
        rng = random.Random(f"{self._seed}/warm-up/{number}")
        up.play((_WARM_UP.plan(self._corpus, rng),), _WARM_UP_S, _SAMPLE_S)

    def _measure(self, system: System, workload: Workload, number: int, up: Running) -> None:
        lanes = workload.plan(self._corpus, self._seed, number)
        played = up.play(lanes, workload.limit_s, _SAMPLE_S)
        raw = self._out / "raw" / f"{workload.name}-{system.name}-{number}.json"
        raw.parent.mkdir(exist_ok=True)
        played.result.write(raw)
        roles = metrics.by_role(played.result)
        if drafts := _drafts(played.counters):
            roles["all"] |= drafts
        run = {"start_s": up.start_s, "roles": roles, **_processes(played)}
        if workload.name == "soak":
            run["drift"] = metrics.drift(played.result.records)
            run["samples"] = played.samples
        self._add(system, workload, number, run)
        value = roles.get(workload.headline.role, {}).get(workload.headline.metric)
        errors = sum(role["num_errors"] for role in roles.values())
        text = "-" if value is None else f"{value:.2f}"
        say(f"  {workload.name}: {workload.headline.metric} {text}, {errors} errors")

    def _has(self, system: System, workload: Workload, number: int) -> bool:
        wanted = (system.name, workload.name, number)
        return any((r["system"], r["workload"], r["repetition"]) == wanted for r in self.runs)

    def _add(self, system: System, workload: Workload, number: int, run: dict[str, Any]) -> None:
        names = {"system": system.name, "title": system.title, "workload": workload.name}
        self.runs.append({**names, "repetition": number, **run})
        self.write()

    @property
    def runs(self) -> list[dict[str, Any]]:
        """What has been measured."""
        runs: list[dict[str, Any]] = self._data["runs"]
        return runs

    def write(self) -> None:
        """`results.json`, by one rename."""
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self._data, indent=1))
        part.replace(self._path)


def _drafts(counters: dict[str, float]) -> dict[str, Any]:
    """Draft counts of a server that has them only in its metrics; else {}."""
    totals = {
        kind: sum(v for k, v in counters.items() if k.startswith(f"vllm:spec_decode_num_{kind}_"))
        for kind in ("draft_tokens", "accepted_tokens")
    }
    if not totals["draft_tokens"]:
        return {}
    return {**totals, "acceptance": totals["accepted_tokens"] / totals["draft_tokens"]}


def _processes(played: Played) -> dict[str, Any]:
    at_rest = played.at_rest
    return {
        "wall_s": played.result.wall_s,
        "loader_cpu_s": played.result.cpu_s,
        "server_cpu_s": played.server_cpu_s,
        "peak_rss_bytes": played.peak_rss_bytes,
        "rss_bytes": at_rest["rss_bytes"] or None,  # nothing stays up between the runs of some
        "pss_bytes": at_rest["pss_bytes"] or None,
        "counters": played.counters,
    }


def say(text: str) -> None:
    """One line of progress."""
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", flush=True)


def parse_args() -> argparse.Namespace:
    """Flags; lists are separated by commas."""
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__.partition("\n")[0])
    known = ", ".join((*GROUPS, *WORKLOADS))
    parser.add_argument("--workloads", default="main", help=f"of {known} [main]")
    parser.add_argument("--systems", default=",".join(registry.OURS), help="names, peers or all")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts [1]")
    parser.add_argument("--text", type=Path, default=DEFAULT_TEXT, help="what they are cut from")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="ours; peers run the default one")
    parser.add_argument("--our-flags", default="", metavar="FLAGS", help="for coordinator start")
    parser.add_argument("--soak-s", type=float, default=600.0, metavar="S")
    parser.add_argument("--quick", action="store_true", help="a few requests, to see that all runs")
    parser.add_argument("--skip-limits", action="store_true", help="do not measure the machine")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR")
    return parser.parse_args()


def main() -> int:
    """Measure, then write table and plots; 1 if nothing could be run."""
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended
    clean = child_environment()  # a user's DIPTYCH_... must not change what "as it comes" means
    os.environ.clear()
    os.environ.update(clean)
    processes.adopt_orphans()
    try:
        workloads = pick_workloads(args.workloads, args.soak_s)
        if args.quick:
            workloads = tuple(quicken(workload) for workload in workloads)
        known = registry.all_systems(args.model, tuple(shlex.split(args.our_flags)))
        systems = registry.pick(args.systems, known)
    except ValueError as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return 2
    for system in systems:
        if reason := system.missing():
            say(f"leaving out {system.name}: {reason}")
    systems = tuple(system for system in systems if not system.missing())
    checkpoint = resolve(args.model)
    corpus = Corpus(args.text.read_text(encoding="utf-8"), Tokenizer.load(checkpoint.folder))
    prompts = {"text": args.text.name, "seed": args.seed, "model": args.model}
    head = {
        "prompts": {**prompts, "quick": args.quick},
        "machine": describe_machine(limits=not args.skip_limits),
        "model": describe_model(checkpoint),
        "our_flags": args.our_flags,
    }
    out: Path = args.out or Path("benchmarks/results") / f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(out.resolve(), corpus, args.seed, head)
    bench.write()
    for number in range(1, args.repetitions + 1):
        bench.repetition(number, systems, workloads)
    if not bench.runs:
        return 1
    report.write(out)
    say(f"results, table and plots are in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
