"""How many workers one request may harm, and how it ends."""

import asyncio
import itertools

import grpc
import pytest
from google.rpc import error_details_pb2
from prometheus_client import CollectorRegistry

from coordinator.api.openai.errors import failure_of
from coordinator.client.stream import _loss
from coordinator.cluster.membership import Membership
from coordinator.cluster.worker import Hello, Load
from coordinator.generation.dispatch import Dispatch
from coordinator.routing.harmed_workers import Trial
from coordinator.routing.policy import Plan, least_loaded
from coordinator.routing.retry import Retry
from engine.base.errors import Silent, Unavailable, WorkerLost, WorkersLost
from engine.base.types import PROTOCOL_VERSION, Peer, Role
from engine.rpc.status import from_rpc_error, to_status
from engine.telemetry.coordinator_metrics import CoordinatorMetrics
from tests.support.fake_decode import Cue, identity
from tests.support.grpc_front import details_of, error_of, front, stop

LOST = WorkerLost("UNAVAILABLE: Socket closed")


class Table:
    """Workers that can be lost and come back, a clock, and requests that are sent to them."""

    def __init__(self, decode=4, prefill=0):
        self.now_s = 100.0
        metrics = CoordinatorMetrics(CollectorRegistry(), "smollm2")
        self.membership = Membership("smollm2", 49152, metrics, lambda: self.now_s)
        self.trial = Trial()
        self.numbers = itertools.count()
        self.workers = {}
        for i in range(decode):
            self.begin(f"d{i}", Role.DECODE)
        for i in range(prefill):
            self.begin(f"p{i}", Role.PREFILL)

    def begin(self, name, role=Role.DECODE):
        peer = Peer(name, f"{name}-{next(self.numbers)}", "127.0.0.1:1")
        hello = Hello(peer, role, "", identity(), PROTOCOL_VERSION)
        self.workers[name] = self.membership.register(hello)

    def later(self, seconds):
        """All that are here are heard meanwhile."""
        self.now_s += seconds
        for worker in self.workers.values():
            self.membership.heartbeat(worker, Load())

    def request(self, worker_wait_s=0.0):
        retry = Retry(
            least_loaded,
            self.membership,
            worker_wait_s=worker_wait_s,
            deadline_s=1e9,
            trial=self.trial,
        )
        return Dispatch(retry, self.membership, clock=lambda: self.now_s)

    async def lose(self, dispatch, error=LOST):
        """The request is sent somewhere, and that worker is lost; its place fills again."""
        route = await dispatch.next(100)
        worker = route.prefill if error.lost else route.decode
        self.membership.lost(worker, "its stream broke")
        try:
            await dispatch.failed(route, error)
        finally:
            dispatch.retry.close()
            self.begin(worker.peer.worker_id, worker.role)
        return worker.peer.worker_id


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr("coordinator.routing.retry.FIRST_BACKOFF_S", 0.0)


@pytest.mark.parametrize("decode", [1, 2, 4])
@pytest.mark.parametrize("error", [LOST, Silent("d0 has sent nothing for 2.5 s")])
async def test_the_third_worker_is_the_last(decode, error):
    table = Table(decode)
    request = table.request()
    await table.lose(request, error)
    await table.lose(request, error)
    with pytest.raises(WorkersLost, match="3 workers were lost under this request"):
        await table.lose(request, error)


async def test_a_prefill_worker_that_is_gone_counts_and_one_that_is_here_does_not():
    table, gone = (
        Table(1, prefill=3),
        Unavailable("prefill worker lost: Socket closed", lost="prefill"),
    )
    request = table.request()
    assert {await table.lose(request, gone), await table.lose(request, gone)} < {"p0", "p1", "p2"}
    with pytest.raises(WorkersLost):
        await table.lose(request, gone)
    request = table.request()
    for _ in range(3):
        table.begin("p0", Role.PREFILL)
        await request.failed(await request.next(100), gone)
    await request.failed(await request.next(100), LOST)


async def test_a_prefill_worker_whose_end_is_known_a_moment_later_counts(monkeypatch):
    """The decode worker that waited for it may notice before the coordinator does."""
    monkeypatch.setattr("coordinator.routing.retry.FIRST_BACKOFF_S", 0.05)
    table, gone = Table(1, prefill=3), Unavailable("Socket closed", lost="prefill")
    request = table.request()
    with pytest.raises(WorkersLost):
        for _ in range(3):
            route = await request.next(100)
            failing = asyncio.create_task(request.failed(route, gone))
            await asyncio.sleep(0)
            table.membership.lost(route.prefill, "its stream broke")
            table.now_s += 0.2
            await failing


async def test_a_token_in_between_clears_it():
    table = Table()
    request = table.request()
    for _ in range(6):
        await table.lose(request)
        await table.lose(request)
        request.retry.progressed()


async def test_a_status_of_a_worker_is_no_loss():
    """It drains, it is full, it refuses the coordinator: its process runs."""
    table = Table()
    request = table.request()
    for _ in range(7):
        await request.failed(await request.next(100), Unavailable("this worker is draining"))


