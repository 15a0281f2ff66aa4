"""Speculation as configured: constructed when its draft model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.runner.base import ModelRunner
from engine.sampling import Sampler
from engine.scheduling.speculation import Speculation


@dataclass(frozen=True, slots=True)
class Drafting:
    """Speculation as configured, before its draft model is loaded."""

    max_draft_tokens: int
    # (runner of the draft model, if any; sampler; block size) -> speculation
    begin: Callable[[ModelRunner | None, Sampler, int], Speculation]
