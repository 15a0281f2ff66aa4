import asyncio
import math

import pytest
from prometheus_client import CollectorRegistry

from coordinator.cluster.incidents import PENALTY_S
from coordinator.cluster.membership import Membership
from coordinator.cluster.worker import FORGET_S, SILENCE_S, Hello, Load
from coordinator.generation.dispatch import Dispatch
from coordinator.routing.policy import RequestView, least_loaded
from coordinator.routing.retry import Retry
from engine.base.errors import Mismatch
from engine.base.types import PROTOCOL_VERSION, Peer, Role
from engine.rpc.liveness import STALL_S, STUCK_LOOP_S
from engine.telemetry.coordinator_metrics import CoordinatorMetrics
from tests.support.fake_decode import identity

STALLS = "diptych_worker_stalls_total"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def make(clock=None):
    registry = CollectorRegistry()
    metrics = CoordinatorMetrics(registry, "smollm2")
    return Membership("smollm2", 49152, metrics, clock or Clock()), registry


def hello(worker_id="d0", role=Role.DECODE, incarnation="i0", version=None, **changes):
    peer = Peer(worker_id, incarnation, f"127.0.0.1:{sum(map(ord, worker_id))}")
    model = identity(**changes)
    return Hello(peer, role, "127.0.0.1:1", model, version or PROTOCOL_VERSION)


def chosen(table, num_tokens=0, failures=(), prompt=0):
    """The worker_ids of decode and prefill; None where there is none."""
    request = RequestView(prompt + 1, num_tokens, failures=dict.fromkeys(failures, 1))
    plan = least_loaded(table.view(), request)
    if plan is None:
        return None, None
    return plan.decode.peer.worker_id, plan.prefill.peer.worker_id if plan.prefill else None


def states(table):
    return {w.peer.worker_id: w.state.value for w in table.snapshot()}


def test_another_tokenizer_is_refused():
    metrics = CoordinatorMetrics(CollectorRegistry(), "smollm2")
    table = Membership("smollm2", 49152, metrics, tokenizer_digest="aa")
    with pytest.raises(Mismatch, match="tokenizer_digest bb is not aa"):
        table.register(hello(tokenizer_digest="bb"))
    table.register(hello(tokenizer_digest="aa"))


def test_a_silent_worker_does_not_come_back_among_those_of_another_model():
    """Both would be routed to: a retry would go on with other weights."""
    clock = Clock()
    table, _ = make(clock)
    first = table.register(hello("p0", Role.PREFILL))
    clock.now += SILENCE_S + 1
    second = table.register(hello("d0", numeric_profile="other", digest="other"))
    assert not table.heartbeat(first, Load())
    assert table.heartbeat(second, Load())
    assert states(table) == {"p0": "suspect", "d0": "ready"}
    with pytest.raises(Mismatch, match="numeric_profile"):
        table.register(hello("p0", Role.PREFILL))


def test_the_life_of_a_worker():
    clock = Clock()
    table, registry = make(clock)
    worker = table.register(hello())
    assert table.heartbeat(worker, Load(draining=True))
    assert states(table) == {"d0": "draining"}
    assert not table.ready(Role.DECODE)
    table.heartbeat(worker, Load())
    assert table.ready(Role.DECODE)
    clock.now += SILENCE_S + 1
    assert states(table) == {"d0": "suspect"}
    assert table.heartbeat(worker, Load())
    assert states(table) == {"d0": "ready"}
    table.lost(worker, "stream broke")
    assert states(table) == {"d0": "suspect"}
    labels = {"model_name": "smollm2", "role": "decode", "state": "suspect"}
    assert registry.get_sample_value("diptych_workers", labels) == 1
    clock.now += FORGET_S + 1
    assert states(table) == {}
    assert not table.heartbeat(worker, Load())


def test_a_new_incarnation_takes_the_place_and_the_old_stream_counts_no_more():
    table, _ = make()
    old = table.register(hello(incarnation="i0"))
    new = table.register(hello(incarnation="i1"))
    assert not table.heartbeat(old, Load(num_running=5))
    table.lost(old, "late news")
    assert states(table) == {"d0": "ready"}
    again = table.register(hello(incarnation="i1"))  # the same process on a new stream
    table.lost(new, "its first stream ends")
    assert states(table) == {"d0": "ready"}
    table.lost(again, "the end")
    assert states(table) == {"d0": "suspect"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "other"}, "'other' is not configured"),
        ({"version": 9}, "protocol version 9"),
        ({"vocab_size": 5}, "vocab_size 5"),
        ({"block_size": 32}, "block_size 32 is not 16"),
        ({"numeric_profile": "rough"}, "numeric_profile rough is not exact"),
        ({"digest": "ff"}, "digest ff is not 00"),
    ],
)
def test_a_worker_with_another_identity_is_refused_by_name(changes, words):
    table, _ = make()
    table.register(hello("p0", Role.PREFILL))
    with pytest.raises(Mismatch, match=words):
        table.register(hello("d0", **changes))
    assert list(states(table)) == ["p0"]