async def test_a_worker_that_computed_nonsense_counts():
    """Its self-test passes, so it stays; and so does a prefill worker whose blocks are damaged."""
    table = Table(3, prefill=1)
    nonsense = Unavailable("not finite", sick=True)
    request = table.request()
    for _ in range(2):
        await request.failed(await request.next(100), nonsense)
    with pytest.raises(WorkersLost):
        await request.failed(await request.next(100), nonsense)
    request = table.request()
    await request.failed(await request.next(100), Unavailable("damaged", lost="prefill", sick=True))
    await request.failed(await request.next(100), nonsense)
    with pytest.raises(WorkersLost, match="3 workers"):
        await request.failed(await request.next(100), nonsense)


async def test_one_that_was_ended_excuses_none_after_it():
    table = Table(4)
    for _ in range(4):
        request = table.request()
        await table.lose(request)
        await table.lose(request)
        with pytest.raises(WorkersLost, match="3 workers"):
            await table.lose(request)


async def test_several_harmful_requests_do_not_excuse_each_other_without_end():
    table = Table(6)
    harmful = [table.request(5.0) for _ in range(5)]
    num_lost, left = 0, list(harmful)
    while left:
        for request in list(left):
            num_lost += 1
            try:
                await table.lose(request)
            except WorkersLost:
                left.remove(request)
    assert num_lost <= 6 * len(harmful)


async def test_a_worker_that_stays_counts_once():
    """A link that is cut in one direction: there is no other worker, and it is tried again."""
    table = Table(1)
    request = table.request()
    for _ in range(7):
        await request.failed(await request.next(100), Silent("nothing for 2.5 s"))
        request.retry.close()


async def test_a_cluster_that_loses_workers_without_it_is_to_blame_itself():
    table = Table(4)
    request = table.request()
    for _ in range(3):
        table.membership.lost(table.workers["d3"], "its stream broke")
        table.begin("d3")
    for _ in range(3):
        await table.lose(request)
    with pytest.raises(WorkersLost, match="4 workers"):
        await table.lose(request)
    table = Table(4)
    table.membership.lost(table.workers["d3"], "its stream broke")
    table.later(61.0)
    request = table.request()
    await table.lose(request)
    await table.lose(request)
    with pytest.raises(WorkersLost):
        await table.lose(request)


async def test_suspects_are_tried_one_after_the_other_so_that_the_innocent_are_separated():
    table = Table(4)
    cause, beside = table.request(5.0), table.request(5.0)
    for _ in range(2):  # both are on the worker that is lost
        route = await cause.next(100)
        table.membership.lost(route.decode, "its stream broke")
        for request in (cause, beside):
            await request.failed(Plan(None, route.decode), LOST)
            request.retry.close()
        table.begin(route.decode.peer.worker_id)
    route = await cause.next(100)
    waiting = asyncio.create_task(beside.next(100))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    with pytest.raises(WorkersLost):
        await cause.failed(route, LOST)
    await asyncio.wait_for(waiting, 1)
    beside.retry.progressed()


async def test_a_trial_has_an_end():
    table = Table(4)
    first, second = table.request(), table.request()
    for request in (first, second):
        await table.lose(request)
        await table.lose(request)
    await first.next(100)
    with pytest.raises(Unavailable, match="others are tried first"):
        await second.next(100)
    await table.request().next(100)  # no suspect: it does not wait
    table.later(11.0)
    await second.next(100)


def test_the_status_is_not_one_to_try_again():
    status = to_status(WorkersLost("3 workers were lost under this request", 7))
    assert status.code is grpc.StatusCode.INTERNAL

    class Failed(grpc.RpcError):
        code = staticmethod(lambda: status.code)
        details = staticmethod(lambda: status.message)
        trailing_metadata = staticmethod(lambda: status.trailing_metadata)

    meaning = from_rpc_error(Failed())
    assert isinstance(meaning, WorkersLost)
    assert meaning.num_emitted == 7
    with pytest.raises(WorkersLost):
        _loss(Failed())
    failure = failure_of(meaning)
    assert (failure.status, failure.code) == (500, "workers_lost")
    assert failure.headers["x-should-retry"] == "false"


async def test_a_request_that_ends_every_worker_reaches_three(checkpoint, caplog):
    async with front(checkpoint) as f:
        workers = [await f.worker(f"d{i}", cues=[Cue(vanish=True)]) for i in range(4)]
        error = await error_of(f.call())
        assert error.code() is grpc.StatusCode.INTERNAL
        info = details_of(error, error_details_pb2.ErrorInfo)
        assert (info.reason, info.metadata["num_emitted"]) == ("WORKERS_LOST", "0")
        assert sum(len(worker.requests) for worker in workers) == 3
        assert f.sample("migrations_total", outcome="given_up") == 1
        assert f.sample("request_failures_total", code="internal") == 1
    assert not [r for r in caplog.records if r.exc_info and r.exc_info[0]]


async def test_one_that_gets_a_token_from_each_goes_on(checkpoint):
    async with front(checkpoint) as f:
        for i in range(5):
            await f.worker(f"d{i}", cues=[Cue(3, vanish=True)])
        await f.worker("d9")
        _, ids, _ = await f.ask(stop=stop(max_tokens=30))
        assert ids == f.answer[:30]
