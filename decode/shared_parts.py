"""What all choices of a request share, kept while one of them runs.

The first call of a request carries prompt, biases, stop tokens and constraint under a key. The
calls of its other choices carry the key alone. The memory is that of the running calls, and of the
last few requests, whose choices may come one after the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

from engine.base.types import Constraint
from engine.pb.diptych.internal.v1 import worker_pb2
from engine.rpc.convert import constraint_of

_NUM_RECENT = 4


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Parts:
    """The shared parts of one request."""

    prompt: tuple[int, ...]  # token ids
    logit_bias: tuple[tuple[int, float], ...]  # sorted by token id
    stop_token_ids: frozenset[int]
    constraint: Constraint | None


class PartsStore:
    """The parts of the requests in progress, by their keys. Owned by the event loop."""

    def __init__(self, check_token_ids: Callable[[Sequence[int]], None]) -> None:
        self._check_token_ids = check_token_ids
        self._held: WeakValueDictionary[bytes, Parts] = WeakValueDictionary()
        self._recent: deque[Parts] = deque(maxlen=_NUM_RECENT)

    def of(self, request: worker_pb2.DecodeRequest) -> Parts | None:
        """Return the parts that the request carries, or those of its key; None: key unknown.

        The caller keeps them alive. Raises InvalidRequest.
        """
        key = request.shared_key
        if key and not request.prompt_token_ids:
            return self._held.get(key)
        self._check_token_ids(request.prompt_token_ids)
        parts = Parts(
            tuple(request.prompt_token_ids),
            tuple(sorted(request.sampling.logit_bias.items())),
            frozenset(request.stop.stop_token_ids),
            constraint_of(request),
        )
        if key:
            self._held[key] = parts
            self._recent.append(parts)
        return parts
