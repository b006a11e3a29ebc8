"""The source of pairs: whole samples, the same for the same stream, with intrinsics and poses that fit the pixels."""

import dataclasses
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.data.dataroot import FRAMES, HEIGHT, WIDTH, YAWS, read_ramp
from trainer.config.data import NuscenesData
from trainer.data.build import build_source
from trainer.data.clips import read_clip
from trainer.data.frames import find_frames
from trainer.data.nuscenes import build_index
from trainer.data.pair_source import PAIR_FIELDS, PairSource, _Views
from trainer.data.transforms import place_window
from trainer.errors import ClipError


def stream(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def change(data: NuscenesData, **sections: dict[str, Any]) -> NuscenesData:
    changed = {name: getattr(data, name).model_copy(update=update) for name, update in sections.items()}
    return data.model_copy(update=changed)


def source_of(data: NuscenesData, *, augment: bool = True) -> PairSource:
    source = build_source(data, "train", PAIR_FIELDS, augment=augment)
    assert isinstance(source, PairSource)
    return source


@pytest.fixture(scope="module")
def plain(data: NuscenesData) -> PairSource:
    return source_of(data)


def assert_same(left: Any, right: Any) -> None:
    assert left.keys() == right.keys()
    for name, array in left.items():
        np.testing.assert_array_equal(array, right[name], err_msg=name)


@pytest.mark.parametrize("frames", [1, 3])
def test_a_sample_has_every_field_it_offers_in_the_documented_shape(data: NuscenesData, frames: int) -> None:
    source = source_of(change(data, clip={"frames": frames, "spacing_s": 0.25}))
    sample = source.load(5, stream())
    described = {name: (array.dtype.name, array.shape) for name, array in sample.items()}
    assert described == {
        "target_images": ("uint8", (frames, 1, 3, 16, 32)),
        "reference_images": ("uint8", (frames, 1, 3, 16, 32)),
        "target_colours": ("float32", (3,)),
        "reference_colours": ("float32", (3,)),
        "scene": ("int64", ()),
        "target_pix_from_cam": ("float32", (frames, 1, 3, 3)),
        "reference_pix_from_cam": ("float32", (frames, 1, 3, 3)),
        "reference_from_target": ("float32", (4, 4)),
    }
    assert set(sample) == source.offers
    assert all(array.flags.c_contiguous for array in sample.values())


def test_the_same_stream_gives_the_same_sample_and_another_one_another(data: NuscenesData) -> None:
    source = source_of(data)
    assert_same(source.load(3, stream(7)), source.load(3, stream(7)))
    assert not np.array_equal(source.load(3, stream(7))["target_images"], source.load(3, stream(8))["target_images"])


def test_a_pickled_source_is_small_and_gives_the_same_samples(data: NuscenesData) -> None:
    source = source_of(data)
    expected = source.load(3, stream(7))
    pickled = pickle.dumps(source)
    assert len(pickled) < 10_000
    assert_same(pickle.loads(pickled).load(3, stream(7)), expected)


def test_every_sample_can_be_read_and_has_its_own_name(data: NuscenesData) -> None:
    source = source_of(data)
    names = {source.name(index) for index in range(len(source))}
    assert len(names) == len(source) > FRAMES
    assert all(source.load(index, stream(index))["scene"] == 0 for index in range(len(source)))
    assert source.name(0) == "scene-0001 1500000000000000 CAM_FRONT"


def test_cross_camera_share_is_the_share_where_both_kinds_are_there(data: NuscenesData) -> None:
    source = source_of(change(data, pairs={"cross_camera_share": 0.25}))
    middle = next(index for index in range(len(source)) if all(map(len, source.candidates(index))))
    rng, camera = stream(), source.anchor(middle) % len(YAWS)
    drawn = [source._draw_candidate(middle, rng) for _ in range(2000)]
    across = np.mean([candidate % len(YAWS) != camera for candidate in drawn])
    assert across == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 2000))
    assert set(drawn) == set(np.concatenate(source.candidates(middle)).tolist())


def test_a_clip_with_one_kind_of_partner_takes_that_one(data: NuscenesData) -> None:
    for share in (0.0, 1.0):
        source = source_of(change(data, pairs={"cross_camera_share": share}))
        for index in range(len(source)):
            anchor, candidate = source.anchor(index), source._draw_candidate(index, stream(index))
            assert (anchor % len(YAWS) == candidate % len(YAWS)) == (share == 0)


@settings(max_examples=50)
@given(st.integers(0, 30), st.integers(0, 2**32 - 1), st.booleans())
def test_pixels_are_where_the_intrinsics_of_the_sample_say(
    data: NuscenesData, plain: PairSource, index: int, seed: int, flips: bool
) -> None:
    augment = data.augment.model_copy(update={"flip_probability": float(flips), "colour_jitter": 0.0})
    sample = dataclasses.replace(plain, augment=augment).load(index, stream(seed))
    pix_from_cam = np.array([[32.0, 0, 32], [0, 32, 18], [0, 0, 1]])  # of every camera of the drive
    for view in ("target", "reference"):
        moved = sample[f"{view}_pix_from_cam"][0, 0]
        assert (moved[0, 0] < 0) == flips
        v, u = np.mgrid[4:13, 4:29] + 0.5  # away from the edges
        rays_cam = np.linalg.inv(moved) @ np.stack([u.ravel(), v.ravel(), np.ones(u.size)])
        expected = (pix_from_cam @ rays_cam)[:2].T
        pixels = np.moveaxis(sample[f"{view}_images"][0, 0], 0, -1)[4:13, 4:29].reshape(-1, 3)
        assert np.abs(read_ramp(pixels, WIDTH, HEIGHT) - expected).max() < 1.2