def test_a_shorter_decode_worker_does_not_shorten_the_service():
    """It gets only requests that fit; a prefill worker's own length shortens nothing."""
    clock = Clock()
    table, _ = make(clock)
    table.register(hello("p0", Role.PREFILL, max_model_len=1024))
    assert (table.identity.max_model_len, table.max_model_len) == (1024, 0)
    table.register(hello("d1", max_model_len=4096))
    assert table.max_model_len == 4096
    longest = table.register(hello("d0", incarnation="i1", max_model_len=8192))
    table.register(hello("d2", incarnation="i2", max_model_len=2048))
    assert table.identity.max_model_len == table.max_model_len == 8192
    assert chosen(table, 8192, prompt=1024) == ("d0", "p0")
    assert chosen(table, 4096, {"i1"}, prompt=1040) == ("d1", None)
    assert chosen(table, 4097, {"i1"}) == ("d0", None), "it failed, and no other holds so many"
    table.lost(longest, "killed")
    assert table.identity.max_model_len == 8192, "it may come back"
    table.register(hello("d0", incarnation="i3", max_model_len=8192))
    assert table.max_model_len == 8192
    table.register(hello("d0", incarnation="i4", max_model_len=4096))
    assert table.max_model_len == 4096, "no worker holds more"


@pytest.mark.parametrize(("num_tokens", "prefill"), [(600, "p0"), (1040, "p0"), (1041, "p1")])
async def test_a_prompt_goes_to_a_prefill_worker_that_holds_it(num_tokens, prefill):
    """Its whole blocks; the smaller one would refuse it, and the decode worker compute it all."""
    table, _ = make()
    table.register(hello("d0", max_model_len=8192))
    table.register(hello("p0", Role.PREFILL, max_model_len=1024))
    retry = Retry(least_loaded, table, worker_wait_s=0, deadline_s=1e9, max_tokens=num_tokens)
    dispatch = Dispatch(retry, table)
    if prefill == "p1":
        assert (await dispatch.next(num_tokens)).prefill is None
    table.register(hello("p1", Role.PREFILL, max_model_len=8192))
    assert (await dispatch.next(num_tokens)).prefill.peer.worker_id == prefill


def test_what_is_lost_for_long_counts_no_more():
    clock = Clock()
    table, _ = make(clock)
    table.lost(table.register(hello("d0", max_model_len=8192)), "killed")
    clock.now += FORGET_S / 2
    worker = table.register(hello("d1", incarnation="i1", max_model_len=4096))
    assert table.max_model_len == 8192
    clock.now += FORGET_S / 2 + 1
    table.heartbeat(worker, Load())
    table.snapshot()
    assert table.max_model_len == 4096


def test_the_identity_may_change_when_the_last_worker_has_gone():
    table, _ = make()
    worker = table.register(hello("d0"))
    assert table.identity == identity()
    table.lost(worker, "gone")
    assert table.identity is None
    table.register(hello("d1", block_size=32))
    assert table.identity.block_size == 32
    with pytest.raises(Mismatch, match="block_size 16 is not 32"):
        table.register(hello("d0"))


def test_a_lone_worker_may_come_back_with_another_identity():
    table, _ = make()
    table.register(hello("d0"))
    table.register(hello("d0", incarnation="i1", block_size=32))
    assert table.identity.block_size == 32


async def test_waiting_for_a_worker():
    table = Membership("smollm2", 49152, CoordinatorMetrics(CollectorRegistry(), "smollm2"))
    assert not await table.wait_for(Role.DECODE, 0.05)
    waiting = asyncio.create_task(table.wait_for(Role.DECODE, 5.0, count=2))
    await asyncio.sleep(0.01)
    table.register(hello("d0"))
    table.register(hello("p0", Role.PREFILL))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    table.register(hello("d1"))
    assert await asyncio.wait_for(waiting, 1.0)


def test_assigned_work_is_counted_until_it_is_done():
    table, _ = make()
    worker = table.register(hello("d0"))
    with table.assigned(worker, 30):
        with table.assigned(worker, 12):
            row = table.snapshot()[0]
            assert (row.assigned_requests, row.assigned_tokens) == (2, 42)
        table.heartbeat(worker, Load(num_running=1))
        assert table.snapshot()[0].assigned_tokens == 30
        table.register(hello("d0", incarnation="i1"))
    row = table.snapshot()[0]
    assert (row.assigned_requests, row.assigned_tokens) == (0, 0)


def test_a_superseded_process_does_not_take_its_place_back():
    """A stopped process that wakes up finds another in its place; so do two of one name."""
    table, _ = make()
    table.register(hello(incarnation="old"))
    table.register(hello(incarnation="new"))
    with pytest.raises(Mismatch, match="another process has taken the place d0"):
        table.register(hello(incarnation="old"))
    table.register(hello(incarnation="new"))  # the same process dials again
    assert [w.peer.incarnation for w in table.snapshot()] == ["new"]


