"""Law 1's one exception, as narrow as it can be made: a first difference that rounding can explain.

An oracle and a run may compute logits that differ in the last bits. That can change a token only
where two scores, or a score and a cut, lie closer than BOUND. For each position three sets answer
which tokens could have come out, for any perturbation within the bound:

    strict   kept although every cut moved against it   |  a winner must beat every strict token,
    kept     what the oracle keeps                      |  less the bound,
    lenient  kept if every cut moved in its favour      |  and be lenient itself

More than one such token: a near-tie. A difference is excused only if the token got is one of them,
so a token that rounding cannot produce is never excused, near a cut or not. Closeness is measured
in scaled logits (after temperature, noise included) for the two best, top-k and min-p; for top-p in
probability, or in logits between two tokens that could change places at the cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import torch

from engine.sampling.philox import gumbel_row
from engine.scheduling.rows import SampleRow
from tests.support.reference_sampler import Doubles, scaled_logits, softmax

BOUND = 1e-3  # never widened


def _kept(x: Doubles, row: SampleRow, slack: float) -> np.ndarray:
    """Mask [vocab] of what the filters leave if each cut moves by `slack` (> 0: lenient, < 0:
    strict)."""
    p = row.params
    keep = np.isfinite(x)
    falling = np.sort(x)[::-1]
    if p.min_p > 0:
        keep &= x >= x.max() + math.log(p.min_p) - slack
    if 0 < p.top_k < len(x):
        # Strict: clear of the best that is left out. Lenient: not clear of the worst that is kept.
        keep &= x >= falling[p.top_k - 1] - slack if slack > 0 else x > falling[p.top_k] - slack
    if p.top_p < 1 and keep.any():
        probabilities = np.where(keep, softmax(x), 0.0)
        probabilities /= probabilities.sum()
        order = np.argsort(-x, kind="stable")
        before = np.empty(len(x))
        before[order] = np.cumsum(probabilities[order]) - probabilities[order]
        inside = (before < p.top_p + slack) & keep
        inside[order[0]] |= keep[order[0]]
        # Tokens of nearly equal logits could stand on either side of the cut.
        if slack > 0:
            inside |= keep & (x >= x[inside].min() - slack)
        elif (keep & ~inside).any():
            inside &= x > x[keep & ~inside].max() - slack
        keep = inside
    return keep


def possible_tokens(logits: torch.Tensor, row: SampleRow, bound: float = BOUND) -> frozenset[int]:
    """Tokens that the sampler could produce if rounding moved scores and cuts by up to `bound`.

    `logits`: the oracle's, float32 [vocab]. The oracle's own token is always among them.
    """
    x = scaled_logits(logits.double().numpy(), row)
    if row.params.greedy:
        score, strict, lenient = x, np.isfinite(x), np.isfinite(x)
    else:
        score = x + gumbel_row(row.params.seed, row.position, len(x))
        strict, lenient = _kept(x, row, -bound), _kept(x, row, bound)
    to_beat = score[strict].max() if strict.any() else -math.inf
    return frozenset(int(t) for t in np.flatnonzero(lenient & (score >= to_beat - bound)))


def near_tie(logits: torch.Tensor, row: SampleRow, bound: float = BOUND) -> bool:
    """Whether more than one token could have come out."""
    return len(possible_tokens(logits, row, bound)) > 1


class Outcome(Enum):
    """How an answer compares with the oracle's."""

    EQUAL = "equal"
    EXCUSED = "excused"
    DIFFERENT = "different"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`at`: index in the answer of the first difference; None if equal."""

    outcome: Outcome
    at: int | None = None
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether law 1 holds."""
        return self.outcome is not Outcome.DIFFERENT


@dataclass(slots=True)
class Tally:
    """What has been compared and excused; a test run prints it."""

    num_answers: int = 0
    num_tokens: int = 0
    excused: list[str] = field(default_factory=list)

    def counts(self) -> tuple[int, int, list[str]]:
        """(answers, tokens, excuses), which another process can add to its own."""
        return self.num_answers, self.num_tokens, self.excused

    def add(self, num_answers: int, num_tokens: int, excused: Sequence[str]) -> None:
        """Count what another process has compared."""
        self.num_answers += num_answers
        self.num_tokens += num_tokens
        self.excused += excused

    def __str__(self) -> str:
        """One line, and one for each excuse."""
        head = (
            f"law 1: {self.num_tokens} tokens of {self.num_answers} answers compared, "
            f"{len(self.excused)} near-ties excused (bound {BOUND:g})"
        )
        return "\n".join([head, *self.excused])


TALLY = Tally()


def compare(
    oracle: Sequence[int],
    got: Sequence[int],
    at: Callable[[int], tuple[torch.Tensor, SampleRow]],
    *,
    name: str = "",
    tally: Tally = TALLY,
) -> Verdict:
    """Compare two answers; `at(i)` gives the oracle's logits (float32 [vocab]) and row of its i-th
    token.

    Up to the first difference both have the same history. After an excused one they have not, and
    nothing more is compared. One answer that ends before the other is different, not near.
    """
    tally.num_answers += 1
    for i, (expected, token) in enumerate(zip(oracle, got, strict=False)):
        tally.num_tokens += 1
        if expected == token:
            continue
        possible = possible_tokens(*at(i))
        detail = f"{name or 'answer'}: token {i} is {token}, the oracle's {expected}"
        if token in possible and expected in possible:
            tally.excused.append(f"{detail}: a near-tie of {sorted(possible)}")
            print(tally.excused[-1])
            return Verdict(Outcome.EXCUSED, i, detail)
        return Verdict(Outcome.DIFFERENT, i, f"{detail}; rounding allows {sorted(possible)}")
    if len(oracle) != len(got):
        i = min(len(oracle), len(got))
        lengths = f"{len(got)} tokens, the oracle has {len(oracle)}"
        return Verdict(Outcome.DIFFERENT, i, f"{name or 'answer'}: {lengths}")
    return Verdict(Outcome.EQUAL)
