"""Log-probabilities of raw logits, where requested: in C on a CPU, else in torch.

fp32 log-softmax, in nats. Of equally likely tokens the lowest id comes first.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import torch

from engine.base.types import TokenLogprobs
from engine.kernels import kernels
from engine.scheduling.rows import UnusableLogits

MAX_TOP = 64  # as in native/logprobs.c
_REASON = "not a number, infinite, or -inf throughout"


class LogprobScorer:
    """Holds nothing but the function that does it; safe to share."""

    def __init__(
        self, vocab_size: int, device: torch.device | str = "cpu", *, native: bool = True
    ) -> None:
        on_cpu = torch.device(device).type == "cpu"
        found = kernels() if native and on_cpu else None
        self._vocab_size = vocab_size
        # Logits, elements from one row to the next, vocab_size, tokens (int32), rows, k, chosen
        # (fp32), ids (int32), values (fp32).
        self._native = found.function("diptych_logprobs", "pqipiippp") if found else None

    def score(
        self, logits: torch.Tensor, tokens: Sequence[int], num_top: int
    ) -> list[TokenLogprobs]:
        """Of each row of float32 logits [len(tokens), vocab]: its token's, and the `num_top` best.

        Raises UnusableLogits naming every row that is no distribution.
        """
        if not tokens:
            return []
        num_top = min(num_top, self._vocab_size, MAX_TOP)
        if self._native is None:
            return _score(logits.detach(), tokens, num_top)
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        num_rows = len(tokens)
        token_ids = array("i", tokens)
        chosen = array("f", bytes(4 * num_rows))
        ids = array("i", bytes(4 * num_rows * num_top))
        values = array("f", bytes(4 * num_rows * num_top))
        self._native(
            logits.data_ptr(),
            logits.stride(0),
            self._vocab_size,
            token_ids.buffer_info()[0],
            num_rows,
            num_top,
            chosen.buffer_info()[0],
            ids.buffer_info()[0],
            values.buffer_info()[0],
        )
        return _rows(chosen, ids, values, num_top)


def _rows(
    chosen: Sequence[float], ids: Sequence[int], values: Sequence[float], num_top: int
) -> list[TokenLogprobs]:
    bad = [i for i, value in enumerate(chosen) if math.isnan(value)]
    if bad:
        raise UnusableLogits(bad, _REASON, bad)
    starts = range(0, len(chosen) * num_top, num_top) if num_top else [0] * len(chosen)
    return [
        TokenLogprobs(value, tuple(ids[at : at + num_top]), tuple(values[at : at + num_top]))
        for value, at in zip(chosen, starts, strict=True)
    ]


def _score(logits: torch.Tensor, tokens: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """The same in torch, on any device."""
    usable = torch.isfinite(logits.amax(1))
    if not bool(usable.all()):
        bad = (~usable).nonzero().flatten().tolist()
        raise UnusableLogits(bad, _REASON, bad)
    logprobs = logits.float().log_softmax(1)
    picked = torch.tensor(tokens, device=logits.device).view(-1, 1)
    chosen = logprobs.gather(1, picked).flatten().tolist()
    ids: list[int] = []
    values: list[float] = []
    # topk leaves the order of equals open: all that reach the k-th value are sorted here.
    lowest = logits.topk(num_top).values[:, -1].tolist() if num_top else []
    for row, least in enumerate(lowest):
        reach = (logits[row] >= least).nonzero().flatten()
        pairs = zip(reach.tolist(), logits[row][reach].tolist(), strict=True)
        best = [token for token, _ in sorted(pairs, key=lambda p: (-p[1], p[0]))[:num_top]]
        ids += best
        values += logprobs[row][torch.tensor(best, device=logits.device)].tolist()
    return _rows(chosen, ids, values, num_top)
