import json

import pytest
from prometheus_client import CollectorRegistry

from coordinator.admission import Admission
from engine.errors import Overloaded
from engine.telemetry.holds import shown
from engine.telemetry.metrics import CoordinatorMetrics


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
    for moment in (2.0, 4.0, 6.0, 8.0):  # one leaves every two seconds
        clock[0] = moment
        tickets[0].set_tokens(5)
        tickets.pop(0).release()
        tickets.append(admission.admit())
    clock[0] = 9.0
    assert refused() == pytest.approx(9.0 / 4)
    clock[0] = 500.0
    assert refused() == 1.0  # the pace of long ago tells nothing


def test_the_pace_is_that_of_answers_not_of_refusals(admission, clock):
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
    first.doing = "waits for a worker"
    one, two = sorted(admission.holds(), key=lambda hold: -hold.age_s)
    assert (one.owner, one.num_tokens, one.age_s, one.deadline_s) == ("one", 70, 5.0, 55.0)
    assert "waits for a worker" in one.reason and not one.note
    assert two.deadline_s is None and two.note, "a missing deadline is explained"
    assert "tokenized" in two.reason
    assert json.loads(json.dumps(shown([one, two])))[0]["deadline_s"] == 55.0
    second.release()
    first.release()
    first.release()
    assert admission.holds() == []
