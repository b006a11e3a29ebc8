"""Sums that benchmarks make of what they saw."""

import io

import numpy as np
import pytest
from PIL import Image

from benchmarks.chaos import ROT, Event, count_steps_lost
from benchmarks.data import compare, compare_bytes, summarise
from benchmarks.readers import HEIGHT_PX, WIDTH_PX, decode_scaled, decode_with_opencv, decode_with_pillow
from trainer.data.shards.reading import Span


def test_steps_lost_to_kills_and_to_rot_are_told_apart() -> None:
    events = [
        Event("kill a rank", 1.0, step=10, resumed_at=8),
        Event("503", 2.0, step=12),
        Event(ROT, 3.0, step=20, resumed_at=15),
        Event("kill all", 4.0, step=30, resumed_at=27),
    ]
    assert count_steps_lost(events) == {"steps_lost_max": 5, "steps_lost_max_kill": 3, "steps_lost_max_rot": 5}
    assert count_steps_lost(events[:2]) == {"steps_lost_max": 2, "steps_lost_max_kill": 2, "steps_lost_max_rot": 0}


def test_a_reader_that_is_not_installed_leaves_its_ratios_empty() -> None:
    turns = {"shards": (300.0, 500.0, 400.0), "pil": (90.0, 100.0, 110.0), "opencv": (200.0,), "ceiling": (500.0,)}
    figures = {name: summarise([{"images_per_s": rate} for rate in rates]) for name, rates in turns.items()}
    assert compare(figures, "images_per_s") == {
        "shards_over_pil": 4.0,
        "shards_over_opencv": 2.0,
        "shards_over_streaming": None,
        "over_decode_ceiling": 0.8,
        "s3_over_local": None,
    }


def test_bytes_are_compared_over_all_clips_and_for_the_worst_one() -> None:
    sizes = np.array([10, 10, 20, 20])

    def fetch_what_lies_between(rows: np.ndarray) -> list[Span]:
        first, last = rows.min(), rows.max()
        return [Span(0, int(sizes[:first].sum()), int(sizes[first : last + 1].sum()))]

    clips = np.array([[[0, 1]], [[1, 3]]])  # the second one brings 20 bytes along that nobody asked for
    compared = compare_bytes(fetch_what_lies_between, sizes, clips)
    assert compared == {"over_useful": pytest.approx(70 / 50), "worst": pytest.approx(50 / 30), "requests": 1}


def test_every_way_of_decoding_shows_the_same_picture() -> None:
    across, down = np.meshgrid(np.linspace(0, 255, 1600), np.linspace(0, 255, 900))
    picture = np.stack([across, down, (across + down) / 2], axis=-1).astype(np.uint8)
    Image.fromarray(picture).save(file := io.BytesIO(), "JPEG", quality=92)
    whole = decode_with_pillow(file.getvalue()).astype(int)
    assert whole.shape == (HEIGHT_PX, WIDTH_PX, 3)
    assert np.abs(decode_with_opencv(file.getvalue())[..., ::-1] - whole).mean() < 2
    assert np.abs(decode_scaled(file.getvalue()) - whole).mean() < 2
