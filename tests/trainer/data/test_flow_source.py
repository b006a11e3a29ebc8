"""Consecutive images and their flow: which pairs there are, and that flow moves with the window as pixels do."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.data.dataroot import FRAMES, HEIGHT, WIDTH, YAWS, make_tables, read_ramp, write_dataroot
from trainer.config.data import AugmentConfig, ClipConfig, NuscenesData
from trainer.data.build import build_source
from trainer.data.flow_source import FLOW_FIELDS, FlowSource, move_flow
from trainer.data.ground_truth import GroundTruth, ground_truth_path, save_ground_truth
from trainer.data.nuscenes import build_index
from trainer.data.transforms import place_window
from trainer.errors import ClipError, DataError

SPLITS = {"train": ["scene-0001"], "val": ["scene-0002"]}


def ramp_flow(width: int, height: int) -> np.ndarray:
    """A flow that says where it was read: to the right by u / 4, down by v / 2."""
    v, u = np.mgrid[:height, :width] + 0.5
    return np.stack([u / 4, v / 2], axis=-1).astype(np.float32)


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> NuscenesData:
    """The hand-made drive without one image of CAM_BACK, with the flow of a ramp beside every image, and its negative back."""
    folder = tmp_path_factory.mktemp("moving")
    tables = make_tables()
    missing = f"scene-0001 CAM_BACK {5:03d}"
    tables["sample_data"] = [row for row in tables["sample_data"] if row["token"] != missing]
    root = write_dataroot(folder / "root", tables, SPLITS)
    nothing = np.zeros((HEIGHT, WIDTH))
    ramp = ramp_flow(WIDTH, HEIGHT)
    truth = GroundTruth(nothing.astype(np.float32), ramp, -ramp, nothing.astype(np.int64))
    for row in tables["sample_data"]:
        if row["fileformat"] == "jpg":
            save_ground_truth(root, row["filename"], truth)
    clip = ClipConfig(frames=1, height_px=HEIGHT // 2, width_px=WIDTH // 2)
    config = NuscenesData(root=root, cameras=tuple(YAWS), clip=clip, index_folder=folder / "index")
    build_index(config)
    return config


def open_flow(config: NuscenesData, *, augment: bool = False) -> FlowSource:
    source = build_source(config, "train", FLOW_FIELDS, augment=augment)
    assert isinstance(source, FlowSource)
    return source


def test_pairs_are_an_image_and_the_next_one_that_comes_in_time(moving: NuscenesData) -> None:
    source = open_flow(moving)
    assert len(source) == 2 * (FRAMES - 1) + (FRAMES - 3)  # without image 5 of a camera, 4 has no next one
    rows = np.stack([source.rows, source.rows + 1])
    first_us, next_us = source.index.timestamp_us(rows)
    assert set(next_us - first_us) == {250_000}
    camera = source.index.columns["image_camera"][rows]
    assert (camera[0] == camera[1]).all()


def test_a_sample_has_both_images_and_the_flow_there_and_back_at_their_size(moving: NuscenesData) -> None:
    sample = open_flow(moving).load(0, np.random.default_rng(0))
    assert sample.keys() == FLOW_FIELDS
    assert sample["consecutive_images"].shape == (2, 1, 3, HEIGHT // 2, WIDTH // 2)
    assert sample["flow_px"].shape == (2, HEIGHT // 2, WIDTH // 2, 2)
    np.testing.assert_array_equal(sample["flow_px"][1], -sample["flow_px"][0])
    assert sample["flow_px"].dtype == np.float32


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_flow_moves_with_a_window_as_the_pixels_of_the_picture_do(moving: NuscenesData, is_mirrored: bool) -> None:
    flip = AugmentConfig(crop_share=(0.5, 0.75), colour_jitter=0, flip_probability=float(is_mirrored))
    source = replace(open_flow(moving), augment=flip)
    sample = source.load(3, np.random.default_rng(1))
    colours = sample["consecutive_images"][0, 0].transpose(1, 2, 0)
    source_px = read_ramp(colours, WIDTH, HEIGHT)  # where each pixel was in the source, to half a pixel
    # A crop of share s at half size: an output pixel is 2 s source pixels wide.
    scale = np.abs(np.diff(source_px[:, 4:-4, 0], axis=1)).mean()
    expected = source_px * (1 / 4, 1 / 2) / scale * (-1 if is_mirrored else 1, 1)
    inner = (slice(3, -3), slice(3, -3))
    np.testing.assert_allclose(sample["flow_px"][0][inner], expected[inner], atol=1.0)


def test_a_window_at_whole_scale_takes_the_flow_as_it_is_and_a_mirror_turns_it() -> None:
    flow = ramp_flow(8, 6)
    window = place_window((8, 6), (8, 6))
    np.testing.assert_array_equal(move_flow(flow, window), flow)
    mirrored = move_flow(flow, replace(window, is_mirrored=True))
    np.testing.assert_array_equal(mirrored, flow[:, ::-1] * (-1, 1))
    halved = move_flow(flow, place_window((8, 6), (4, 3)))
    np.testing.assert_array_equal(halved, flow[1::2, 1::2] / 2)


def test_what_has_no_flow_stays_without(moving: NuscenesData) -> None:
    flow = ramp_flow(8, 6)
    flow[2, 3] = np.nan
    moved = move_flow(flow, place_window((8, 6), (8, 6)))
    assert np.isnan(moved).all(-1).sum() == 1


def test_a_missing_file_costs_the_clip_alone(moving: NuscenesData) -> None:
    source = open_flow(moving)
    image = source.index.columns["image_file"][source.rows[7]].decode()
    path = ground_truth_path(Path(source.index.root), image)
    kept = path.read_bytes()
    try:
        path.write_bytes(kept[:50])
        with pytest.raises(ClipError, match=r"the ground truth of samples/.* cannot be read"):
            source.load(7, np.random.default_rng(0))
    finally:
        path.write_bytes(kept)


def test_a_dataroot_without_ground_truth_is_refused(data: NuscenesData) -> None:
    with pytest.raises(DataError, match=r"flow was asked for of split train .* no dense ground truth .* another task"):
        build_source(data, "train", FLOW_FIELDS, augment=False)
