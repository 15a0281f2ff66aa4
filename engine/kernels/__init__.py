"""C kernels for the CPU: compiled once on the machine that runs them, called through ctypes.

`kernels()` returns None if there is no compiler or the CPU lacks the instructions, and `why_not`
returns the reason. Callers then use torch, which is slower. `build` makes the shared object, an
entry of the cache under a digest of sources, compiler and CPU flags.

    decoder.c      one call a step: rows in, logits out; KV written on the way
    matmul.c       packed and dense products      attention.c   paged attention
    threads.c      loops over cores that local workers share
    sampling.c     tokens from logits             logprobs.c    their log-probabilities
    speculation.c  drafts from a request's own tokens; what the tokens that came teach
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from engine.base.cpu_features import KERNEL_FLAGS, compiler, cpu_flags
from engine.kernels.build import BuildError, built_library
from engine.telemetry.log import get_logger

_log = get_logger(__name__)
# How much slower torch decodes with the default model: measured, see docs/operations.md.
TIMES_SLOWER = 8
_TYPES: dict[str, type[ctypes._SimpleCData[Any]]] = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int,
    "q": ctypes.c_int64,
    "d": ctypes.c_double,
}


@dataclass(frozen=True, slots=True)
class Kernels:
    """The loaded library."""

    library: ctypes.CDLL

    def function(
        self, name: str, signature: str, *, keeps_lock: bool = False
    ) -> Callable[..., None]:
        """A function without result; its `signature` has a letter an argument.

        p a pointer; i int; q int64_t; d double. `keeps_lock`: the interpreter's, for a call of
        microseconds: another thread that got the lock might keep it for milliseconds.
        """
        library = ctypes.PyDLL(None, handle=self.library._handle) if keeps_lock else self.library
        function = library[name]
        function.restype, function.argtypes = None, [_TYPES[letter] for letter in signature]
        return function


def kernels() -> Kernels | None:
    """The kernels for this CPU, compiled on the first call on a machine; None where there are none.

    Never raises: torch computes the same, more slowly.
    """
    found = _load()
    return found if isinstance(found, Kernels) else None


def why_not() -> str:
    """Why there are no kernels, and the remedy; "" where there are."""
    found = _load()
    return found if isinstance(found, str) else ""


@cache
def _load() -> Kernels | str:
    """The kernels, or the reason why there are none."""
    command, missing = compiler(), KERNEL_FLAGS - cpu_flags()
    if missing:
        reason = f"this CPU lacks the instructions {', '.join(sorted(missing))}"
    elif command is None:
        reason = "there is no C compiler (Debian, Ubuntu: apt-get install build-essential)"
    else:
        try:
            return Kernels(ctypes.CDLL(str(built_library(command, cpu_flags()))))
        except (BuildError, OSError) as error:
            reason = f"the CPU kernels could not be compiled: {error}"
    _log.warning("no native kernels, torch computes", reason=reason)
    return reason
