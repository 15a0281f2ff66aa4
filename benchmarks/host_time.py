"""Host time of a step: what the engine's thread does around the forward pass.

    python -m benchmarks.host_time [--rows 256] [--tokens 8000] [--steps 200] [--drafter ngram]

An engine without a model writes answers: its runner lays the step out as a real one does, and
computes nothing. Each step is run in one of two ways, in turn:

    edited    block tables are arrays, edited when a block is added
    rebuilt   block tables are lists, made into arrays in each step, as before

The seconds are CPU time of the thread, so that other processes on the machine weigh less; wall time
is printed beside it. The sampler's kernel reads logits of 64 tokens, so its arithmetic, which a GPU
does on the device, costs nothing here; the Python around it is counted.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch
from prometheus_client import CollectorRegistry

from decode.speculative.acceptance import Acceptance
from decode.speculative.draft_length import MeasuredDraftLength
from decode.speculative.ngram import NgramDrafter
from decode.speculative.step_cost import StepCost
from decode.speculative.verify import verify
from engine.attention.batch import BatchBuilder, Row, TableStaging
from engine.base.kv_layout import hash_salt
from engine.base.types import SamplingParams, StopParams
from engine.runner.base import ModelRunner, StepOutput
from engine.sampling import Sampler
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.plan import Budgets
from engine.scheduling.request import EngineRequest
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.speculation import Speculation
from engine.step.core import EngineCore
from engine.telemetry.metrics import WorkerMetrics

BLOCK, VOCAB = 16, 64


class IdleRunner(ModelRunner):
    """Lays each step out, and computes nothing: its logits are random, and always the same."""

    def __init__(self) -> None:
        self.rebuild = False
        self._batches = BatchBuilder(BLOCK, torch.device("cpu"))
        self._tables = TableStaging()
        self._logits = torch.randn(64, VOCAB)

    def launch(self, rows: Sequence[Row]) -> StepOutput:
        """Fixed logits, one row for each that is wanted."""
        if self.rebuild:
            self._rebuild(rows)
        else:
            self._tables.lay_out(rows)
        batch = self._batches.build(rows)
        if batch.num_logits > len(self._logits):
            self._logits = torch.randn(2 * batch.num_logits, VOCAB)
        return StepOutput(self._logits[: batch.num_logits])

    @staticmethod
    def _rebuild(rows: Sequence[Row]) -> None:
        """The tables as they were made before: from lists, in each step."""
        lists = _lists(rows)
        begun = time.thread_time(), time.perf_counter()
        tables = np.zeros((len(rows), max(map(len, lists))), np.int32)
        for table, block_ids in zip(tables, lists, strict=True):
            table[: len(block_ids)] = block_ids
        REBUILT.append((time.thread_time() - begun[0], time.perf_counter() - begun[1]))


REBUILT: list[tuple[float, float]] = []  # CPU and wall seconds of each rebuild


def _lists(rows: Sequence[Row]) -> list[list[int]]:
    return [np.asarray(row.block_ids).tolist() for row in rows]


def make_core(num_rows: int, num_tokens: int, drafter: str) -> EngineCore:
    """An engine with `num_rows` answers that have `num_tokens` tokens each."""
    length = 2 * num_tokens
    pool = BlockPool(num_rows * -(-length // BLOCK))
    speculation = None
    if drafter == "ngram":
        ngram = NgramDrafter()
        draft_length = MeasuredDraftLength(Acceptance(ngram.acceptance), StepCost())
        speculation = Speculation(ngram, verify, 16, draft_length)
    scheduler = Scheduler(pool, BLOCK, Budgets(1 << 16, num_rows), speculation, length)
    metrics = WorkerMetrics(CollectorRegistry(), "idle")
    core = EngineCore(scheduler, IdleRunner(), Sampler(VOCAB), metrics, time.monotonic)
    rng, salt = random.Random(0), hash_salt(digest="idle")
    for key in range(1, num_rows + 1):
        prompt = tuple(rng.randrange(VOCAB) for _ in range(num_tokens))
        sampling, stop = SamplingParams(), StopParams(max_tokens=length)
        core.add(key, EngineRequest(f"r{key}", prompt, salt, sampling, stop))
    while not all(request.decoding for request in scheduler.active) or scheduler.waiting:
        core.step()
        core.take_events()
    return core


def measure(core: EngineCore, num_steps: int) -> dict[str, list[tuple[float, float]]]:
    """CPU and wall seconds of each step, by the way that its tables are made."""
    runner = core._runner
    assert isinstance(runner, IdleRunner)
    times: dict[str, list[tuple[float, float]]] = {"edited": [], "rebuilt": []}
    gc.collect()
    gc.freeze()  # as a worker does
    for number in range(2 * num_steps + 8):
        runner.rebuild = number % 2 == 1
        REBUILT.clear()
        cpu_s, wall_s = time.thread_time(), time.perf_counter()
        core.step()
        core.take_events()
        core.load()
        took = time.thread_time() - cpu_s, time.perf_counter() - wall_s
        if number < 8:
            continue
        if REBUILT:  # what the step would have taken with these lists at hand
            times["rebuilt"].append(
                (times["edited"][-1][0] + REBUILT[0][0], times["edited"][-1][1] + REBUILT[0][1])
            )
        else:
            times["edited"].append(took)
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--drafter", choices=("none", "ngram"), default="none")
    parser.add_argument("--profile", action="store_true", help="where the time goes, by function")
    args = parser.parse_args()
    core = make_core(args.rows, args.tokens, args.drafter)
    if args.profile:
        _profile(core, args.steps)
        return
    times = measure(core, args.steps)
    print(f"{args.rows} rows of {args.tokens} tokens, drafter {args.drafter}, {args.steps} steps")
    for way, pairs in times.items():
        for name, seconds in (("CPU", [p[0] for p in pairs]), ("wall", [p[1] for p in pairs])):
            low, mid, high = (1e3 * x for x in statistics.quantiles(seconds, n=4))
            print(f"{way:8} {name:4} {mid:7.3f} ms a step (quartiles {low:.3f} to {high:.3f})")
    ratio = statistics.median(p[0] for p in times["rebuilt"]) / statistics.median(
        p[0] for p in times["edited"]
    )
    print(f"rebuilt / edited, CPU: {ratio:.1f}")


def _profile(core: EngineCore, num_steps: int) -> None:
    import cProfile
    import pstats

    profile = cProfile.Profile()
    profile.enable()
    for _ in range(num_steps):
        core.step()
        core.take_events()
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