async def test_a_cancel_that_crosses_a_change_is_heard():
    table, _ = make()
    waiting = asyncio.create_task(table.wait_for_change(5))
    await asyncio.sleep(0.01)
    table.register(hello())
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


def test_a_draining_worker_whose_stream_ends_has_ended():
    table, _ = make()
    worker = table.register(hello())
    table.heartbeat(worker, Load(draining=True))
    table.left(worker)
    assert states(table) == {}
    worker = table.register(hello(incarnation="next"))
    table.left(worker)
    assert states(table) == {"d0": "suspect"}, "it did not say that it would go"


def test_a_worker_that_fails_a_request_is_avoided_for_a_while():
    clock = Clock()
    table, _ = make(clock)
    table.register(hello("d0", incarnation="a"))
    table.register(hello("d1", incarnation="b"))
    table.register(hello("p0", Role.PREFILL, incarnation="c"))
    first, second, prefill = table.snapshot()
    assert chosen(table, prompt=16) == ("d0", "p0")
    table.penalize(first)
    assert chosen(table, prompt=16) == ("d1", "p0")
    table.penalize(second)
    assert chosen(table, prompt=16) == ("d0", "p0"), "better than none"
    table.penalize(prefill)
    assert chosen(table, prompt=16) == ("d0", None), "the decode worker computes it"
    clock.now += PENALTY_S / 2
    assert chosen(table, prompt=16) == ("d0", None)
    clock.now += SILENCE_S - PENALTY_S / 2 - 0.1
    table.penalize(first)
    table.register(hello("d0", incarnation="another"))
    assert not table.snapshot()[0].is_degraded(clock.now), "another process is another matter"


def test_a_worker_that_reports_a_stall_keeps_its_place_and_comes_last():
    clock = Clock()
    table, registry = make(clock)
    worker, beside = table.register(hello("d0")), table.register(hello("d1"))
    for lag_s in (1.0, 2.0, 3.0, 4.0, 5.0):
        clock.now += 1.0
        table.heartbeat(beside, Load(num_running=9))
        table.stalled("d0", "i0", lag_s)
        assert table.since_stall_s(worker.peer) == 0.0
        assert states(table) == {"d0": "ready", "d1": "ready"}
    assert chosen(table)[0] == "d1"
    assert registry.get_sample_value(STALLS, {"model_name": "smollm2", "worker": "d0"}) == 1
    assert table.last_beat_s("d0", 0.0) == 100.0, "a report is no heartbeat: the watchdog goes on"
    table.heartbeat(worker, Load())
    assert chosen(table)[0] == "d0"
    clock.now += SILENCE_S + 0.1
    assert states(table)["d0"] == "suspect", "silent without a report"


@pytest.mark.parametrize("lag_s", [0.0, STALL_S - 0.1, STUCK_LOOP_S, math.inf, math.nan, -1.0])
def test_a_loop_that_turns_or_is_stuck_excuses_no_silence(lag_s):
    clock = Clock()
    table, registry = make(clock)
    worker = table.register(hello("d0"))
    table.stalled("d0", "i0", lag_s)
    table.stalled("d0", "another", 2.0)
    table.stalled("d9", "i0", 2.0)
    assert table.since_stall_s(worker.peer) == math.inf
    assert registry.get_sample_value(STALLS, {"model_name": "smollm2", "worker": "d0"}) is None
    clock.now += SILENCE_S + 0.1
    assert states(table) == {"d0": "suspect"}
    table.stalled("d0", "i0", 2.0)
    assert states(table) == {"d0": "suspect"}, "a heartbeat alone brings it back"


def test_each_stall_counts_once_however_close_they_are():
    clock = Clock()
    table, registry = make(clock)
    table.register(hello("d0"))
    for lag_s in (1.0, 1.25, 5.5):  # the thread was stopped in between, or its calls failed
        clock.now = 200.0 + lag_s
        table.stalled("d0", "i0", lag_s)
    assert registry.get_sample_value(STALLS, {"model_name": "smollm2", "worker": "d0"}) == 1
    clock.now = 207.0
    table.stalled("d0", "i0", 1.0)  # 1.5 s after the last report, and the loop turned at 206.0
    assert registry.get_sample_value(STALLS, {"model_name": "smollm2", "worker": "d0"}) == 2


def test_a_stall_of_a_process_excuses_no_other_one():
    table, _ = make()
    old = table.register(hello("d0", incarnation="i0"))
    table.stalled("d0", "i0", 2.0)
    new = table.register(hello("d0", incarnation="i1"))
    assert table.since_stall_s(old.peer) == table.since_stall_s(new.peer) == math.inf
