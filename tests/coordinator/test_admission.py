import pytest
from prometheus_client import CollectorRegistry

from coordinator.admission import Admission
from engine.errors import Overloaded
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
        tickets.pop(0).release()
        tickets.append(admission.admit())
    clock[0] = 10.0
    assert refused() == pytest.approx(2.0)
    clock[0] = 500.0
    assert refused() == 1.0  # the pace of long ago tells nothing
