"""The sampler: a function from logits and a SampleRow to a token.

    mask, banned -> bias -> penalties -> / T -> min-p -> top-k -> top-p -> argmax(x + G)
    G = gumbel(seed, position, token)

in fp32, ties to the lowest id, T < 1e-5 plain argmax after the penalties. By the Gumbel-max trick
(Gumbel 1954; Maddison, Tarlow, Minka 2014) it is an exact sample from the filtered softmax. A row's
token does not depend on the other rows of the batch, so batching, drafts, preemption and another
worker change no answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engine.base.types import SamplingParams
from engine.sampling.filters import edit_logits, edits_logits, filter_logits
from engine.sampling.native import native_sampler
from engine.sampling.philox import (
    MAX_GUMBEL,
    MIN_GUMBEL,
    Floats,
    Ints,
    gumbel,
    gumbel_at,
    gumbel_row,
)
from engine.scheduling.rows import SampleRow, UnusableLogits

MAX_ROWS = 256  # sampled at once in torch; rows do not depend on each other


class Sampler:
    """Samples tokens. Holds no state but sizes and work space; safe to share.

    On a CPU that has the instructions the work is kernels/sampling.c's; what follows here is for
    other devices, and the oracle of the tests (`native=False`).
    """

    def __init__(
        self, vocab_size: int, device: torch.device | str = "cpu", *, native: bool = True
    ) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        on_cpu = self.device.type == "cpu"
        self._native = native_sampler(vocab_size) if native and on_cpu else None

    def sample(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
        """The token of each row; logits float32 [len(rows), vocab_size], left as they are.

        Raises UnusableLogits naming the rows, ValueError for another shape or dtype.
        """
        self._check_shape(logits, len(rows))
        if not rows:
            return []
        if self._native is not None:
            return self._native.sample(logits, rows)
        return self._in_slices(logits.detach(), rows)

    def sample_plain(
        self, logits: torch.Tensor, params: Sequence[SamplingParams], positions: Ints, counts: Ints
    ) -> NDArray[np.int32]:
        """What `sample` gives for rows that have nothing but parameters and a position.

        params[i] are those of the next counts[i] rows; they neither penalize nor bias. Raises as
        `sample` does.
        """
        self._check_shape(logits, len(positions))
        if not params:
            return np.empty(0, np.int32)
        if self._native is not None:
            return self._native.sample_plain(logits, params, positions, counts)
        owners = np.repeat(np.arange(len(params)), counts)
        pairs = zip(owners.tolist(), positions.tolist(), strict=True)
        rows = [SampleRow(params[i], at, (), 0) for i, at in pairs]
        return np.array(self._in_slices(logits.detach(), rows), np.int32)

    def _check_shape(self, logits: torch.Tensor, num_rows: int) -> None:
        if logits.shape != (num_rows, self.vocab_size) or logits.dtype != torch.float32:
            expected = f"float32 [{num_rows}, {self.vocab_size}]"
            raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}, not {expected}")

    def _in_slices(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
        """A slice after the other: copies, sorts and noise take several times the logits."""
        tokens: list[int] = []
        bad: list[int] = []
        broken: list[int] = []
        reason = ""
        for first in range(0, len(rows), MAX_ROWS):
            part = slice(first, first + MAX_ROWS)
            try:
                tokens += self._sample(logits[part], rows[part])
            except UnusableLogits as error:
                bad += [first + row for row in error.rows]
                broken += [first + row for row in error.broken]
                reason = reason or error.reason
        if bad:
            raise UnusableLogits(bad, reason, broken)
        return tokens

    def _sample(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
        reason = "not a number, infinite, or -inf throughout"
        _check(logits, range(len(rows)), reason, raw=True)

        plain, edited, noisy = [], [], []
        for i, row in enumerate(rows):
            if not row.params.greedy:
                noisy.append(i)
            elif edits_logits(row):
                edited.append(i)
            else:
                plain.append(i)
        tokens = [0] * len(rows)

        def put(index: list[int], values: list[int]) -> None:
            for i, token in zip(index, values, strict=True):
                tokens[i] = token

        if plain:
            best = argmax(logits)  # of all rows: a tenth of what a copy of some would cost
            put(plain, [best[i] for i in plain])
        if edited:
            put(edited, argmax(self._edited(logits, rows, edited)))
        if noisy:
            x = self._edited(logits, rows, noisy)
            noisy_rows = [rows[i] for i in noisy]
            filter_logits(x, noisy_rows)
            put(noisy, noisy_argmax(x, noisy_rows))
        return tokens

    def _edited(
        self, logits: torch.Tensor, rows: Sequence[SampleRow], index: list[int]
    ) -> torch.Tensor:
        """A copy of the rows `index`, masked, biased and penalized."""
        x = logits.clone() if len(index) == len(rows) else logits[index]
        part = [rows[i] for i in index]
        if any(edits_logits(row) for row in part):
            edit_logits(x, part)
            _let_bans_give_way(x, logits, part, index)
            _check(x, index, "no token is left")
        return x


def _let_bans_give_way(
    x: torch.Tensor, logits: torch.Tensor, rows: Sequence[SampleRow], index: Sequence[int]
) -> None:
    """Where a grammar allows nothing but what is banned, in place."""
    both = [i for i, row in enumerate(rows) if row.mask is not None and row.banned]
    if not both:
        return
    left = torch.isfinite(x[both].amax(1)).tolist()
    for i, is_left in zip(both, left, strict=True):
        if not is_left:
            x[i] = logits[index[i]]
            edit_logits(x[i : i + 1], [rows[i]._replace(banned=frozenset())])


def _check(x: torch.Tensor, indices: Sequence[int], reason: str, *, raw: bool = False) -> None:
    """A maximum is finite unless the row holds NaN or +inf, or nothing but -inf."""
    usable = torch.isfinite(x.amax(1))
    if not bool(usable.all()):
        bad = (~usable).nonzero().flatten().tolist()
        rows = [indices[i] for i in bad]
        raise UnusableLogits(rows, reason, rows if raw else ())


def argmax(x: torch.Tensor) -> list[int]:
    """Index of the largest of each row, the lowest of equals; x float [S, vocab]."""
    if x.device.type == "cpu":
        # A tenth of torch's time, and the first of equals by contract.
        return [int(i) for i in x.numpy().argmax(1)]
    return argmax_torch(x)


def argmax_torch(x: torch.Tensor) -> list[int]:
    """What `argmax` gives, on any device; torch's own tie rule has changed with versions before."""
    ids = torch.arange(x.shape[1], device=x.device)
    largest = x.amax(1, keepdim=True)
    return [int(i) for i in torch.where(x == largest, ids, x.shape[1]).amin(1).tolist()]


