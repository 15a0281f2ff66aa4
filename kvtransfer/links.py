"""How fast reads from each peer are: bytes of pulls by the time in which one was in flight.

    pull a  |-------|                 busy time of the peer: the union of its pulls, so that pulls
    pull b       |-------|            that share a lane are not counted as slow ones
    busy    |------------|

A slow lane causes no error, as the bytes are right. So reads of a GPU's memory that are slower than
SLOW_BYTES_PER_S are logged, once a peer.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from engine.base.types import SLOW_BYTES_PER_S, KVLink
from kvtransfer.transport import RemotePool

_log = logging.getLogger(__name__)
_KEPT = 0.9  # weight of the earlier pulls, with each new one
_MAX_PEERS = 64
_WHOLE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class _Peer:
    pool: RemotePool
    num_bytes: int = 0  # in all
    recent_bytes: float = 0.0
    recent_s: float = 0.0
    weight: float = 0.0  # of the recent pulls
    ended_s: float = -math.inf
    warned: bool = False


class LinkMeter:
    """Written by the data-plane thread; any thread may call `links`."""

    def __init__(self, own_machine: str, lane: Callable[[RemotePool, bool], str]) -> None:
        """`lane` names the lane of a peer; its second argument: the peer is on this machine."""
        self._own_machine = own_machine
        self._lane = lane
        self._peers: OrderedDict[str, _Peer] = OrderedDict()  # by incarnation, latest last

    def note(self, pool: RemotePool, num_bytes: int, seconds: float, ended_s: float) -> None:
        """A pull of `num_bytes` that took `seconds` ended."""
        peers = self._peers.copy()  # replaced as a whole, for other threads
        before = peers.pop(pool.incarnation, None) or _Peer(pool)
        busy_s = max(1e-9, ended_s - max(ended_s - seconds, before.ended_s))
        peer = replace(
            before,
            num_bytes=before.num_bytes + num_bytes,
            recent_bytes=_KEPT * before.recent_bytes + num_bytes,
            recent_s=_KEPT * before.recent_s + busy_s,
            weight=_KEPT * before.weight + 1,
            ended_s=ended_s,
        )
        if not peer.warned and self._is_slow(peer):
            self._warn(peer)
            peer = replace(peer, warned=True)
        peers[pool.incarnation] = peer
        if len(peers) > _MAX_PEERS:
            peers.popitem(last=False)
        self._peers = peers

    def links(self) -> dict[str, KVLink]:
        """The link of each peer, by incarnation."""
        return {name: self._link(peer) for name, peer in self._peers.items()}

    def _link(self, peer: _Peer) -> KVLink:
        pool = peer.pool
        rate = peer.recent_bytes / peer.recent_s
        lane = self._lane(pool, pool.machine == self._own_machine)
        return KVLink(pool.incarnation, lane, rate, peer.num_bytes, pool.memory_kind)

    def _is_slow(self, peer: _Peer) -> bool:
        """Small pulls measure latency, not the lane, and do not count."""
        return self._link(peer).slow and peer.recent_bytes / peer.weight >= _WHOLE_BYTES

    def _warn(self, peer: _Peer) -> None:
        link = self._link(peer)
        _log.warning(
            "reads of GPU memory from peer %s are slow: %.1f GB/s over %s, expected %.0f or more;"
            " see docs/gpu.md",
            link.worker_id,
            link.bytes_per_s / 1e9,
            link.lane or "an unknown lane",
            SLOW_BYTES_PER_S / 1e9,
        )
