"""Evidence against workers: processes that were lost, and proofs of wrong computation.

A worker has computed wrongly where another worker computed what it could not. One incident counts
once, however many requests it had. The decode worker that found the numbers has a part in it, for
the fault may be its own memory's, where blocks land: it is the sick one where it had a part in more
incidents than the worker that it found.

Moments are monotonic and passed in. Workers are known by their incarnation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable

from engine.base.types import Peer

PENALTY_S = 5.0  # default of --worker-penalty-s
INCIDENT_S = 5.0  # proofs against a worker that are closer together are one incident
LOST_S = 60.0  # how long a loss is remembered
STRIKES = 3  # proofs within STRIKES_S make a worker sick, although its self-test passes
STRIKES_S = 600.0
_MAX_LOSSES = 1024


class Losses:
    """Processes that were lost during the last `LOST_S`."""

    def __init__(self) -> None:
        self._lost_s: OrderedDict[str, float] = OrderedDict()

    def add(self, incarnation: str, now_s: float) -> None:
        """Note that a process was lost."""
        self._lost_s[incarnation] = now_s
        self._lost_s.move_to_end(incarnation)
        if len(self._lost_s) > _MAX_LOSSES:
            self._lost_s.popitem(last=False)

    def remove(self, incarnations: Iterable[str]) -> None:
        """These losses have an explanation and count no more."""
        for incarnation in incarnations:
            self._lost_s.pop(incarnation, None)

    def num_beside(self, incarnations: Container[str], now_s: float) -> int:
        """Number of processes lost that are not among `incarnations`."""
        return sum(
            lost_s > now_s - LOST_S and incarnation not in incarnations
            for incarnation, lost_s in self._lost_s.items()
        )


class Strikes:
    """Proofs of wrong computation, and the parts that decode workers had in them."""

    def __init__(self) -> None:
        self._strikes: dict[str, list[float]] = {}
        self._charges: dict[str, list[float]] = {}  # by the decode worker that found the fault

    def is_new(self, peer: Peer, now_s: float) -> bool:
        """Whether a proof at this moment belongs to no earlier incident."""
        strikes = self._strikes.get(peer.incarnation)
        return not strikes or now_s - strikes[-1] >= INCIDENT_S

    def add(self, peer: Peer, now_s: float) -> int:
        """Note a proof; returns the number within `STRIKES_S`."""
        return _add(self._strikes, peer, now_s)

    def charge(self, witness: Peer, now_s: float) -> int:
        """Note the part of a decode worker; returns the number within `STRIKES_S`."""
        return _add(self._charges, witness, now_s)

    def acquit_all(self) -> None:
        """The faults were those of one decode worker: no other worker has proofs against it."""
        self._strikes.clear()

    def forget(self, peer: Peer) -> None:
        """The process is gone for good."""
        self._strikes.pop(peer.incarnation, None)
        self._charges.pop(peer.incarnation, None)


def _add(moments: dict[str, list[float]], peer: Peer, now_s: float) -> int:
    recent = [s for s in moments.get(peer.incarnation, ()) if now_s - s < STRIKES_S]
    moments[peer.incarnation] = [*recent, now_s]
    return len(recent) + 1
