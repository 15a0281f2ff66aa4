"""A worker without a model: answers are known, a step's time is a function of its rows.

Speculation changes no token, so a recorded answer is enough to replay any policy over it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from decode.speculative.acceptance import Acceptance
from decode.speculative.draft_length import MeasuredDraftLength
from decode.speculative.ngram import NgramDrafter
from decode.speculative.step_cost import StepCost
from decode.speculative.verify import verify
from engine.scheduling.speculation import (
    Draft,
    Drafter,
    DraftInputs,
    DraftLengthController,
    Drafts,
    Ints,
    Speculation,
    Tokens,
    Verify,
)

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
    draft_id: int
    tokens: list[int]
    rest: list[int]


class FixedDraftLength:
    """Always the same draft length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def choose(self, ids: Ints, drafts: Drafts, num_rows: int, num_answers: int) -> Ints:
        return np.minimum(self.length, drafts.lengths)

    def produced(self, ids: Ints, tokens: Tokens, counts: Ints) -> None:
        pass

    def stepped(self, num_rows: int, seconds: float) -> None:
        pass

    def finish(self, draft_id: int) -> None:
        pass


def ints(values: Sequence[int]) -> Ints:
    return np.array(values, np.int64)


def as_drafts(drafts: Sequence[Draft]) -> Drafts:
    """The same as arrays."""
    out = Drafts.empty(len(drafts), max((len(draft.tokens) for draft in drafts), default=0))
    for row, draft in enumerate(drafts):
        out[row] = draft
    return out


def padded(rows: Sequence[Sequence[int]], width: int) -> Tokens:
    """Rows of at most `width` tokens, and -1 beyond."""
    filled = [[*row, *[-1] * (width - len(row))] for row in rows]
    return np.array(filled, np.int32).reshape(len(rows), width)


def propose(drafter: Drafter, draft_id: int, tokens: list[int], max_tokens: int) -> Draft:
    """A draft for one request."""
    limits = ints([max_tokens])
    return drafter.propose(DraftInputs(ints([draft_id]), [tokens], ints([len(tokens)]), limits))[0]


def choose(
    controller: DraftLengthController,
    drafts: Mapping[int, Draft],
    num_rows: int,
    num_answers: int,
) -> list[int]:
    """The lengths for drafts by draft id."""
    arrays = as_drafts(list(drafts.values()))
    lengths: list[int] = controller.choose(
        ints(list(drafts)), arrays, num_rows, num_answers
    ).tolist()
    return lengths


def produced(controller: DraftLengthController, draft_id: int, tokens: Sequence[int]) -> None:
    """So many tokens came for one request."""
    controller.produced(ints([draft_id]), padded([tokens], len(tokens)), ints([len(tokens)]))


def learn(acceptance: Acceptance, draft_id: int, draft: Draft, tokens: list[int]) -> None:
    ids, counts = ints([draft_id]), ints([len(tokens)])
    acceptance.learn(ids, as_drafts([draft]), ints([0]), padded([tokens], len(tokens)), counts)


def survival(
    acceptance: Acceptance, draft_id: int, buckets: list[int], least: float
) -> list[float]:
    drafts = as_drafts([Draft([7] * len(buckets), buckets)])
    return [p for p in acceptance.survival(ints([draft_id]), drafts, least)[0].tolist() if p]


def verified(verify: Verify, draft: Sequence[int], sampled: Sequence[int]) -> list[int]:
    """The accepted tokens of one draft, and the one after them."""
    drafts = np.array([draft], np.int32).reshape(1, -1)
    (num_accepted,) = verify(drafts, np.array([sampled], np.int32).reshape(1, -1)).tolist()
    return list(sampled[: num_accepted + 1])


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
    todo = [_Running(i, list(a.prompt), list(a.answer)) for i, a in enumerate(answers)]
    running: list[_Running] = []
    total_s, factor = 0.0, 1.0
    while todo or running:
        while todo and len(running) < num_seqs:
            running.append(todo.pop(0))
        ids, known = ints([r.draft_id for r in running]), ints([len(r.tokens) for r in running])
        limits = ints([min(speculation.max_draft_tokens, len(r.rest) - 1) for r in running])
        inputs = DraftInputs(ids, [r.tokens for r in running], known, limits)
        drafts = speculation.drafter.propose(inputs)
        lengths = speculation.choose(ids, drafts, len(running), len(running)).tolist()
        num_rows = len(running) + sum(lengths)
        step_s = curve(num_rows) / 1000
        total_s += step_s
        if disturbed and rng.random() < 0.005:
            factor = rng.choice([1.0, 2.0])
        hiccup = 3.0 if rng.random() < 0.002 else 1.0
        speculation.stepped(num_rows, step_s * math.exp(rng.gauss(0, noise)) * hiccup * factor)
        width = max(lengths)
        drafted = np.where(np.arange(width) < ints(lengths)[:, None], drafts.tokens[:, :width], -1)
        rest = padded([r.rest[: width + 1] for r in running], width + 1)
        counts = speculation.verify(drafted, rest) + 1
        speculation.produced(ids, rest, counts)
        for r, count in zip(running, counts.tolist(), strict=True):
            r.tokens += r.rest[:count]
            del r.rest[:count]
            if not r.rest:
                speculation.drafter.finish(r.draft_id)
                if speculation.draft_length is not None:
                    speculation.draft_length.finish(r.draft_id)
        running = [r for r in running if r.rest]
    return total_s
