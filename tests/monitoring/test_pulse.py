"""A pulse knows how long steps usually take, and has patience with what is no step."""

import pytest

from monitoring.pulse import Pulse


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pulse(clock: Clock) -> Pulse:
    return Pulse(factor=10, least_s=5, grace_s=100, clock=clock)


def take_steps(pulse: Pulse, *, seconds: float) -> None:
    for step in (1, 2, 3):
        pulse.tell_step(step, seconds)


def test_a_process_is_live_but_not_ready_before_its_first_step(pulse: Pulse, clock: Clock) -> None:
    clock.now = 99
    assert pulse.why_hung() is None
    assert pulse.why_not_ready() == "no step is finished yet"
    clock.now = 101
    assert pulse.why_hung() == "start after step 0 has not ended for 101 s, and 100 s are allowed"


def test_a_step_may_last_a_multiple_of_the_median(pulse: Pulse, clock: Clock) -> None:
    take_steps(pulse, seconds=2)
    clock.now = 10 * 2
    assert pulse.why_not_ready() is None
    clock.now += 1
    assert pulse.why_not_ready() == pulse.why_hung() == "step after step 3 has not ended for 21 s, and 20 s are allowed"
    assert pulse.why_hung(patience=2) is None


def test_short_steps_have_a_floor(pulse: Pulse, clock: Clock) -> None:
    take_steps(pulse, seconds=0.01)
    clock.now = 5
    assert pulse.why_hung() is None
    clock.now = 6
    assert pulse.why_hung()


def test_what_is_no_step_has_grace_and_begins_anew(pulse: Pulse, clock: Clock) -> None:
    take_steps(pulse, seconds=1)
    with pulse.during("evaluation"):
        clock.now = 99
        assert pulse.why_hung() is None
        clock.now = 101
        assert str(pulse.why_hung()).startswith("evaluation after step 3")
    assert pulse.why_hung() is None


def test_who_was_stopped_himself_is_forgiven(pulse: Pulse, clock: Clock) -> None:
    take_steps(pulse, seconds=1)
    clock.now = 1000
    pulse.forgive()
    assert pulse.why_hung() is None
