"""What an adapter may get wrong about a drive, told before anything is packed."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from trainer.data.shards.checking import check_drive, find_skewed_clocks
from trainer.data.shards.recording import NO_SWEEPS, Drive, Images
from trainer.errors import DataError

COUNT = 6


def good_images() -> Images:
    return Images(
        sensor=("left", "right") * 3,
        file=tuple(f"{number}.jpg" for number in range(COUNT)),
        timestamp_us=np.repeat(np.arange(3) * 100_000, 2),
        is_key_frame=np.ones(COUNT, dtype=bool),
        ego_from_sensor=np.tile(np.eye(4), (COUNT, 1, 1)),
        world_from_ego=np.tile(np.eye(4), (COUNT, 1, 1)),
        pix_from_cam=np.tile(np.array([[30.0, 0, 32], [0, 30, 18], [0, 0, 1]]), (COUNT, 1, 1)),
        size_px=np.tile([64, 36], (COUNT, 1)),
    )


def drive_of(**changes: Any) -> Drive:
    return Drive("one", ("train",), replace(good_images(), **changes), NO_SWEEPS)


def drive_with(field: str, value: object) -> Drive:
    """Past the shapes that tests check and a user's adapter does not."""
    drive = drive_of()
    object.__setattr__(drive.images, field, value)
    return drive


def changed(array: np.ndarray, place: tuple[int, ...], value: float) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


def test_a_good_drive_passes(caplog: pytest.LogCaptureFixture) -> None:
    check_drive(drive_of())
    assert not caplog.records


GOOD = good_images()
FAULTS: dict[str, tuple[Callable[[], Drive], str]] = {
    "a name with a slash": (lambda: replace(drive_of(), name="a/b"), "without /"),
    "too few sensors": (lambda: drive_of(sensor=("left",)), "names 6 image files and 1 sensors"),
    "too few times": (lambda: drive_with("timestamp_us", GOOD.timestamp_us[:5]), r"timestamp_us has shape \(5,\)"),
    "a pose that is not finite": (
        lambda: drive_of(world_from_ego=changed(GOOD.world_from_ego, (3, 0, 3), np.nan)),
        r"not finite, .* 3\.jpg",
    ),
    "a pose that scales": (
        lambda: drive_of(world_from_ego=GOOD.world_from_ego * [1, 1, 1, 1.0] * 2),
        "world_from_ego is no rotation",
    ),
    "a mounting that mirrors": (
        lambda: drive_of(ego_from_sensor=changed(GOOD.ego_from_sensor, (2, 0, 0), -1)),
        r"first of 2\.jpg",
    ),
    "an image without size": (lambda: drive_of(size_px=changed(GOOD.size_px, (4, 1), 0)), r"positive size, first of 4\.jpg"),
    "a file named twice": (lambda: drive_of(file=("0.jpg",) * COUNT), "more than once"),
    "times in milliseconds": (lambda: drive_of(timestamp_us=GOOD.timestamp_us // 1000), "timestamp_us is in microseconds"),
    "a time taken twice": (lambda: drive_of(timestamp_us=np.zeros(COUNT, np.int64)), "two images of one sensor at the same time"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_meant_is_told(fault: str) -> None:
    make, sentence = FAULTS[fault]
    with pytest.raises(DataError, match=sentence):
        check_drive(make())


def test_a_single_instant_of_sensors_that_fire_in_turn_is_no_clock_that_is_off(caplog: pytest.LogCaptureFixture) -> None:
    instant = Images(**{field.name: getattr(GOOD, field.name)[:2] for field in fields(GOOD)})
    check_drive(Drive("one", (), replace(instant, timestamp_us=np.array([0, 50_000])), NO_SWEEPS))
    assert not caplog.records


def test_lists_do_as_well_as_arrays_and_are_the_same_drive() -> None:
    listed = {field.name: np.asarray(getattr(GOOD, field.name)).tolist() for field in fields(GOOD)}
    plain = Images.__new__(Images)
    for name, value in listed.items():
        object.__setattr__(plain, name, value)
    plain.__post_init__()
    assert replace(drive_of(), images=plain).fingerprint == drive_of().fingerprint


def test_a_clock_that_is_off_is_told_and_does_not_stop_the_packing(caplog: pytest.LogCaptureFixture) -> None:
    times = GOOD.timestamp_us + np.tile([0, 3_600_000_000], 3)
    drive = drive_of(timestamp_us=times)
    assert find_skewed_clocks(drive) == {"left": pytest.approx(3599.8), "right": pytest.approx(3599.8)}
    check_drive(drive)
    assert all("its clock is off" in record.message for record in caplog.records) and len(caplog.records) == 2