def test_relative_pose_takes_a_point_from_the_target_camera_to_the_reference_camera(data: NuscenesData) -> None:
    source = source_of(change(data, pairs={"cross_camera_share": 1.0}))
    front = next(index for index in range(len(source)) if source.name(index).endswith("CAM_FRONT"))
    reference_from_target = source.load(front, stream())["reference_from_target"]
    # The other camera looks 45 degrees to the left from the same place, 20 ms and 6 cm of driving later.
    ahead = reference_from_target @ [0, 0, 10, 1]
    np.testing.assert_allclose(ahead[:3], [10 / np.sqrt(2), 0, 10 / np.sqrt(2)], atol=0.1)
    np.testing.assert_allclose(reference_from_target[:3, :3] @ reference_from_target[:3, :3].T, np.eye(3), atol=1e-6)
    assert np.linalg.norm(reference_from_target[:3, 3]) == pytest.approx(0.06, abs=0.01)


def test_without_augmentation_windows_are_centred_and_colours_are_as_in_the_file(data: NuscenesData) -> None:
    source = source_of(data, augment=False)
    first, second = source.load(0, stream(1)), source.load(0, stream(2))
    np.testing.assert_array_equal(first["target_images"], second["target_images"])
    # 32 x 16 from 64 x 36: the largest window is 64 x 32, two rows down.
    expected = [[[16.0, 0, 16], [0, 16, 8], [0, 0, 1]]]
    np.testing.assert_allclose(first["target_pix_from_cam"][0], expected, atol=1e-5)
    corner = np.moveaxis(first["target_images"][0, 0], 0, -1)[8, 16]
    np.testing.assert_allclose(read_ramp(corner, WIDTH, HEIGHT), [33, 19], atol=1.2)


@pytest.mark.parametrize("augment", [True, False])
def test_square_windows_of_wide_pictures_are_placed_where_the_views_overlap(data: NuscenesData, augment: bool) -> None:
    square = change(data, clip={"height_px": 16, "width_px": 16}, pairs={"cross_camera_share": 1.0, "min_overlap": 0.3})
    source = source_of(square, augment=augment)
    centred = (place_window((WIDTH, HEIGHT), (16, 16)),) * 2
    chosen_overlap, centred_overlap = [], []
    for index in range(len(source)):
        codes = source.anchor(index), int(source.candidates(index)[0][0])
        view = _Views(source.index, np.concatenate([source.rows_of(code)[0] for code in codes]))
        chosen_overlap.append(view.overlap(source._choose_windows(view, stream(index))))
        centred_overlap.append(view.overlap(centred))
    assert np.mean(np.array(chosen_overlap) >= 0.3) > 0.9
    assert max(centred_overlap) < 0.3


def test_a_clip_of_the_whole_surround_is_read_with_its_poses(data: NuscenesData) -> None:
    index = source_of(data).index
    frames = find_frames(index, 0, data.cameras)
    rows = frames.rows[[2, 4]]
    clip = read_clip(index, rows, (32, 18))
    assert clip.name == "scene-0001 1500000000500000 CAM_FRONT+CAM_FRONT_LEFT+CAM_BACK"
    assert clip.images.shape == (2, 3, 3, 18, 32)
    assert clip.images.dtype == np.uint8
    np.testing.assert_array_equal(np.diff(clip.timestamp_us, axis=1), [[20_000, -40_000]] * 2)
    np.testing.assert_allclose(clip.pix_from_cam, np.broadcast_to([[16.0, 0, 16], [0, 16, 9], [0, 0, 1]], (2, 3, 3, 3)))
    np.testing.assert_allclose(clip.world_from_ego[:, 0, :2, 3], [[601.5, 1600], [603, 1600]], atol=1e-9)
    looks = (clip.world_from_ego @ clip.ego_from_cam)[:, :, :3, 2]  # the camera's axis in the world
    yaw = np.arctan2(looks[..., 1], looks[..., 0]) - np.array([list(YAWS.values())] * 2)
    np.testing.assert_allclose(np.sin(yaw), np.sin(0.1 * (clip.timestamp_us - 1_500_000_000_000_000) / 1e6), atol=1e-9)


def test_figures_about_the_source_are_plain_values(data: NuscenesData) -> None:
    source = source_of(data)
    figures = source.describe()
    assert figures["kind"] == "nuscenes"
    assert figures["samples"] == len(source)
    assert all(isinstance(value, float | int | str) for value in figures.values())
    assert {"overlap_p5", "overlap_p50", "overlap_p95", "mean_baseline_m", "mean_gap_s"} <= set(figures)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: path.unlink(), "cannot be read: No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:300]), "is no whole image"),
        (lambda path: path.write_bytes(b"not a picture"), "is no whole image"),
        (lambda path: path.write_bytes(b""), "is no whole image"),
    ],
)
def test_a_broken_image_is_a_clip_error_that_names_clip_and_file(
    data: NuscenesData, tmp_path: Path, harm: Any, reason: str
) -> None:
    shutil.copytree(data.root, tmp_path / "root")
    copied = data.model_copy(update={"root": tmp_path / "root", "index_folder": tmp_path / "index"})
    build_index(copied)
    source = source_of(copied)
    for image in (tmp_path / "root" / "samples" / "CAM_FRONT").glob("*_000.jpg"):
        harm(image)
    with pytest.raises(ClipError, match=reason) as caught:
        source.load(0, stream())
    assert caught.value.clip == source.name(0)
    assert "CAM_FRONT/scene-0001_000.jpg" in caught.value.reason
    assert source.load(10, stream()), "other clips are not touched"
