import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from coordinator.routing.admission import Admission
from engine.base.errors import Overloaded
from engine.base.holds import holds_as_json
from engine.telemetry.coordinator_metrics import CoordinatorMetrics


@pytest.fixture
def clock():
    return [0.0]


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def admission(clock, registry):
    return Admission(2, 100, CoordinatorMetrics(registry, "m"), lambda: clock[0])


def test_bound_on_requests(admission, registry):
    first = admission.admit()
    admission.admit()
    with pytest.raises(Overloaded):
        admission.admit()
    first.release()
    first.release()
    assert admission.num_requests == 1
    admission.admit()
    labels = {"model_name": "m", "reason": "requests"}
    assert registry.get_sample_value("diptych_admission_rejections_total", labels) == 1


def test_bound_on_tokens(admission):
    first, second = admission.admit(), admission.admit()
    first.set_tokens(60)
    with pytest.raises(Overloaded, match="60 prompt tokens"):
        second.set_tokens(41)
    second.set_tokens(40)
    first.release()
    second.release()
    assert (admission.num_requests, admission.num_tokens) == (0, 0)
    assert admission.idle.is_set()


def test_a_prompt_above_the_bound_comes_in_alone(admission):
    ticket = admission.admit()
    ticket.set_tokens(500)
    other = admission.admit()
    with pytest.raises(Overloaded):
        other.set_tokens(1)
    ticket.release()
    other.set_tokens(1)


def test_retry_after_follows_the_pace(admission, clock):
    def refused():
        with pytest.raises(Overloaded) as caught:
            admission.admit()
        return caught.value.retry_after_s

    tickets = [admission.admit(), admission.admit()]
    assert refused() == 1.0  # nothing is known yet
    for moment in (2.0, 4.0, 6.0, 8.0):  # one leaves each two seconds
        clock[0] = moment
        tickets[0].set_tokens(5)
        tickets.pop(0).release()
        tickets.append(admission.admit())
    clock[0] = 9.0
    assert refused() == pytest.approx(9.0 / 4)
    clock[0] = 500.0
    assert refused() == 1.0  # the rate of long ago shows nothing


def test_the_rate_is_that_of_answers_not_of_refusals(admission, clock):
    """Slow answers, and many requests that leave at once: a slot is a slow answer away."""
    for _ in range(50):
        admission.admit().release()  # its prompt was too long
    first, second = admission.admit(), admission.admit()
    first.set_tokens(10)
    second.set_tokens(10)
    clock[0] = 20.0
    first.release()
    third = admission.admit()
    clock[0] = 20.001
    with pytest.raises(Overloaded) as caught:
        admission.admit()
    assert 10.0 <= caught.value.retry_after_s <= 30.0
    second.release()
    third.release()


def test_those_refused_together_come_back_one_by_one(admission, clock):
    tickets = [admission.admit(), admission.admit()]
    tickets[0].set_tokens(5)
    clock[0] = 3.0
    tickets[0].release()
    admission.admit()
    delays = []
    for _ in range(30):
        with pytest.raises(Overloaded) as caught:
            admission.admit()
        delays.append(caught.value.retry_after_s)
    assert delays[:3] == pytest.approx([3.0, 6.0, 9.0])
    assert max(delays) == 60.0


def test_those_refused_together_before_any_answer_do_not_come_back_together(admission):
    admission.admit()
    admission.admit()
    delays = []
    for _ in range(4):
        with pytest.raises(Overloaded) as caught:
            admission.admit()
        delays.append(caught.value.retry_after_s)
    assert delays == pytest.approx([1.0, 1.5, 2.0, 2.5])  # two may be inside, a second for both


def test_holds_name_every_request_inside(admission, clock):
    first = admission.admit("one", deadline_s=60.0)
    clock[0] = 5.0
    second = admission.admit()
    first.set_tokens(70)
    first.activity = "waits for a worker"
    one, two = sorted(admission.holds(), key=lambda hold: -hold.age_s)
    assert (one.owner, one.num_tokens, one.age_s, one.deadline_s) == ("one", 70, 5.0, 55.0)
    assert "waits for a worker" in one.reason and not one.note
    assert two.deadline_s is None and two.note, "a missing deadline is explained"
    assert "tokenized" in two.reason
    assert json.loads(json.dumps(holds_as_json([one, two])))[0]["deadline_s"] == 55.0
    second.release()
    first.release()
    first.release()
    assert admission.holds() == []


class _Summed:
    """The retry hint by its definition: over all recent endings, one by one."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.endings: list[tuple[float, float, int, int]] = []
        self.promised_s = 0.0

    def retry_after_s(self, now: float, num_requests: int, num_tokens: int) -> float:
        self.endings = [ending for ending in self.endings if ending[0] >= now - 60.0]
        if not self.endings:
            share = max(num_requests / self.max_requests, num_tokens / self.max_tokens)
            promise_s = min(max(self.promised_s, now + 1.0), now + 60.0)
            self.promised_s = promise_s + share
            return promise_s - now
        span = max(now - max(now - 60.0, min(begun for _, begun, *_ in self.endings)), 1e-3)
        wait = num_requests * span / sum(count for _, _, count, _ in self.endings)
        if num_tokens:
            wait = max(wait, num_tokens * span / max(1, sum(n for *_, n in self.endings)))
        self.promised_s = min(max(self.promised_s, now) + wait, now + 60.0)
        return max(self.promised_s - now, 0.1)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["admit", "release", "refuse"]),
            st.integers(0, 300),  # tenths of a second that pass before it
            st.integers(1, 4),
            st.integers(1, 60),
        ),
        max_size=60,
    )
)
def test_the_retry_hint_is_what_all_recent_endings_sum_up_to(steps):
    now = [0.0]
    metrics = CoordinatorMetrics(CollectorRegistry(), "m")
    admission = Admission(1000, 100_000, metrics, lambda: now[0])
    oracle = _Summed(1000, 100_000)
    inside = []
    for action, tenths, count, tokens in steps:
        now[0] += tenths / 10
        if action == "admit":
            ticket = admission.admit(num_requests=count)
            ticket.set_tokens(tokens)
            inside.append(ticket)
        elif action == "release" and inside:
            ticket = inside.pop(tokens % len(inside))
            ending = (now[0], ticket.admitted_s, ticket.num_requests, ticket.num_tokens)
            oracle.endings.append(ending)
            ticket.release()
        elif inside:
            with pytest.raises(Overloaded) as caught:
                admission.admit(num_requests=1000)
            excess = admission.num_requests  # all that is inside has to leave first
            assert caught.value.retry_after_s == oracle.retry_after_s(now[0], excess, 0)
            with pytest.raises(Overloaded) as caught:
                ticket = admission.admit(num_requests=0)
                ticket.set_tokens(100_000)
            ticket.release()
            excess = admission.num_tokens
            assert caught.value.retry_after_s == oracle.retry_after_s(now[0], 0, excess)


def test_a_refusal_costs_the_same_after_many_endings(admission, clock):
    for _ in range(100_000):
        ticket = admission.admit()
        ticket.set_tokens(1)
        ticket.release()
    admission.admit()
    admission.admit()
    began = time.process_time()
    for _ in range(100):
        with pytest.raises(Overloaded):
            admission.admit()
    assert time.process_time() - began < 1.0  # 100 sums over all endings take 2 s and more
