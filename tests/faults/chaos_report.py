"""The report at the end of a chaos run, as JSON and as a page."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.chaos_load import ALLOWED, Tally


@dataclass
class Findings:
    """What the looks at the processes found; each list must be empty."""

    leaks: list[str] = field(default_factory=list)  # at quiet points and at the end
    ended: list[str] = field(default_factory=list)  # processes that ended unasked
    tracebacks: list[str] = field(default_factory=list)
    quiet_points: int = 0


@dataclass
class Report:
    """All of it."""

    seed: int
    minutes: float
    shape: str
    faults: Mapping[str, int]
    tally: Tally
    findings: Findings
    most_resident_bytes: Mapping[str, int]
    attempts_lost: int

    @property
    def failures(self) -> dict[str, list[str]]:
        """What must not be: all of it empty in a good run."""
        found = {
            "wrong answers": self.tally.wrong,
            "leaked blocks and holds": self.findings.leaks,
            "unexplained errors": self.tally.unexplained,
            "processes that ended by themselves": self.findings.ended,
            "tracebacks": self.findings.tracebacks,
        }
        return {what: where for what, where in found.items() if where}

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        tally, waits = self.tally, sorted(self.tally.waits_s) or [0.0]
        return {
            "seed": self.seed,
            "minutes": round(self.minutes, 1),
            "cluster": self.shape,
            "requests": {
                "asked": tally.asked,
                "finished": tally.finished,
                "cancelled": tally.cancelled,
                "tokens_compared": tally.tokens,
            },
            "attempts_lost_and_carried_on": self.attempts_lost,
            "faults": dict(sorted(self.faults.items())),
            "faults_total": sum(self.faults.values()),
            "allowed_errors": {kind: tally.allowed[kind] for kind in ALLOWED},
            "longest_wait_for_a_token_s": {
                "median": round(statistics.median(waits), 2),
                "p99": round(waits[int(0.99 * (len(waits) - 1))], 2),
                "max": round(waits[-1], 2),
            },
            "quiet_points": self.findings.quiet_points,
            "most_resident_mib": {k: v >> 20 for k, v in self.most_resident_bytes.items()},
            "wrong_answers": len(tally.wrong),
            "leaks": len(self.findings.leaks),
            "unexplained_errors": len(tally.unexplained),
            "ended_by_themselves": len(self.findings.ended),
            "tracebacks": len(self.findings.tracebacks),
            "failures": self.failures,
        }

    def write(self, folder: Path) -> None:
        """chaos.json and chaos.md."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "chaos.json").write_text(json.dumps(self.as_dict(), indent=2) + "\n")
        (folder / "chaos.md").write_text(self.page())

    def page(self) -> str:
        """For people."""
        d = self.as_dict()
        requests, waits = d["requests"], d["longest_wait_for_a_token_s"]
        assert isinstance(requests, dict)
        assert isinstance(waits, dict)
        rows = [
            ("requests finished, cancelled", f"{requests['finished']}, {requests['cancelled']}"),
            ("tokens compared with the undisturbed run", requests["tokens_compared"]),
            ("attempts lost and carried on elsewhere", self.attempts_lost),
            ("faults", d["faults_total"]),
            ("wrong answers", d["wrong_answers"]),
            ("leaked blocks and holds, at rest", d["leaks"]),
            ("times everything was looked at, at rest", d["quiet_points"]),
            ("unexplained errors", d["unexplained_errors"]),
            *((f"allowed: {ALLOWED[k]}", n) for k, n in self.tally.allowed.items()),
            ("processes that ended by themselves", d["ended_by_themselves"]),
            ("tracebacks in logs", d["tracebacks"]),
            (
                "longest wait of a request for a token: median, p99, most",
                f"{waits['median']}, {waits['p99']}, {waits['max']} s",
            ),
        ]
        lines = [
            f"Seed {self.seed}, {self.minutes:.0f} minutes, {self.shape}.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            "| fault | times |",
            "|---|---|",
            *(f"| {kind} | {count} |" for kind, count in sorted(self.faults.items())),
        ]
        for what, where in self.failures.items():
            lines += ["", f"**{what}**", "", *(f"- {line[:2000]}" for line in where[:20])]
        return "\n".join(lines) + "\n"
