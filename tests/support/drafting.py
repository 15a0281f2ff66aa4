"""A worker without a model: answers are known, a step's time is a function of its rows.

Speculation changes no token, so a recorded answer is enough to replay any policy over it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from decode.speculative.acceptance import Acceptance
from decode.speculative.draft_length import MeasuredDraftLength
from decode.speculative.ngram import NgramDrafter
from decode.speculative.step_cost import StepCost
from decode.speculative.verify import verify
from engine.scheduling.speculation import Draft, Speculation

Curve = Callable[[int], float]  # rows -> milliseconds

CURVES: dict[str, Curve] = {
    "cpu": lambda rows: 14 + 2 * rows,
    "fast cpu": lambda rows: 4.4 + 0.9 * rows if rows <= 4 else 4 + rows,
    "steep": lambda rows: 2 + 3 * rows,
    "gpu": lambda rows: 20 + 0.005 * rows + 0.06 * max(0, rows - 200),
    "stairs": lambda rows: 10 * (1 + (rows - 1) // 8),
}


@dataclass(frozen=True)
class Known:
    """An answer that is known beforehand."""

    prompt: list[int]
    answer: list[int]


@dataclass
class _Running:
    request_id: str
    tokens: list[int]
    rest: list[int]


class FixedDraftLength:
    """Always the same draft length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def choose(
        self, drafts: Sequence[tuple[str, Draft]], num_rows: int, num_answers: int
    ) -> list[int]:
        return [min(self.length, len(draft.tokens)) for _, draft in drafts]

    def produced(self, request_id: str, tokens: Sequence[int]) -> None:
        pass

    def stepped(self, num_rows: int, seconds: float) -> None:
        pass

    def finish(self, request_id: str) -> None:
        pass


def measured(max_draft_tokens: int = 16) -> Speculation:
    """What a worker has by default."""
    drafter = NgramDrafter()
    draft_length = MeasuredDraftLength(Acceptance(drafter.acceptance), StepCost())
    return Speculation(drafter, verify, max_draft_tokens, draft_length)


def fixed(length: int) -> Speculation:
    """The same drafts at one length."""
    return Speculation(NgramDrafter(), verify, length, FixedDraftLength(length))


def seconds(
    answers: Sequence[Known],
    curve: Curve,
    num_seqs: int,
    speculation: Speculation,
    *,
    noise: float = 0.05,
    disturbed: bool = False,
    seed: int = 0,
) -> float:
    """Time to write all answers, `num_seqs` at once, on an undisturbed machine.

    What the controller measures has noise, rare hiccups, and, if `disturbed`, phases in which
    everything takes twice as long.
    """
    rng = random.Random(seed)
    todo = [_Running(str(i), list(a.prompt), list(a.answer)) for i, a in enumerate(answers)]
    running: list[_Running] = []
    total_s, factor = 0.0, 1.0
    while todo or running:
        while todo and len(running) < num_seqs:
            running.append(todo.pop(0))
        proposals = []
        for r in running:
            limit = min(speculation.max_draft_tokens, len(r.rest) - 1)
            proposal = speculation.drafter.propose(r.request_id, r.tokens, limit)
            proposals.append((r.request_id, proposal))
        lengths = speculation.choose(proposals, len(running), len(running))
        num_rows = len(running) + sum(lengths)
        step_s = curve(num_rows) / 1000
        total_s += step_s
        if disturbed and rng.random() < 0.005:
            factor = rng.choice([1.0, 2.0])
        hiccup = 3.0 if rng.random() < 0.002 else 1.0
        speculation.stepped(num_rows, step_s * math.exp(rng.gauss(0, noise)) * hiccup * factor)
        for r, (_, proposal), length in zip(running, proposals, lengths, strict=True):
            verified = speculation.verify(proposal.tokens[:length], r.rest[: length + 1])
            speculation.produced(r.request_id, verified.tokens)
            r.tokens += verified.tokens
            del r.rest[: len(verified.tokens)]
            if not r.rest:
                speculation.finish(r.request_id)
        running = [r for r in running if r.rest]
    return total_s
