"""Goodput adds up: every second of the wall lies in one bucket, over kills, preemptions and restarts."""

from typing import Any

import pytest

from monitoring.goodput import BUCKETS, measure_goodput


def start(began_s: float, *, ready_s: float, last_sign_s: float, lost: tuple[int, float] = (0, 0.0)) -> dict[str, Any]:
    return {"event": "start", "began_s": began_s, "time_s": ready_s, "last_sign_s": last_sign_s,
            "lost_steps": lost[0], "lost_seconds": lost[1]}  # fmt: skip


def step(time_s: float, *, seconds: float = 2.0, data: float = 0.5) -> dict[str, Any]:
    return {"time_s": time_s, "step_seconds": seconds, "data_seconds": data}


def test_an_unbroken_run_is_divided_up() -> None:
    goodput = measure_goodput(
        [start(0, ready_s=10, last_sign_s=0)],
        [step(12), step(14), step(17)],
        [{"time_s": 15, "stall_seconds": 0.75}],
        [{"time_s": 20, "seconds": 3.0}],
    )
    expected = {
        "init": 10,
        "productive": 3 * 1.5,
        "data_wait": 3 * 0.5,
        "checkpoint": 0.75,
        "evaluation": 3,
        "lost": 0,
        "down": 0,
    }
    assert goodput.seconds == {**expected, "other": pytest.approx(20 - sum(expected.values()))}
    assert goodput.wall_s == 20
    assert goodput.ratio == 4.5 / 20
    assert (goodput.starts, goodput.preemptions, goodput.lost_steps) == (1, 0, 0)


def test_a_kill_costs_the_steps_since_the_checkpoint_and_the_time_until_the_next_start() -> None:
    goodput = measure_goodput(
        # the first start made steps until 30, two of them after its checkpoint; the second began at 50 and was ready at 55
        [start(0, ready_s=10, last_sign_s=0), start(50, ready_s=55, last_sign_s=30, lost=(2, 8.0))],
        [step(20, seconds=10, data=0), step(65, seconds=10, data=0)],
        [],
        [],
    )
    assert goodput.seconds["down"] == 50 - 30
    assert goodput.seconds["lost"] == 8
    assert goodput.seconds["init"] == 10 + 5
    assert goodput.seconds["productive"] == 20
    assert goodput.wall_s == 65
    assert goodput.lost_steps == 2


def test_a_preemption_is_counted_and_is_a_sign_of_life() -> None:
    ended = {"event": "preempted", "step": 3, "time_s": 40.0}
    goodput = measure_goodput([start(0, ready_s=10, last_sign_s=0), ended], [], [], [])
    assert goodput.preemptions == 1
    assert goodput.wall_s == 40


def test_of_a_run_that_never_started_nothing_is_known() -> None:
    goodput = measure_goodput([], [], [], [])
    assert goodput.seconds == dict.fromkeys(BUCKETS, 0.0)
    assert goodput.ratio == 0
