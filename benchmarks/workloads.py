"""The workloads, each a description: lanes of requests that run side by side.

A lane is a closed loop (`concurrency` streams that take the next request when their last one ends)
or an open one (a request every `every_s` seconds). Lengths and counts are fixed; the caller gives
text and seed. Each repetition has other prompts, so no prefix cache of an earlier one helps.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from enum import Enum

from benchmarks.corpus import Corpus, Plain, PromptShape, Repeated, SharedPrefix
from benchmarks.plan import PlannedLane


class Speculation(Enum):
    """Which systems a workload is for."""

    ANY = "any"
    OFF = "off"  # those that do not speculate


@dataclass(frozen=True, slots=True)
class Needs:
    """What a system must be started with."""

    max_model_len: int = 4096
    max_streams: int = 16


@dataclass(frozen=True, slots=True)
class Lane:
    """Requests of one kind."""

    prompts: PromptShape
    max_tokens: int
    num_requests: int
    concurrency: int = 1  # 0: open loop
    every_s: float = 0.0  # open loop: between arrivals
    start_s: float = 0.0
    until_s: float | None = None  # no request of the lane starts later
    role: str = "all"

    def plan(self, corpus: Corpus, rng: random.Random) -> PlannedLane:
        """The lane with its prompts."""
        return PlannedLane(
            role=self.role,
            max_tokens=self.max_tokens,
            concurrency=self.concurrency,
            start_s=self.start_s,
            every_s=self.every_s,
            until_s=self.until_s,
            prompts=tuple(self.prompts.make(corpus, rng, self.num_requests)),
        )


@dataclass(frozen=True, slots=True)
class Headline:
    """The one number that a workload is about."""

    metric: str  # a key of metrics.summarize
    role: str = "all"
    lower_is_better: bool = True


@dataclass(frozen=True, slots=True)
class Workload:
    """A name, what it is, and its lanes."""

    name: str
    title: str
    lanes: tuple[Lane, ...]
    headline: Headline
    speculation: Speculation = Speculation.ANY
    needs: Needs = Needs()
    limit_s: float = 600.0  # what has not ended by then counts as an error

    def plan(self, corpus: Corpus, seed: int, repetition: int) -> tuple[PlannedLane, ...]:
        """The lanes with prompts that (seed, workload, repetition) alone decide."""
        rng = random.Random(f"{seed}/{self.name}/{repetition}")
        return tuple(lane.plan(corpus, rng) for lane in self.lanes)


def quick(workload: Workload) -> Workload:
    """A few short requests in place of each lane's: enough to see that a system answers."""
    lanes = tuple(
        dataclasses.replace(
            lane,
            num_requests=min(lane.num_requests, max(2, lane.concurrency)),
            max_tokens=min(lane.max_tokens, 12),
            until_s=lane.until_s and min(lane.until_s, 10.0),
        )
        for lane in workload.lanes
    )
    return dataclasses.replace(workload, lanes=lanes)


ITL_P50 = Headline("itl_ms_p50")
RATE = Headline("output_tokens_per_s", lower_is_better=False)
_LONG = Needs(max_model_len=8192, max_streams=1)
_WIDE = Needs(max_model_len=1024, max_streams=64)


def _steady(until_s: float) -> Lane:
    """Four streams that are kept up until `until_s`."""
    return Lane(Plain((64,)), 256, 64, concurrency=4, until_s=until_s, role="steady")


def _context(num_tokens: int) -> Workload:
    name = f"context-{num_tokens}"
    prompt = min(num_tokens, _LONG.max_model_len - 64)
    lanes = (Lane(Plain((prompt,)), 64, 2),)
    return Workload(name, f"1 stream, {prompt} in, 64 out", lanes, ITL_P50, needs=_LONG)


def _batch(streams: int) -> Workload:
    lanes = (Lane(Plain((128,)), 64, 2 * streams, concurrency=streams),)
    title = f"{streams} streams, {2 * streams} requests, 128 in, 64 out"
    return Workload(f"batch-{streams}", title, lanes, RATE, needs=_WIDE)


def soak(duration_s: float) -> Workload:
    """Four streams of mixed prompts for so long; enough requests for a fast system."""
    num_requests = 16 + int(10 * duration_s)
    prompts = Plain((64, 512, 128, 256))
    lanes = (Lane(prompts, 64, num_requests, concurrency=4, until_s=duration_s),)
    title = f"4 streams, 64 to 512 in, 64 out, for {duration_s:.0f} s"
    return Workload("soak", title, lanes, ITL_P50, limit_s=duration_s + 300.0)


_ALL = (
    Workload(
        "W1",
        "1 stream, 4 requests, 128 in, 128 out",
        (Lane(Plain((128,)), 128, 4),),
        ITL_P50,
        Speculation.OFF,
    ),
    Workload(
        "W2",
        "8 streams, 32 requests, 256 in, 128 out",
        (Lane(Plain((256,)), 128, 32, concurrency=8),),
        RATE,
    ),
    Workload(
        "W3",
        "4 steady streams (64 in, 256 out), 10 long prompts (2,048 in, 16 out), one every 1.5 s",
        (
            _steady(until_s=17.0),
            Lane(Plain((2048,)), 16, 10, concurrency=0, every_s=1.5, start_s=2.0, role="long"),
        ),
        Headline("itl_ms_p99", role="steady"),
    ),
    Workload(
        "W3-undisturbed",
        "the 4 steady streams of W3 alone",
        (_steady(until_s=17.0),),
        Headline("itl_ms_p99", role="steady"),
    ),
    Workload(
        "W4",
        "16 requests over a shared prefix of 1,500 tokens (36 of their own), 4 at a time, 32 out",
        (Lane(SharedPrefix(1500, 36), 32, 16, concurrency=4),),
        Headline("ttft_ms_p50"),
    ),
    Workload(
        "W5",
        "1 stream, 2 requests, a text of 300 tokens twice and 32 tokens of it again, 256 out",
        (Lane(Repeated(300, 32), 256, 2),),
        RATE,
    ),
    *(_context(n) for n in (128, 1024, 4096, 8192)),
    *(_batch(n) for n in (1, 2, 4, 8, 16, 32, 64)),
    Workload(
        "short",
        "256 requests, 32 in, 16 out, 32 at a time",
        (Lane(Plain((32,)), 16, 256, concurrency=32),),
        RATE,
        needs=_WIDE,
    ),
    soak(600.0),
)
WORKLOADS = {workload.name: workload for workload in _ALL}
MAIN = ("W1", "W2", "W3", "W3-undisturbed", "W4", "W5")
GROUPS = {
    "main": MAIN,
    "context": tuple(name for name in WORKLOADS if name.startswith("context-")),
    "batch": tuple(name for name in WORKLOADS if name.startswith("batch-")),
    "all": tuple(WORKLOADS),
}


def pick(names: str, soak_s: float) -> tuple[Workload, ...]:
    """Workloads from `W1,W2,batch`, each once. Raises ValueError naming an unknown one."""
    picked: dict[str, Workload] = {}
    for name in names.split(","):
        for member in GROUPS.get(name, (name,)):
            if member not in WORKLOADS:
                known = ", ".join((*GROUPS, *WORKLOADS))
                raise ValueError(f"unknown workload {member!r}; known: {known}")
            picked[member] = soak(soak_s) if member == "soak" else WORKLOADS[member]
    return tuple(picked.values())
