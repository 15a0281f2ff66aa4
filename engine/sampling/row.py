"""One token to draw: everything the sampler's answer depends on, besides the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.types import SamplingParams


@dataclass(frozen=True, slots=True)
class SampleRow:
    """A row of logits is to become the token at `position`, which follows `tokens + draft`.

    tokens  [ prompt: num_prompt | answer so far ]   draft  [ tokens assumed ]   position
    """

    params: SamplingParams
    position: int  # absolute: len(tokens) + len(draft)
    tokens: Sequence[int]  # prompt and answer; shared by the rows of a request, never modified
    num_prompt: int
    draft: Sequence[int] = ()  # counts as answer
    banned: frozenset[int] = frozenset()  # stop ids that min_tokens still forbids
