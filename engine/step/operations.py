"""Operations of the event loop on an engine: values, applied on its thread between two steps.

The set is closed in the product. Each is made with the arguments of the EngineCore method that it
calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, Generic, ParamSpec, TypeVar

from engine.step.core import EngineCore

T = TypeVar("T")
P = ParamSpec("P")


def _nothing(core: EngineCore, result: object) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Operation(Generic[T]):
    """One thing to do on the engine thread, with a result of type T.

    An exception of `apply` reaches the caller of `EngineThread.call`. `undo` takes it back where
    that caller stopped waiting before the result came.
    """

    apply: Callable[[EngineCore], T]
    undo: Callable[[EngineCore, T], None] = _nothing


def _operation(
    method: Callable[Concatenate[EngineCore, P], T],
    undo: Callable[[EngineCore, T], None] = _nothing,
) -> Callable[P, Operation[T]]:
    def make(*args: P.args, **kwargs: P.kwargs) -> Operation[T]:
        return Operation(lambda core: method(core, *args, **kwargs), undo)

    return make


# The life of a request.
Add = _operation(EngineCore.add)
Abort = _operation(EngineCore.abort)
Abandon = _operation(EngineCore.abandon_production)
# Its fetch from a peer.
BlocksArrived = _operation(EngineCore.blocks_arrived)
FetchEnded = _operation(EngineCore.fetch_ended)
# References to blocks: of leases, and of reads that go on.
Hold = _operation(EngineCore.hold, undo=lambda core, held: core.unpin(held[0]))
Pin = _operation(EngineCore.pin, undo=EngineCore.unpin)
Unpin = _operation(EngineCore.unpin)
# What is taken from others.
SetRoleBudgets = _operation(EngineCore.set_role_budgets)
Forget = _operation(EngineCore.forget)
# What /debug/holds shows.
ListHolds = _operation(EngineCore.holds)
