"""The circuit breaker, as scripts over time."""

from hypothesis import given
from hypothesis import strategies as st

from extproc.circuit import Circuit, CircuitLimits, CircuitState

LIMITS = CircuitLimits(failure_threshold=3, success_threshold=2, timeout_s=10.0, window_s=60.0)


def test_opens_after_failures_in_a_row():
    circuit = Circuit(LIMITS)
    for failed in (True, True, False, True, True):
        circuit.ended(failed, 0.0)
        assert circuit.allows(0.0)
    circuit.ended(True, 0.0)
    assert circuit.state is CircuitState.OPEN
    assert not circuit.allows(9.9)


def test_old_failures_do_not_count():
    circuit = Circuit(LIMITS)
    circuit.ended(True, 0.0)
    circuit.ended(True, 1.0)
    circuit.ended(True, 61.0)
    assert circuit.state is CircuitState.CLOSED
    circuit.ended(True, 62.0)
    circuit.ended(True, 63.0)
    assert circuit.state is CircuitState.OPEN


def opened() -> Circuit:
    circuit = Circuit(LIMITS)
    for _ in range(3):
        circuit.ended(True, 0.0)
    return circuit


def test_half_open_tries_one_at_a_time_and_closes_after_good_ones():
    circuit = opened()
    assert circuit.allows(10.0)
    assert circuit.state is CircuitState.HALF_OPEN
    circuit.sent()
    assert not circuit.allows(11.0)
    circuit.ended(False, 12.0)
    assert circuit.state is CircuitState.HALF_OPEN
    circuit.sent()
    circuit.ended(False, 13.0)
    assert circuit.state is CircuitState.CLOSED


def test_half_open_opens_again_on_a_failure():
    circuit = opened()
    assert circuit.allows(10.0)
    circuit.sent()
    circuit.ended(True, 11.0)
    assert circuit.state is CircuitState.OPEN
    assert not circuit.allows(20.9)
    assert circuit.allows(21.0)


def test_a_trial_that_tells_nothing_leaves_room_for_the_next():
    circuit = opened()
    assert circuit.allows(10.0)
    circuit.sent()
    circuit.ended(None, 11.0)
    assert circuit.state is CircuitState.HALF_OPEN
    assert circuit.allows(11.0)


EVENTS = st.lists(st.tuples(st.sampled_from(["sent", True, False, None]), st.floats(0, 30)), max_size=60)


@given(EVENTS)
def test_it_always_comes_back(events):
    """Whatever happened, after the time-out something may be sent once nothing is under way."""
    circuit = Circuit(LIMITS)
    now_s = 0.0
    for event, passed_s in events:
        now_s += passed_s
        if event == "sent":
            if circuit.allows(now_s):
                circuit.sent()
        else:
            circuit.ended(event, now_s)
    circuit.ended(None, now_s)
    assert circuit.allows(now_s + LIMITS.timeout_s + 1e-6)  # a sum of floats may fall short by a bit
