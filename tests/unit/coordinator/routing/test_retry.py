"""Retry and backoff in made-up time: nothing here waits, and no clock is read."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from coordinator.cluster.worker import HEARTBEAT_S, ClusterView, Worker, WorkerState
from coordinator.routing.affinity import Affinity, model_tag
from coordinator.routing.harmed_workers import Trial
from coordinator.routing.policy import Plan, least_loaded
from coordinator.routing.retry import (
    FIRST_BACKOFF_S,
    MAX_ATTEMPTS,
    MAX_BACKOFF_S,
    GiveUp,
    Retry,
    Wait,
)
from engine.base.errors import (
    DeadlineExceeded,
    Mismatch,
    Silent,
    Unavailable,
    WorkerLost,
    WorkersLost,
)
from engine.base.types import Role
from tests.unit.coordinator.routing.clusters import NOW_S, OTHER, worker

LOST = WorkerLost("UNAVAILABLE: Socket closed")
FULL = Unavailable("this worker is full")


class Cluster:
    """Workers that are heard all the time, the reports about them, and a made-up time."""

    def __init__(self, *workers: Worker) -> None:
        self.now_s = NOW_S
        self.workers = {w.peer.worker_id: w for w in workers or (worker("d0"), worker("d1"))}
        self.penalized: list[str] = []
        self.accused: list[tuple[str, str]] = []
        self.explained: list[tuple[str, ...]] = []
        self.num_beside = 0
        self.num_wakes = 0

    def view(self) -> ClusterView:
        rows = (replace(w, heard_s=self.now_s) for w in self.workers.values())
        return ClusterView(tuple(sorted(rows, key=lambda w: w.peer.worker_id)), self.now_s)

    def penalize(self, worker):
        self.penalized.append(worker.peer.worker_id)

    def accuse(self, worker, witness):
        self.accused.append((worker.peer.worker_id, witness.peer.worker_id))

    def num_lost_beside(self, incarnations):
        return self.num_beside

    def explain_losses(self, incarnations):
        self.explained.append(tuple(incarnations))

    def wake(self):
        self.num_wakes += 1

    def request(self, **options) -> Retry:
        values = {"worker_wait_s": 20.0, "deadline_s": self.now_s + 600.0, **options}
        return Retry(least_loaded, self, **values)

    def settle(self, decide):
        """The decision after all waits that it asks for, and how long they were."""
        waited_s = 0.0
        while isinstance(decision := decide(self.view()), Wait):
            assert 0.0 < decision.timeout_s <= 1.0
            waited_s += decision.timeout_s
            self.now_s += decision.timeout_s
        return decision, waited_s

    def next(self, retry: Retry, num_tokens: int = 100):
        return self.settle(lambda view: retry.next(view, num_tokens))

    def lose(self, retry: Retry, error: Unavailable = FULL):
        """One attempt that is lost: what follows, and the backoff."""
        decision, _ = self.next(retry)
        assert isinstance(decision, Plan), decision
        retry.failed(decision, error, self.now_s)
        return self.settle(retry.after_failure)


def test_an_attempt_follows_the_policy_at_once():
    cluster = Cluster()
    decision, waited_s = cluster.next(cluster.request())
    assert decision == Plan(None, cluster.view().workers[0])
    assert waited_s == 0.0


def test_the_backoff_doubles_up_to_a_bound_and_ends_with_the_last_attempt():
    cluster, waits = Cluster(), []
    retry = cluster.request()
    for _ in range(MAX_ATTEMPTS - 1):
        decision, waited_s = cluster.lose(retry)
        assert decision is None
        waits.append(waited_s)
    expected = [min(FIRST_BACKOFF_S * 2**i, MAX_BACKOFF_S) for i in range(MAX_ATTEMPTS - 1)]
    assert waits == pytest.approx(expected)
    decision, _ = cluster.lose(retry)
    assert isinstance(decision, GiveUp)
    assert "8 attempts failed, the last with: this worker is full" in decision.error.message
    assert cluster.penalized == ["d0", "d1"] * 4, "they take turns: each has failed as often"


def test_a_token_starts_the_backoff_and_the_count_again():
    cluster = Cluster()
    retry = cluster.request()
    for _ in range(3 * MAX_ATTEMPTS):
        decision, waited_s = cluster.lose(retry)
        assert decision is None
        assert waited_s == pytest.approx(FIRST_BACKOFF_S)
        retry.progressed()


def test_asking_too_early_or_too_often_changes_no_decision():
    rng = random.Random(3)
    outcomes = set()
    for is_hasty in (False, True):
        cluster = Cluster()
        retry = cluster.request()
        seen = []
        for _ in range(MAX_ATTEMPTS):
            decision, _ = cluster.next(retry)
            seen.append(decision.decode.peer.worker_id)
            retry.failed(decision, FULL, cluster.now_s)
            if is_hasty:
                wait = retry.after_failure(cluster.view())
                ends_s = cluster.now_s + wait.timeout_s
                while cluster.now_s < ends_s - 1e-6:
                    decision = retry.after_failure(cluster.view())
                    assert decision.timeout_s == pytest.approx(ends_s - cluster.now_s)
                    cluster.now_s += rng.uniform(0.0, decision.timeout_s)
            decision, _ = cluster.settle(retry.after_failure)
            seen.append(type(decision))
        outcomes.add(tuple(seen))
    assert len(outcomes) == 1


def test_a_request_waits_for_a_decode_worker_and_no_longer_than_it_may():
    cluster = Cluster(worker("p0", Role.PREFILL))
    retry = cluster.request(worker_wait_s=20.0)
    decision, waited_s = cluster.next(retry)
    assert isinstance(decision.error, Unavailable)
    assert decision.error.message == "no decode worker is ready (waited 20 s)"
    assert decision.error.retry_after_s == 5.0
    assert waited_s == pytest.approx(20.0)
    decision, waited_s = cluster.next(retry)
    assert waited_s == pytest.approx(20.0), "each attempt waits anew"
    wait = retry.next(cluster.view(), 100)
    assert isinstance(wait, Wait)
    cluster.workers["d0"] = worker("d0")
    assert isinstance(retry.next(cluster.view(), 100), Plan), "asked when the cluster has changed"


def test_the_error_names_the_length_that_fits_no_worker():
    cluster = Cluster(worker("d0"))
    decision, _ = cluster.next(cluster.request(worker_wait_s=0.0, max_tokens=9000))
    assert decision.error.message == "no decode worker for 9000 tokens is ready (waited 0 s)"


def test_no_wait_passes_the_deadline():
    cluster = Cluster(worker("p0", Role.PREFILL))
    decision, waited_s = cluster.next(cluster.request(deadline_s=cluster.now_s + 3.5))
    assert isinstance(decision.error, DeadlineExceeded)
    assert waited_s == pytest.approx(3.5)
    cluster = Cluster()
    retry = cluster.request(deadline_s=cluster.now_s + FIRST_BACKOFF_S / 2)
    decision, waited_s = cluster.lose(retry)
    assert isinstance(decision.error, DeadlineExceeded)
    assert waited_s == pytest.approx(FIRST_BACKOFF_S / 2)


def test_the_prefill_worker_is_kept_unless_it_failed_or_is_not_heard():
    prefill = [worker("p0", Role.PREFILL), worker("p1", Role.PREFILL)]
    for error, is_silent, expected in (
        (FULL, False, "p0"),
        (FULL, True, "p1"),
        (Unavailable("lost", lost="prefill"), False, "p1"),
    ):
        cluster = Cluster(worker("d0"), worker("d1"), *prefill)
        retry = cluster.request()
        decision, _ = cluster.next(retry)
        assert decision.prefill.peer.worker_id == "p0"
        cluster.workers["p0"] = replace(prefill[0], assigned_tokens=500)  # p1 is the less loaded
        retry.failed(decision, error, cluster.now_s)
        cluster.settle(retry.after_failure)
        view = cluster.view()
        if is_silent:
            late = cluster.now_s - 2 * HEARTBEAT_S
            rows = (
                replace(w, heard_s=late) if w.peer.worker_id == "p0" else w for w in view.workers
            )
            view = ClusterView(tuple(rows), view.now_s)
        decision = retry.next(view, 100)
        assert decision.prefill.peer.worker_id == expected
        failed = "p0" if error.lost else "d0"
        assert cluster.penalized == [failed]
        if not error.lost:
            assert decision.decode.peer.worker_id == "d1"


@pytest.mark.parametrize("error", [LOST, Silent("d0 has sent nothing for 2.5 s")])
def test_the_third_worker_that_is_lost_ends_the_request(error):
    cluster = Cluster(*(worker(f"d{i}") for i in range(4)))
    retry = cluster.request()
    assert cluster.lose(retry, error)[0] is None
    assert cluster.lose(retry, error)[0] is None
    decision, _ = cluster.lose(retry, error)
    assert isinstance(decision.error, WorkersLost)
    assert decision.harmed == ("d0", "d1", "d2")
    assert cluster.explained == [("of-d0", "of-d1", "of-d2")]


def test_a_suspect_waits_while_another_one_is_tried():
    cluster, trial = Cluster(*(worker(f"d{i}") for i in range(4))), Trial()
    first, second = (cluster.request(trial=trial, worker_wait_s=60.0) for _ in range(2))
    for request in (first, second):
        cluster.lose(request, LOST)
        cluster.lose(request, LOST)
    assert isinstance(first.next(cluster.view(), 100), Plan)
    assert isinstance(second.next(cluster.view(), 100), Wait)
    decision, waited_s = cluster.next(second)
    assert isinstance(decision, Plan)
    assert waited_s == pytest.approx(10.0), "a trial has an end"
    assert isinstance(first.next(cluster.view(), 100), Wait)
    wakes = cluster.num_wakes
    second.progressed()
    assert cluster.num_wakes == wakes + 1
    assert isinstance(first.next(cluster.view(), 100), Plan)
    first.close()
    assert cluster.num_wakes == wakes + 2


def test_a_worker_that_could_not_compute_what_another_could_is_accused():
    cluster = Cluster(*(worker(f"p{i}", Role.PREFILL) for i in range(2)), worker("d0"))
    retry = cluster.request()
    cluster.lose(retry, Unavailable("damaged", lost="prefill", sick=True))
    assert not cluster.accused
    cluster.next(retry)
    retry.progressed()
    retry.progressed()
    assert cluster.accused == [("p0", "d0")]


def test_an_output_is_not_continued_by_another_model():
    cluster = Cluster(worker("d0", model=OTHER))
    affinity = Affinity(model=model_tag(worker("d9")))
    decision = cluster.request(affinity=affinity).next(cluster.view(), 100)
    assert isinstance(decision.error, Mismatch)
    cluster.workers["d0"] = replace(cluster.workers["d0"], state=WorkerState.SUSPECT)
    assert isinstance(cluster.request(affinity=affinity).next(cluster.view(), 100), Wait)
    cluster.workers["d1"] = worker("d1")
    cluster.workers["d0"] = worker("d0", model=OTHER)
    decision = cluster.request(affinity=affinity).next(cluster.view(), 100)
    assert decision.decode.peer.worker_id == "d1"


def test_the_choices_of_a_request_share_their_workers():
    cluster = Cluster(worker("d0"), worker("d1"))
    affinity = Affinity()
    first, second = (cluster.request(affinity=affinity) for _ in range(2))
    assert cluster.next(first)[0].decode.peer.worker_id == "d0"
    cluster.workers["d0"] = worker("d0", assigned_tokens=1000)
    assert cluster.next(second)[0].decode.peer.worker_id == "d0"
    cluster.lose(first)
    assert affinity.decode == ""
    assert cluster.next(second)[0].decode.peer.worker_id == "d1"
