"""Leases: every pin leaves the table exactly once, whatever happens in between."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtransfer.lease import LEASE_ID_BYTES, Lease, LeaseTable

TTL_S = 10.0
OWNERS = st.sampled_from(["a", "b", "c"])
BLOCKS = st.lists(st.integers(0, 9), min_size=1, max_size=4)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Leases(RuleBasedStateMachine):
    """Pins granted = pins in the table + pins handed back, as multisets; never a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.table = LeaseTable(self.clock, TTL_S)
        self.granted: list[Lease] = []
        self.renewed_at: dict[bytes, float] = {}
        self.live: set[bytes] = set()
        self.pins: Counter[int] = Counter()

    def _take(self, block_ids: list[int]) -> None:
        self.pins.subtract(block_ids)
        assert all(count >= 0 for count in self.pins.values())

    @rule(owner=OWNERS, blocks=BLOCKS)
    def grant(self, owner: str, blocks: list[int]) -> None:
        lease = self.table.grant(owner, blocks)
        assert len(lease.id) == LEASE_ID_BYTES and lease.expires_at == self.clock.now + TTL_S
        assert lease.id not in {other.id for other in self.granted}
        self.granted.append(lease)
        self.live.add(lease.id)
        self.renewed_at[lease.id] = self.clock.now
        self.pins.update(blocks)

    @rule(data=st.data(), owner=OWNERS)
    def release(self, data: st.DataObject, owner: str) -> None:
        some = data.draw(st.lists(st.sampled_from(self.granted))) if self.granted else []
        ours = {lease.id: lease for lease in some if lease.owner == owner and lease.id in self.live}
        freed = self.table.release(owner, [lease.id for lease in some])
        assert Counter(freed) == Counter(b for lease in ours.values() for b in lease.block_ids)
        self._take(freed)
        self.live -= ours.keys()

    @rule(data=st.data(), owner=OWNERS)
    def renew(self, data: st.DataObject, owner: str) -> None:
        some = data.draw(st.lists(st.sampled_from(self.granted))) if self.granted else []
        unknown = self.table.renew(owner, [lease.id for lease in some])
        for lease in some:
            in_time = self.clock.now < self.renewed_at[lease.id] + TTL_S
            known = lease.id in self.live and lease.owner == owner and in_time
            assert (lease.id not in unknown) == known
        for lease in some:
            if lease.id not in unknown:
                self.renewed_at[lease.id] = self.clock.now

    @rule(seconds=st.sampled_from([0.0, 1.0, 4.0, TTL_S]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def expire(self) -> None:
        due = {i for i in self.live if self.renewed_at[i] + TTL_S <= self.clock.now}
        ended = self.table.expire()
        assert {lease.id for lease in ended} == due
        self._take([block for lease in ended for block in lease.block_ids])
        self.live -= due

    @invariant()
    def conserved(self) -> None:
        assert sum(len(lease.block_ids) for lease in self.table.all) == self.pins.total()
        assert len(self.table) == len(self.live)


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=60, stateful_step_count=30)
