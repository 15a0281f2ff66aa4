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


async def _whole_under(scenario: Scenario, names: list[str], fault: str, **values: object) -> int:
    """Long prompts while `names` misbehave; returns how often the fault was carried out."""
    already = sum(scenario.done(name, fault) for name in names)
    for name in names:
        scenario.order(name, fault, **{"times": 2, **values})  # type: ignore[arg-type]
    for _ in range(10 if scenario.full else 1):
        await scenario.all_whole(
            [scenario.ask(case) for case in (LONG if scenario.full else SHORTER)]
        )
        if scenario.full:
            for name in names:
                scenario.order(name, fault, **{"times": 2, **values})  # type: ignore[arg-type]
    for name in names:
        scenario.lift(name)
    count = sum(scenario.done(name, fault) for name in names) - already
    assert count, f"{fault} never happened"
    scenario.note(f"{fault}: {count} times")
    return count


@pytest.mark.parametrize("lost", [True, False], ids=["peer-lost", "refused"])
async def test_read_posts_that_raise(scenario: Scenario, lost: bool) -> None:
    """The transport refuses a read: that chunk fails at once, is counted, and comes another way."""
    if not scenario.full and not lost:
        pytest.skip("in the full suite")
    await _whole_under(scenario, scenario.cluster.decode, "post_raises", lost=lost)
    scenario.moved(scenario.cluster.decode, "kv_transfer_failures_total")
    await scenario.finish()


async def test_reads_that_end_late(scenario: Scenario) -> None:
    """A read takes a second: only its own request waits for it."""
    await _whole_under(scenario, scenario.cluster.decode, "data_ends_late", after_s=1.0)
    assert not sum(scenario.rise(name, "kv_stale_reads_total") for name in scenario.cluster.decode)
    await scenario.finish()


async def test_a_read_that_never_ends_restarts_the_data_plane(alone: Scenario) -> None:
    """The quarantine reaches its bound: the transport ends with the read, a new one begins, and the
    blocks are free without the peer's help and without the end of the process.
    """
    scenario = alone
    name = "decode-0"
    pid = scenario.cluster[name].pid
    scenario.order(name, "never_ends", times=1)
    stuck = scenario.done(name, "never_ends")
    cases = LONG if scenario.full else SHORTER
    streams = [scenario.ask(case) for case in (*cases, *cases)]
    await scenario.until(lambda: scenario.done(name, "never_ends") > stuck, 30, "a read hangs")
    await scenario.all_whole(streams)
    await scenario.until(
        lambda: scenario.samples(name).get("kv_data_plane_restarts_total", 0) > 0,
        60,
        "the data plane begins anew",
    )
    scenario.lift(name)
    assert scenario.cluster[name].pid == pid, "the process lives on"
    await scenario.all_whole(
        [scenario.ask(case) for case in (LONG * 2 if scenario.full else SHORTER)]
    )
    scenario.moved(name, "kv_transfer_failures_total")
    scenario.moved(name, "kv_transfer_blocks_total")
    scenario.explained.append(r"did not end within|kept by reads that do not end")
    await scenario.finish(rest_s=30)


async def test_blocks_ready_lost(scenario: Scenario) -> None:
    """A gap in the announcements: no request waits for the missing one, and its lease ends."""
    await _whole_under(scenario, scenario.cluster.prefill, "lose_ready")
    scenario.moved(scenario.cluster.decode, "kv_transfer_failures_total")
    await scenario.finish(rest_s=LEASE_TTL_S + 10)


async def test_blocks_ready_doubled(scenario: Scenario) -> None:
    """Said twice: read once, or refused and asked again; leased once."""
    await _whole_under(scenario, scenario.cluster.prefill, "double_ready")
    await scenario.finish(rest_s=LEASE_TTL_S + 10)


async def test_blocks_ready_reordered(scenario: Scenario) -> None:
    """A later chunk before an earlier one: blocks are named in order or not at all."""
    await _whole_under(scenario, scenario.cluster.prefill, "reorder_ready")
    await scenario.finish(rest_s=LEASE_TTL_S + 10)


async def test_release_lost(scenario: Scenario) -> None:
    """The prefill worker never hears it: the lease's TTL ends the hold."""
    await _whole_under(scenario, scenario.cluster.prefill, "lose_release")
    await scenario.finish(rest_s=LEASE_TTL_S + 10)


async def test_release_doubled(scenario: Scenario) -> None:
    """Sent twice it releases once: no block is freed that another request holds by now."""
    await _whole_under(scenario, scenario.cluster.prefill, "double_release")
    for name in scenario.cluster.prefill:
        assert not checks.tracebacks(scenario.cluster.log_text(name, scenario.log_mark(name)))
    await scenario.finish()
