"""What is done to logits before noise is added: mask, bias, penalties; min-p, top-k, top-p.

All of it is batched torch on the logits' device, and bitwise the same for a row alone and in any
batch: what is not elementwise is a maximum, a selection, or a sum of integers, which no order of
additions can change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engine.scheduling.rows import SampleRow

_NEG_INF = float("-inf")
# Above it a temperature is infinite in fp32, and -inf divided by it is no number.
MAX_TEMPERATURE = float(torch.finfo(torch.float32).max)
# Probabilities are summed as integers of this scale: exact below 2**23 tokens, finer than fp32.
_FIXED_POINT = 2.0**40
# How many of the largest logits are sorted: few, then more, then all. A nucleus is mostly small.
_WIDTHS = (256, 4096)


def edits_logits(row: SampleRow) -> bool:
    """Whether `edit_logits` would change this row at all."""
    params = row.params
    return row.mask is not None or bool(row.banned or params.logit_bias) or params.penalizes


def edit_logits(x: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    """Apply to float32 x [S, vocab], in place: mask and bans, logit_bias, then the penalties."""
    _mask_and_bias(x, rows)
    _penalize(x, rows)


def _mask_and_bias(x: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    masked = [(i, row.mask) for i, row in enumerate(rows) if row.mask is not None]
    if masked:
        words = np.stack([mask for _, mask in masked]).view(np.uint8)
        forbidden = np.unpackbits(words, axis=1, bitorder="little")[:, : x.shape[1]] == 0
        at = torch.tensor([i for i, _ in masked], device=x.device)
        x[at] = x[at].masked_fill_(torch.from_numpy(forbidden).to(x.device), _NEG_INF)
    index: list[int] = []
    token: list[int] = []
    bias: list[float] = []
    for i, row in enumerate(rows):
        added = dict(row.params.logit_bias) | dict.fromkeys(row.banned, _NEG_INF)
        index += [i] * len(added)
        token += added.keys()
        bias += added.values()
    if index:
        where = (torch.tensor(index, device=x.device), torch.tensor(token, device=x.device))
        x[where] += torch.tensor(bias, device=x.device)


def _penalize(x: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    """Repetition as in CTRL (Keskar et al. 2019), by sign; frequency and presence as OpenAI's.

    Repetition is over prompt and answer: x > 0 is divided by it, other x multiplied. Frequency (a
    time) and presence (once) are subtracted for tokens of the answer, to which a draft prefix
    belongs.
    """
    parts = []
    seen: dict[int, tuple[NDArray[np.bool_], NDArray[np.int64]]] = {}
    for i, row in enumerate(rows):
        if not row.params.penalizes:
            continue
        if id(row.tokens) not in seen:  # the rows of a draft share their history
            seen[id(row.tokens)] = _history(row, x.shape[1])
        in_history, count = seen[id(row.tokens)]
        if row.draft:
            count = count + np.bincount(row.draft, minlength=x.shape[1])
        ids = np.flatnonzero(in_history | (count > 0))
        p = row.params
        values = np.empty((5, len(ids)))
        values[0], values[1], values[2] = i, ids, p.repetition_penalty
        values[3] = p.frequency_penalty * count[ids]
        values[4] = p.presence_penalty * (count[ids] > 0)
        parts.append(values)
    if not parts:
        return
    flat = torch.from_numpy(np.concatenate(parts, axis=1))
    at = (flat[0].long().to(x.device), flat[1].long().to(x.device))
    repetition, frequency, presence = flat[2:].float().to(x.device)
    value = x[at]
    value = torch.where(value > 0, value / repetition, value * repetition)
    x[at] = value - frequency - presence


def _history(row: SampleRow, vocab_size: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Tokens that occur at all (bool [vocab]); how often in the answer (int64 [vocab])."""
    tokens = np.asarray(row.tokens, np.int64)
    count = np.bincount(tokens[row.num_prompt :], minlength=vocab_size)
    return np.bincount(tokens, minlength=vocab_size) > 0, count


