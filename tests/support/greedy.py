"""Greedy answers of the default model in fp32, computed by transformers: what every stack with
`--dtype float32` must give. The file is tests/data/greedy_fp32.json.
"""

from __future__ import annotations

import json
from typing import TypedDict

from tests.support.paths import DATA


class GreedyCase(TypedDict):
    """A prompt, and the greedy tokens that follow it."""

    prompt: list[int]
    tokens: list[int]


GREEDY: list[GreedyCase] = json.loads((DATA / "greedy_fp32.json").read_text())


def greedy(length: int) -> GreedyCase:
    """The first case with a prompt of `length` tokens."""
    return next(case for case in GREEDY if len(case["prompt"]) == length)
