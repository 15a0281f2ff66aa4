"""Leases: which peer keeps which blocks pinned, and until when. Pure; the clock is injected.

A lease only makes a stale read rare; the fence detects every one. The end of a lease does not
depend on the peer: a lease that is neither renewed nor released runs out, and the reaper unpins its
blocks. Its id is a secret of 128 random bits between this worker and the owner, and is refused
under another owner's name.

    grant -> held --release--------> gone      each pin leaves the table exactly once, through
              |  ^                             release or expire
        renew +--+   --ttl passed--> gone

Owned by the asyncio loop of the process whose blocks they are.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

LEASE_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class Lease:
    """Pins on blocks for one peer."""

    id: bytes  # unguessable
    owner: str  # incarnation of the peer that may renew and release it
    block_ids: tuple[int, ...]
    expires_at: float  # on the table's clock, as is the next
    granted_at: float
    request_id: str = ""  # of the request whose blocks they are, if known


class Refusal(Enum):
    """Why a caller may not use a lease."""

    UNKNOWN = "unknown"  # forged, or ended: released, or run out and reaped
    EXPIRED = "expired"  # run out, not yet reaped
    FOREIGN = "foreign"  # of another owner


class LeaseTable:
    """All leases that this process has granted and that have not ended."""

    def __init__(self, clock: Callable[[], float], ttl_s: float) -> None:
        self._clock = clock
        self.ttl_s = ttl_s
        self._leases: dict[bytes, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def all(self) -> tuple[Lease, ...]:
        """All leases in the table. Their ids are secrets."""
        return tuple(self._leases.values())

    def grant(self, owner: str, block_ids: Sequence[int], request_id: str = "") -> Lease:
        """A new lease on blocks that the caller has pinned, once for this lease."""
        lease_id = secrets.token_bytes(LEASE_ID_BYTES)
        now = self._clock()
        lease = Lease(lease_id, owner, tuple(block_ids), now + self.ttl_s, now, request_id)
        self._leases[lease_id] = lease
        return lease

    def refusal(self, owner: str, lease_id: bytes) -> Refusal | None:
        """Why `owner` may not renew this lease; None if it may."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return Refusal.UNKNOWN
        if lease.owner != owner:
            return Refusal.FOREIGN
        return Refusal.EXPIRED if lease.expires_at <= self._clock() else None

    def refusals(self, owner: str, lease_ids: Iterable[bytes]) -> Counter[Refusal]:
        """How many of these are refused, by reason."""
        return Counter(why for i in lease_ids if (why := self.refusal(owner, i)) is not None)

    def renew(self, owner: str, lease_ids: Iterable[bytes]) -> list[bytes]:
        """Give each lease a whole TTL again; returns the ids unknown to this owner.

        A lease that has run out is unknown even before it is reaped; so is another owner's.
        """
        now = self._clock()
        unknown = []
        for lease_id in lease_ids:
            if self.refusal(owner, lease_id) is not None:
                unknown.append(lease_id)
            else:
                lease = self._leases[lease_id]
                self._leases[lease_id] = replace(lease, expires_at=now + self.ttl_s)
        return unknown

    def release(self, owner: str, lease_ids: Iterable[bytes]) -> list[int]:
        """End leases; returns the block ids to unpin, once per pin. Unknown leases are no error."""
        block_ids: list[int] = []
        for lease_id in lease_ids:
            lease = self._leases.get(lease_id)
            if lease is not None and lease.owner == owner:
                del self._leases[lease_id]
                block_ids.extend(lease.block_ids)
        return block_ids

    def any_held(self, lease_ids: Iterable[bytes]) -> bool:
        """Whether one of these is still in the table."""
        return any(lease_id in self._leases for lease_id in lease_ids)

    def expire(self) -> list[Lease]:
        """Remove and return the leases that have run out; the caller unpins their blocks."""
        now = self._clock()
        ended = [lease for lease in self._leases.values() if lease.expires_at <= now]
        for lease in ended:
            del self._leases[lease.id]
        return ended