def filter_logits(x: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    """Divide float32 x [S, vocab] by T; what min-p, top-k, top-p remove is -inf. In place."""
    params = [row.params for row in rows]
    x /= _column([min(p.temperature, MAX_TEMPERATURE) for p in params], x)
    keep_min_p(x, [p.min_p for p in params])
    vocab_size = x.shape[1]
    cut = [i for i, p in enumerate(params) if p.top_p < 1 or 0 < p.top_k < vocab_size]
    if cut:
        top_k = [params[i].top_k or vocab_size for i in cut]
        part = x[cut] if len(cut) < len(params) else x
        keep_top(part, top_k, [params[i].top_p for i in cut])
        if part is not x:
            x[cut] = part


def _column(values: list[float], x: torch.Tensor) -> torch.Tensor:
    """Python numbers as float32 [S, 1] beside x."""
    return torch.tensor(values, dtype=torch.float32, device=x.device).view(-1, 1)


def keep_min_p(x: torch.Tensor, min_p: Sequence[float]) -> None:
    """Remove, in place, what is less likely than `min_p` times the likeliest; 0 is off."""
    if any(min_p):
        lowest = _column([math.log(p) if p > 0 else _NEG_INF for p in min_p], x)
        x.masked_fill_(x - x.amax(1, keepdim=True) < lowest, _NEG_INF)


def keep_top(x: torch.Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> None:
    """Top-k, then top-p over what top-k left, in place on float32 x [S, vocab].

    Tokens are ordered by (logit falling, id rising). Of them stay the first k, and of these the
    fewest whose probability reaches top_p: the token that crosses it included, one at least.

        x sorted   | > cut                | == cut       | < cut
        kept       | all                  | lowest ids   | none          together `num_kept`
    """
    cut, num_kept = _find_cuts(x, top_k, top_p)
    keep = x >= cut
    if bool((keep.sum(1, keepdim=True) > num_kept).any()):  # the cut runs through equal logits
        above = x > cut
        tied = x == cut
        keep = above | (tied & (tied.cumsum(1) <= num_kept - above.sum(1, keepdim=True)))
    x.masked_fill_(~keep, _NEG_INF)


def _find_cuts(
    x: torch.Tensor, top_k: Sequence[int], top_p: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest logit kept (float32 [S, 1]) and how many are kept (int64 [S, 1]).

    Only the largest logits are sorted; a row whose cut does not lie among them looks at more of
    them.
    """
    num_rows, vocab_size = x.shape
    k = torch.tensor(top_k, device=x.device).clamp(max=vocab_size).view(-1, 1)
    # A top_p of 1 is off: rounding must not remove the least likely token.
    p = torch.tensor([p if p < 1 else math.inf for p in top_p], dtype=torch.float64).view(-1, 1)
    p = p.to(x.device)
    maximum = x.amax(1, keepdim=True)
    total = torch.zeros(num_rows, 1, dtype=torch.int64, device=x.device)
    if min(top_p) < 1:
        total = _weights(x, maximum).sum(1, keepdim=True)
    cut = torch.empty(num_rows, 1, device=x.device)
    num_kept = torch.empty(num_rows, 1, dtype=torch.int64, device=x.device)

    todo = torch.arange(num_rows, device=x.device)
    for width in (*(w for w in _WIDTHS if w < vocab_size), vocab_size):
        part = x if len(todo) == num_rows else x[todo]
        largest = _largest(part, width)
        up_to = _weights(largest, maximum[todo]).cumsum(1)
        k_here = k[todo]
        inside = k_here <= width
        of_top_k = up_to.gather(1, k_here.clamp(max=width) - 1)
        budget = p[todo] * torch.where(inside, of_top_k, total[todo])
        # Kept: first k, and the probability before it is still below top_p.
        reached = (up_to < budget).sum(1, keepdim=True)
        kept = torch.minimum(reached + 1, k_here)
        done = (kept <= width) & (inside | (k_here == vocab_size))
        found = done.squeeze(1)
        where = todo[found]
        num_kept[where] = kept[found]
        cut[where] = largest[found].gather(1, kept[found] - 1)
        todo = todo[~found]
        if not len(todo):
            break
    return cut, num_kept


def _largest(x: torch.Tensor, width: int) -> torch.Tensor:
    """The `width` largest of each row, falling; float32 [S, width]."""
    if x.device.type != "cpu" or width <= _WIDTHS[0]:
        return x.topk(width).values
    # Many of many: numpy's vectorised partition and sort take a half to a quarter of torch's time.
    values = x.numpy()
    rest = values.shape[1] - width
    values = np.sort(np.partition(values, rest, axis=1)[:, rest:] if rest else values, axis=1)
    return torch.from_numpy(np.ascontiguousarray(values[:, ::-1]))


def _weights(x: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    """exp(x - maximum) in fixed point, int64."""
    return torch.exp(x - maximum).mul_(_FIXED_POINT).long()
