"""One token to sample: all that it depends on besides the logits; the error of unusable logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.base.types import SamplingParams


class SampleRow(NamedTuple):
    """A row of logits is to become the token at `position`, which follows `tokens + draft`.

    tokens  [ prompt: num_prompt | answer so far ]   draft  [ tokens assumed ]   position
    """

    params: SamplingParams
    position: int  # absolute: len(tokens) + len(draft)
    tokens: Sequence[int]  # prompt and answer; shared by a request's rows, only ever appended to
    num_prompt: int
    draft: Sequence[int] = ()  # counts as answer
    # Stop ids that min_tokens still forbids; they give way where the mask leaves nothing else.
    banned: frozenset[int] = frozenset()
    mask: NDArray[np.int32] | None = None  # bit t % 32 of word t // 32: token t is allowed


class UnusableLogits(ArithmeticError):
    """Rows that have no next token: NaN or +inf among the logits, or nothing left above -inf.

    `rows` are their indices in the batch; the other rows can be sampled without them. `broken` are
    those of them whose logits were no distribution as the model gave them. The requests of the
    other rows removed their last token, by a mask, bans, biases or penalties.
    """

    def __init__(self, rows: Sequence[int], reason: str, broken: Sequence[int] = ()) -> None:
        super().__init__(f"row {', '.join(map(str, rows))} of the logits: {reason}")
        self.rows = tuple(rows)
        self.broken = tuple(broken)
        self.reason = reason
