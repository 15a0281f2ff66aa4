"""One step of each shape before a worker listens: kernels are loaded or compiled, and on a GPU the
largest step has taken its memory before the KV pool gets what is left.

    chunk    | t t t ... t |                  a prompt's
    decode   | t | t | t | ... | t |          one token of each answer
    verify   | t d d d | t d d d | ... |      with drafts
    mixed    a short one of each in one step
    largest  as much as the budgets allow in one step

Prompts that are shorter than a step's budget fill it together.

The steps run over a scratch cache of one block that every row's block table repeats: what they
compute means nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.attention.batch import Row
from engine.base.types import SamplingParams
from engine.runner.base import ModelRunner
from engine.sampling import Sampler
from engine.sampling.logprobs import LogprobScorer
from engine.scheduling.plan import MAX_SCORED, Budgets
from engine.scheduling.rows import SampleRow
from engine.telemetry.log import get_logger

_log = get_logger(__name__)
_PLAIN = SamplingParams()
# All that the sampler can do to a row; sorting for top-k and top-p takes the most memory.
_EVERYTHING = SamplingParams(
    temperature=0.8,
    top_p=0.9,
    top_k=40,
    min_p=0.01,
    frequency_penalty=0.1,
    presence_penalty=0.1,
    repetition_penalty=1.1,
    seed=1,
    logit_bias=((0, 1.0),),
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A kind of step."""

    name: str
    rows: tuple[Row, ...]

    @property
    def num_tokens(self) -> int:
        """Of all rows."""
        return sum(len(row.token_ids) for row in self.rows)


def step_shapes(
    budgets: Budgets, *, draft_window: int, block_size: int, max_model_len: int
) -> list[Shape]:
    """The kinds of step that these budgets allow, each as large as it can be."""

    def row(num_tokens: int, num_logits: int, end: int) -> Row:
        end = max(num_tokens, end)
        return Row([0] * num_tokens, end - num_tokens, [0] * -(-end // block_size), num_logits)

    chunk = min(budgets.prompt_tokens, max_model_len)
    prompts: list[Row] = []
    num_left, num_to_score = budgets.prompt_tokens, MAX_SCORED
    while num_left and len(prompts) < budgets.num_seqs:
        size = min(chunk, num_left)
        scored = min(num_to_score, size)
        prompts.append(row(size, scored, max_model_len))
        num_left, num_to_score = num_left - size, num_to_score - scored
    window = min(draft_window, max_model_len - 1)
    num_seqs = budgets.num_seqs
    # So many answers are verified with a whole draft; the others of a full batch write one token.
    num_verified = min(num_seqs, max(1, (budgets.num_logits - num_seqs) // window)) if window else 0
    decode = [row(1, 1, block_size)] * num_seqs
    verify = [row(1 + window, 1 + window, 2 * block_size)] * num_verified
    largest = [*prompts, *verify, *decode[num_verified:]]
    mixed = [row(min(chunk, 2 * block_size), 1, 0), *verify[:1], *decode[:1]]
    shapes = [
        Shape("prompt chunk", (row(chunk, 1, max_model_len),)),
        Shape("decode", tuple(decode)),
        Shape("verify", tuple(verify)),
        Shape("mixed", tuple(mixed)),
        Shape("largest", tuple(largest)),
    ]
    return [shape for shape in shapes if shape.rows]


def smallest_shape(*, draft_window: int, block_size: int) -> Shape:
    """One short step of all kinds: enough on a CPU, which loads no kernel and keeps no memory."""
    budgets = Budgets(prompt_tokens=2, num_seqs=1)
    shapes = step_shapes(
        budgets, draft_window=min(draft_window, 1), block_size=block_size, max_model_len=block_size
    )
    return next(shape for shape in shapes if shape.name == "mixed")


def warm_up(
    shapes: Sequence[Shape],
    runners: Sequence[ModelRunner],
    sampler: Sampler,
    *,
    show: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> float:
    """Run every shape, and sample from it in every way; returns the seconds it took.

    `show` logs each shape before it: a GPU's kernels may compile for minutes.
    """
    begun_s = clock()
    log = _log.info if show else _log.debug
    scorer = LogprobScorer(sampler.vocab_size, sampler.device)
    for shape in shapes:
        at_s = clock()
        log("warm-up begins", step=shape.name, num_tokens=shape.num_tokens)
        for runner in runners:
            logits = runner.run(shape.rows)
            _sample(sampler, scorer, logits)
        log("warm-up done", step=shape.name, seconds=round(clock() - at_s, 3))
    return clock() - begun_s


@torch.inference_mode()
def _sample(sampler: Sampler, scorer: LogprobScorer, logits: torch.Tensor) -> None:
    """Greedy, then with all options, then under a mask; log-probabilities of some rows."""
    tokens = [0, 1]
    mask = np.full(-(-sampler.vocab_size // 32), -1, np.int32)
    logits.nan_to_num_()  # over a scratch cache they may be anything
    usable = logits[list(range(len(logits)))]  # a copy, as of those that give tokens in a step
    for params, allowed in ((_PLAIN, None), (_EVERYTHING, None), (_EVERYTHING, mask)):
        rows = [SampleRow(params, 2, tokens, 1, mask=allowed)] * len(usable)
        sampler.sample(usable, rows)
    num_scored = min(len(usable), MAX_SCORED)
    scorer.score(usable[:num_scored], [0] * num_scored, 5)
