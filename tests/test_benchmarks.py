"""Sums that benchmarks make of what they saw."""

from benchmarks.chaos import ROT, Event, count_steps_lost


def test_steps_lost_to_kills_and_to_rot_are_told_apart() -> None:
    events = [
        Event("kill a rank", 1.0, step=10, resumed_at=8),
        Event("503", 2.0, step=12),
        Event(ROT, 3.0, step=20, resumed_at=15),
        Event("kill all", 4.0, step=30, resumed_at=27),
    ]
    assert count_steps_lost(events) == {"steps_lost_max": 5, "steps_lost_max_kill": 3, "steps_lost_max_rot": 5}
    assert count_steps_lost(events[:2]) == {"steps_lost_max": 2, "steps_lost_max_kill": 2, "steps_lost_max_rot": 0}
