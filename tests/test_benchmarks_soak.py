"""What the soak makes of what it saw."""

from benchmarks.soak import Event, Ledger, Look, Wait, compare_thirds, find_longest_waits
from benchmarks.soak_reader import Arrived, Sighting

DUE = [[Sighting(1, "a"), Sighting(2, "b")], [Sighting(3, "c"), Sighting(4, "d")]]


def keep_ledger(*steps: list[Sighting], replaced: tuple[str, ...] = ()) -> dict[str, int]:
    ledger = Ledger()
    for arrived, due in zip(steps, DUE, strict=True):
        ledger.take(Arrived(tuple(arrived), replaced, 0.0), due)
    return ledger.figures


def test_steps_that_are_due_leave_nothing_to_complain_about() -> None:
    assert keep_ledger(*DUE) == {"steps": 2, "samples": 4, "wrong_bytes": 0, "lost": 0, "repeated": 0, "replaced": 0}


def test_a_changed_byte_a_repeated_step_and_a_replaced_clip_are_told_apart() -> None:
    changed = keep_ledger(DUE[0], [Sighting(3, "other"), DUE[1][1]])
    assert (changed["wrong_bytes"], changed["lost"], changed["repeated"]) == (1, 0, 0)
    again = keep_ledger(DUE[0], DUE[0])
    assert (again["wrong_bytes"], again["lost"], again["repeated"]) == (2, 2, 2)
    assert keep_ledger(*DUE, replaced=("one",))["replaced"] == 2


def test_a_wait_is_put_down_to_the_fault_before_it_and_a_first_batch_to_none() -> None:
    events = [Event("503", 1.0), Event("stall", 5.0)]
    waits = [Wait(0.5, 9.0, False), Wait(2.0, 1.0, False), Wait(6.0, 4.0, False), Wait(7.0, 8.0, True), Wait(8.0, 3.0, False)]
    assert find_longest_waits(events, waits) == {"503": 1.0, "stall": 4.0}


def test_the_thirds_are_those_of_the_reader_that_grew_most() -> None:
    steady = [Look(0.0, 1, 100.0 + second, 50) for second in range(9)]
    growing = [Look(0.0, 2, 100.0 + second, 10 + second) for second in range(9)]
    cold = [Look(0.0, 3, float(second), 1000 * second) for second in range(9)]
    assert compare_thirds([*steady, *growing, *cold]) == (12, 18)
