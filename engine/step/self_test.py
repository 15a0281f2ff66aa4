"""A fixed prompt through the model on its real kernels: at the start, and after every fault.

    prompt, one chunk -> a token                            the way of an answer
    prompt and token, one chunk                             the same positions, by other kernels

At the start the numbers must be finite, and both ways must agree; later they must be those of the
start. On a CPU with our own kernels all of this holds bit for bit, elsewhere within a tolerance.
What it cannot see is a fault that spares these few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.attention.batch import Row
from engine.base.errors import SelfTestFailed
from engine.runner.base import ModelRunner

NUM_PROMPT, NUM_STEPS = 24, 2
_TOLERANCE = 0.1  # of the largest logit: reduced precision and another order of sums stay below
_ADVICE = "this machine's processor or memory, the weights or the precision are not to be trusted"


def num_scratch_blocks(block_size: int, num_columns: int = 1) -> int:
    """Blocks that the test writes."""
    return -(-(NUM_PROMPT + NUM_STEPS) // block_size) * num_columns


class SelfTest:
    """Of one model. Runs on its scratch pool, so that it needs no block of a full one."""

    def __init__(
        self,
        name: str,
        runner: ModelRunner,
        *,
        block_size: int,
        vocab_size: int,
        exact: bool,
        num_columns: int = 1,
    ) -> None:
        """`runner` is over a pool of `num_scratch_blocks`. `exact`: equal means bit for bit."""
        self._name = name
        self._runner = runner
        blocks = np.arange(num_scratch_blocks(block_size, num_columns), dtype=np.int32)
        self._table = blocks if num_columns == 1 else blocks.reshape(-1, num_columns)
        self._prompt = [(7919 * i + 13) % vocab_size for i in range(NUM_PROMPT)]
        self._exact = exact
        self._tokens: list[int] | None = None
        self._expected = torch.empty(0)  # logits of NUM_STEPS positions

    def __call__(self) -> None:
        """Compute, compare, and remember the first time. Raises SelfTestFailed."""
        first = self._tokens is None
        logits, tokens = self._answer(self._tokens)
        self._check_finite(logits)
        if first:
            whole = self._prompt + tokens[:-1]
            at_once = self._run(whole, 0, NUM_STEPS)
            self._check_finite(at_once)
            self._compare(at_once, logits, "a prompt chunk and single tokens do not agree")
            self._tokens, self._expected = tokens, logits
        else:
            self._compare(logits, self._expected, "its numbers are not those of its start")

    def _answer(self, given: Sequence[int] | None) -> tuple[torch.Tensor, list[int]]:
        """Logits of NUM_STEPS positions, one step each, and the tokens: `given`, or the best."""
        rows: list[torch.Tensor] = []
        tokens: list[int] = []
        for i in range(NUM_STEPS):
            part = [tokens[-1]] if tokens else self._prompt
            row = self._run(part, 0 if i == 0 else NUM_PROMPT + i - 1, 1)
            rows.append(row)
            tokens.append(int(row[0].argmax()) if given is None else given[i])
        return torch.cat(rows), tokens

    def _run(self, tokens: Sequence[int], start: int, num_logits: int) -> torch.Tensor:
        """Logits [num_logits, vocab] of the last positions, in memory of our own."""
        return self._runner.run([Row(tokens, start, self._table, num_logits)]).clone()

    def _check_finite(self, logits: torch.Tensor) -> None:
        if not bool(torch.isfinite(logits.amax(1)).all()):
            raise self._failed("its logits are not finite")

    def _compare(self, ours: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        if torch.equal(ours, expected):
            return
        size = float(expected.abs().amax())
        difference = float((ours - expected).abs().amax())
        if self._exact or difference > _TOLERANCE * size:
            raise self._failed(f"{what} (by {difference:g}; the largest is {size:g})")

    def _failed(self, what: str) -> SelfTestFailed:
        return SelfTestFailed(f"the self-test of {self._name} failed: {what}; {_ADVICE}")
