"""What two workers say to each other goes wrong: reads that raise or do not end, announcements and
releases that are lost, doubled or out of order. `fault_injection` opens the workers' seams.
"""

from __future__ import annotations

import pytest

from tests.faults import checks
from tests.faults.scenario import Scenario
from tests.support.timeouts import LEASE_TTL_S

pytestmark = pytest.mark.timeout(600)

LONG = ("long-0", "long-1-sampled")
SHORTER = ("long-2", "long-2-sampled")  # two chunks each


async def _whole_under(row: Scenario, names: list[str], fault: str, **values: object) -> int:
    """Long prompts while `names` misbehave; returns how often the fault was carried out."""
    already = sum(row.done(name, fault) for name in names)
    for name in names:
        row.order(name, fault, **{"times": 2, **values})  # type: ignore[arg-type]
    for _ in range(10 if row.full else 1):
        await row.all_whole([row.ask(case) for case in (LONG if row.full else SHORTER)])
        if row.full:
            for name in names:
                row.order(name, fault, **{"times": 2, **values})  # type: ignore[arg-type]
    for name in names:
        row.lift(name)
    count = sum(row.done(name, fault) for name in names) - already
    assert count, f"{fault} never happened"
    row.note(f"{fault}: {count} times")
    return count


@pytest.mark.parametrize("lost", [True, False], ids=["peer-lost", "refused"])
async def test_read_posts_that_raise(row: Scenario, lost: bool) -> None:
    """The transport refuses a read: that chunk fails at once, is counted, and comes another way."""
    if not row.full and not lost:
        pytest.skip("in the full suite")
    await _whole_under(row, row.cluster.decode, "post_raises", lost=lost)
    row.moved(row.cluster.decode, "kv_transfer_failures_total")
    await row.finish()


async def test_reads_that_end_late(row: Scenario) -> None:
    """A read takes a second: only its own request waits for it."""
    await _whole_under(row, row.cluster.decode, "data_ends_late", after_s=1.0)
    assert not sum(row.rise(name, "kv_stale_reads_total") for name in row.cluster.decode)
    await row.finish()


async def test_a_read_that_never_ends_restarts_the_data_plane(alone: Scenario) -> None:
    """The quarantine reaches its bound: the transport ends with the read, a new one begins, and the
    blocks are free without the peer's help and without the end of the process.
    """
    row = alone
    name = "decode-0"
    pid = row.cluster[name].pid
    row.order(name, "never_ends", times=1)
    stuck = row.done(name, "never_ends")
    cases = LONG if row.full else SHORTER
    streams = [row.ask(case) for case in (*cases, *cases)]
    await row.until(lambda: row.done(name, "never_ends") > stuck, 30, "a read hangs")
    await row.all_whole(streams)
    await row.until(
        lambda: row.samples(name).get("kv_data_plane_restarts_total", 0) > 0,
        60,
        "the data plane begins anew",
    )
    row.lift(name)
    assert row.cluster[name].pid == pid, "the process lives on"
    await row.all_whole([row.ask(case) for case in (LONG * 2 if row.full else SHORTER)])
    row.moved(name, "kv_transfer_failures_total")
    row.moved(name, "kv_transfer_blocks_total")
    row.explained.append(r"did not end within|kept by reads that do not end")
    await row.finish(rest_s=30)


async def test_blocks_ready_lost(row: Scenario) -> None:
    """A gap in the announcements: nobody waits for what was never said, and its lease ends."""
    await _whole_under(row, row.cluster.prefill, "lose_ready")
    row.moved(row.cluster.decode, "kv_transfer_failures_total")
    await row.finish(rest_s=LEASE_TTL_S + 10)


async def test_blocks_ready_doubled(row: Scenario) -> None:
    """Said twice: read once, or refused and asked again; leased once."""
    await _whole_under(row, row.cluster.prefill, "double_ready")
    await row.finish(rest_s=LEASE_TTL_S + 10)


async def test_blocks_ready_reordered(row: Scenario) -> None:
    """A later chunk before an earlier one: blocks are named in order or not at all."""
    await _whole_under(row, row.cluster.prefill, "reorder_ready")
    await row.finish(rest_s=LEASE_TTL_S + 10)


async def test_release_lost(row: Scenario) -> None:
    """The prefill worker never hears it: the lease's TTL ends the hold."""
    await _whole_under(row, row.cluster.prefill, "lose_release")
    await row.finish(rest_s=LEASE_TTL_S + 10)


async def test_release_doubled(row: Scenario) -> None:
    """Said twice it releases once: no block is given away that somebody else holds by now."""
    await _whole_under(row, row.cluster.prefill, "double_release")
    for name in row.cluster.prefill:
        assert not checks.tracebacks(row.cluster[name], row.log_mark(name))
    await row.finish()
