"""What benchmarks of SimIPU measure: retrieval among dealt pairs, and the way of real points to their pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks.simipu import POOL, deal_pools, search
from benchmarks.simipu_keyframe import find_boxes, is_on_image, measure_hulls, measure_matching, project, read_keyframe
from trainer.config.data import SURROUND_CAMERAS
from trainer.data.source import Sample


def test_pools_are_full_and_hold_no_pair_twice() -> None:
    pools = deal_pools(3 * POOL + 5)
    assert pools.shape == (3, POOL)
    assert len(np.unique(pools)) == 3 * POOL and pools.max() < 3 * POOL + 5


def test_who_sees_the_point_itself_finds_it_and_who_guesses_is_at_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = [F.normalize(torch.randn(POOL, 64, generator=generator), dim=-1) for _ in range(41)]
    assert search(draw[0], draw[0])["top1"] == 1.0
    guesses = [search(image, draw[0]) for image in draw[1:]]
    # 40 x 256 guesses, each right in 1 of 256: 40 hits, with a deviation of 6.3.
    assert sum(POOL * guess["top1"] for guess in guesses) == pytest.approx(40, abs=4 * 6.3)
    assert sum(POOL * guess["top5"] for guess in guesses) == pytest.approx(200, abs=4 * 14.1)
    assert all(guess["gain_nats"] < 0 for guess in guesses)


@pytest.fixture(scope="module")
def keyframe(keyframe_dataroot: Path) -> Sample:
    return read_keyframe(keyframe_dataroot)


def test_real_points_in_an_annotated_box_fall_within_its_hull_on_every_image(keyframe: Sample, keyframe_dataroot: Path) -> None:
    boxes = list(find_boxes(keyframe_dataroot, keyframe))
    figures = measure_hulls(boxes)
    assert figures["boxes_seen"] > 40 and figures["points_seen"] > 400
    assert {box.camera for box in boxes} == set(range(len(SURROUND_CAMERAS)))
    assert figures["inside_hull"] == 1.0
    moved = keyframe["pix_from_lidar"] + np.array([[0, 0, 20], [0, 0, 0], [0, 0, 0]]) @ keyframe["pix_from_lidar"]
    shifted = measure_hulls(list(find_boxes(keyframe_dataroot, {**keyframe, "pix_from_lidar": moved})))
    assert shifted["inside_hull"] < 0.9  # the same check sees a projection that is 20 pixels off


def test_centres_of_a_real_sweep_match_and_every_camera_has_pairs(keyframe: Sample) -> None:
    figures = measure_matching(keyframe, "lean")
    free, gated = figures["match_distance_m"], figures["gated_distance_m"]
    assert free["median"] < free["p75"] < free["p99"] and free["median"] < 1 < free["p99"]
    assert gated["median"] <= free["median"] and gated["p99"] <= 1
    assert 0.5 < figures["matched"] < 1
    assert all(pairs >= 20 for pairs in figures["pairs_of_cameras"].values())


def test_most_points_of_a_real_sweep_are_on_some_image(keyframe: Sample) -> None:
    seen = np.stack([is_on_image(*project(keyframe, camera)) for camera in range(len(SURROUND_CAMERAS))])
    far = np.linalg.norm(keyframe["points_lidar"][:, :3], axis=-1) > 3
    assert seen[:, far].any(axis=0).mean() > 0.5
    assert (seen.sum(axis=0) <= 2).all()  # fields of view of neighbours overlap, of others do not
