"""The loader of transformers: plays a plan by `generate` in its own process.

    python -m benchmarks.systems.transformers_load PLAN.json RESULT.json

runs in the peer's environment. It has no queue: the requests of a lane go in batches of one length
and at most the lane's concurrency, one after the other, and lanes after one another. The time of a
step is when the stopping criterion is asked.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.plan import Plan, PlannedLane, Record, Result


class Clock(transformers.StoppingCriteria):
    """Notes when a step's tokens are there; stops nothing."""

    def __init__(self, records: list[Record], started_s: float) -> None:
        self._records = records
        self._started_s = started_s
        self._length = records[0].prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Called once a step, with prompt and answer so far."""
        at_s = time.monotonic() - self._started_s
        for record in self._records:
            record.arrive(at_s, input_ids.shape[1] - self._length)
        self._length = input_ids.shape[1]
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def batches(lane: PlannedLane, limit: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Prompts of one length together, at most as many as the lane's streams, or `limit`."""
    size = min(max(lane.concurrency, 1), limit)
    by_length = sorted(lane.prompts, key=len)  # stable: the order within a length stays
    for _, group in itertools.groupby(by_length, key=len):
        prompts = tuple(group)
        for start in range(0, len(prompts), size):
            yield prompts[start : start + size]


def play_batch(
    model: Any, lane: PlannedLane, prompts: tuple[tuple[int, ...], ...], options: Any, zero_s: float
) -> list[Record]:
    """One call of `generate` for prompts of the same length."""
    now_s = time.monotonic() - zero_s
    records = [Record(lane.role, len(prompt), now_s, sent_s=now_s) for prompt in prompts]
    ids = torch.tensor(prompts)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=lane.max_tokens,
        min_new_tokens=lane.max_tokens,
        do_sample=False,
        stopping_criteria=[Clock(records, zero_s)],
        **options,
    )
    for record in records:
        record.end_s = time.monotonic() - zero_s
        record.completion_tokens = sum(record.counts)
    return records


def main() -> None:
    """Read the plan, play it, write the result."""
    plan = Plan.read(Path(sys.argv[1]))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        plan.endpoint.model, dtype=torch.bfloat16
    ).eval()
    options = {**plan.endpoint.extra, "pad_token_id": 0}
    model.generate(torch.ones((1, 8), dtype=torch.long), max_new_tokens=4, pad_token_id=0)
    started_s = time.monotonic()
    records: list[Record] = []
    limit = 1 if "prompt_lookup_num_tokens" in options else sys.maxsize  # all it can draft for
    for lane in plan.lanes:
        for batch in batches(lane, limit):
            records += play_batch(model, lane, batch, options, started_s)
    wall_s = time.monotonic() - started_s
    Result(started_s, wall_s, 0.0, records).write(Path(sys.argv[2]))  # all CPU is the model's


if __name__ == "__main__":
    main()