def noisy_argmax(x: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """argmax(x + G) of each row; x float32 [S, vocab], -inf where a token was removed."""
    seeds = [row.params.seed for row in rows]
    positions = [row.position for row in rows]
    if x.device.type == "cpu":
        return _noisy_argmax_sparse(x.numpy(), seeds, positions)
    return argmax(x + gumbel(seeds, positions, x.shape[1], x.device))


def _noisy_argmax_sparse(x: Floats, seeds: Sequence[int], positions: Sequence[int]) -> list[int]:
    """argmax(x + G) of each row of float32 x [S, vocab], with noise only for tokens that can win.

    Rows with few candidates are sampled together, over one flat array; the others each on its own.
    """
    vocab_size = x.shape[1]
    candidates = x >= x.max(axis=1, keepdims=True) - (MAX_GUMBEL - MIN_GUMBEL)
    counts = np.count_nonzero(candidates, axis=1)
    tokens = np.zeros(len(x), np.int64)
    is_few = counts <= max(vocab_size // 4, 1024)  # one counter serves four tokens of a whole row
    for i in np.flatnonzero(~is_few).tolist():
        tokens[i] = (x[i] + gumbel_row(seeds[i], positions[i], vocab_size)).argmax()
    few = np.flatnonzero(is_few)
    if len(few):
        part = few if len(few) < len(x) else slice(None)
        at, ids = np.divmod(np.flatnonzero(candidates[part]), vocab_size)
        tokens[few] = _best_of(
            x[part][at, ids] + gumbel_at(seeds, positions, few[at], ids), counts[few], ids
        )
    return [int(token) for token in tokens]


def _best_of(scores: Floats, counts: Ints, ids: Ints) -> Ints:
    """The id of the best score in each of the segments of `counts` scores, the first of equals."""
    starts = np.cumsum(counts) - counts
    best = np.maximum.reduceat(scores, starts)
    hits = np.flatnonzero(scores == np.repeat(best, counts))
    return ids[hits[np.searchsorted(hits, starts)]]
