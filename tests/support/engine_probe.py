"""An operation made of any function: how a test looks at, stops or kills an engine thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from engine.step.core import EngineCore
from engine.step.operations import Operation

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Probe(Operation[T]):
    """Applies `function`; the product itself sends named operations only."""

    function: Callable[[EngineCore], T]

    def apply(self, core: EngineCore) -> T:
        return self.function(core)
