"""The JSON files between the runner and a load generator: plan and result.

No dependencies: the load generator of a peer runs in that peer's environment.

    runner --Plan--> load generator --Result--> runner
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class PlannedLane:
    """Requests of one kind with their prompts; see workloads.Lane."""

    role: str
    max_tokens: int
    concurrency: int
    start_s: float
    every_s: float
    until_s: float | None
    prompts: tuple[tuple[int, ...], ...]  # token ids

    def arrival_s(self, i: int) -> float:
        """When request `i` of an open loop is due."""
        return self.start_s + i * self.every_s


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go and how they are written."""

    api: str  # "diptych", "openai", or "" for a loader that has the model in its own process
    address: str = ""  # HOST:PORT
    model: str = ""
    extra: dict[str, Any] = field(default_factory=dict)  # put into every request or the loader


@dataclass(frozen=True, slots=True)
class Plan:
    """One run of one workload against one system."""

    endpoint: Endpoint
    lanes: tuple[PlannedLane, ...]
    limit_s: float

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Plan:
        """What `write` wrote."""
        data = json.loads(path.read_text())
        lanes = (
            PlannedLane(**{**lane, "prompts": tuple(map(tuple, lane["prompts"]))})
            for lane in data["lanes"]
        )
        return cls(Endpoint(**data["endpoint"]), tuple(lanes), data["limit_s"])


@dataclass(slots=True)
class Record:
    """One request as its client saw it; times are seconds since the run's start."""

    role: str
    prompt_tokens: int
    planned_s: float  # when it was due; latency counts from here
    sent_s: float = 0.0
    end_s: float = 0.0
    times_s: list[float] = field(default_factory=list)  # arrival of each message with tokens
    counts: list[int] = field(default_factory=list)  # tokens in it
    completion_tokens: int = 0  # as the server counts
    cached_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    text: str = ""
    finish_reason: str = ""
    error: str = ""

    def arrive(self, at_s: float, count: int) -> None:
        """A message came with `count` tokens."""
        if count > 0:
            self.times_s.append(at_s)
            self.counts.append(count)


@dataclass(slots=True)
class Result:
    """All requests of a run."""

    started_s: float  # the monotonic clock, which all processes of a machine share
    wall_s: float
    cpu_s: float  # of the load generator itself
    records: list[Record]

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Result:
        """What `write` wrote."""
        data = json.loads(path.read_text())
        records = [Record(**record) for record in data.pop("records")]
        return cls(**data, records=records)
