"""MIM4D: nothing of a withheld instant reaches what is rebuilt of it, rays are where LiDAR says, and holes are masked."""

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor

from models.batch import Batch
from models.config import EncoderConfig, Grid, Mim4dConfig
from models.geometry import transform, voxel_centres
from models.objectives.base import encode
from models.objectives.mim4d import Mim4dObjective
from models.objectives.mim4d_prepare import Mim4dPreparation, project_into
from models.pretraining import PretrainingModel, build_model, build_preparations
from tests.models.samples import (
    MIM4D,
    PATCH_PX,
    SURROUND_CAMERAS,
    VIDEO_ENCODER,
    surround_batch,
    surround_sample,
)

GRID = Grid(t=2, v=1, h=4, w=6)
MODES = ("frame", "surround", "spacetime")
FRAMES = 4


def config_of(**changes: Any) -> Mim4dConfig:
    return MIM4D.model_copy(update=changes)


def preparation_of(config: Mim4dConfig = MIM4D, encoder: EncoderConfig = VIDEO_ENCODER, grid: Grid = GRID) -> Mim4dPreparation:
    preparation = build_preparations([config], grid, encoder, cameras=SURROUND_CAMERAS)["mim4d"]
    assert isinstance(preparation, Mim4dPreparation)
    return preparation


def batch_of(
    config: Mim4dConfig = MIM4D, *, samples: int = 2, grid: Grid = GRID, encoder: EncoderConfig = VIDEO_ENCODER
) -> Batch:
    made = [surround_sample(grid, tubelet_frames=encoder.tubelet_frames, seed=seed) for seed in range(samples)]
    return surround_batch({"mim4d": preparation_of(config, encoder, grid)}, made)


def model_of(config: Mim4dConfig = MIM4D, *, grid: Grid = GRID, encoder: EncoderConfig = VIDEO_ENCODER) -> PretrainingModel:
    torch.manual_seed(0)
    return build_model(encoder, [config], grid, cameras=SURROUND_CAMERAS)


def objective_of(model: PretrainingModel) -> Mim4dObjective:
    objective = model.objectives["mim4d"]
    assert isinstance(objective, Mim4dObjective)
    return objective


def volumes_of(model: PretrainingModel, batch: Batch) -> Tensor:
    objective = objective_of(model)
    (clips,) = encode(model.encoder, objective.clips(batch))
    return objective.build_volumes(clips, batch)


def rebuilt_of(model: PretrainingModel, batch: Batch, target: int) -> Tensor:
    return objective_of(model).rebuild(volumes_of(model, batch), batch, slice(target, target + 1)).volume


@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_a_withheld_instant_reaches_its_rebuilt_volume(mode: str) -> None:
    config = config_of(mode=mode)
    model, batch = model_of(config).eval(), batch_of(config)
    instants = objective_of(model).instants
    step = len(batch.shared["elapsed_s"][0]) // len(instants.frames)
    for target in range(instants.rebuilt):
        images = batch.shared["images"].clone()
        for sample, withheld in enumerate(batch.prepared["mim4d"]["targets"][:, target].tolist()):
            images[sample, withheld * step : (withheld + 1) * step] = (
                255 - images[sample, withheld * step : (withheld + 1) * step]
            )
        other = Batch({**batch.shared, "images": images}, batch.prepared, batch.clips)
        with torch.no_grad():
            assert torch.equal(rebuilt_of(model, batch, target), rebuilt_of(model, other, target))
            before, after = volumes_of(model, batch), volumes_of(model, other)
        own = batch.prepared["mim4d"]["targets"][:, target]
        changed = (before != after).flatten(2).any(-1)  # (B, I)
        if instants.is_joint:  # the withheld instant was not even encoded
            assert not changed.any()
        else:
            assert changed.sum() == len(batch) and changed[torch.arange(len(batch)), own].all()


@pytest.mark.parametrize("mode", MODES)
def test_what_is_kept_does_reach_the_rebuilt_volume(mode: str) -> None:
    config = config_of(mode=mode)
    model, batch = model_of(config).eval(), batch_of(config)
    other = Batch({**batch.shared, "images": 255 - batch.shared["images"]}, batch.prepared, batch.clips)
    with torch.no_grad():
        assert not torch.equal(rebuilt_of(model, batch, 0), rebuilt_of(model, other, 0))


def test_the_encoder_sees_only_what_is_visible_and_what_is_withheld_is_not_encoded() -> None:
    cells = (GRID.h // 2) * (GRID.w // 2)
    kept = 4 * round(cells / 2)
    expected = {
        "frame": FRAMES * SURROUND_CAMERAS * kept,
        "surround": FRAMES * SURROUND_CAMERAS * kept,
        "spacetime": SURROUND_CAMERAS * kept,
    }
    for mode in MODES:
        config = config_of(mode=mode)
        model, batch, lengths = model_of(config), batch_of(config), []
        model.encoder.blocks[0].register_forward_hook(lambda module, inputs, output, lengths=lengths: lengths.append(len(output)))
        model(batch, "train")
        assert lengths == [2 * model.tokens_per_sample] == [2 * expected[mode]]


def test_cells_are_hidden_as_a_whole_and_by_image() -> None:
    prepared = preparation_of().prepare(surround_sample(GRID), np.random.default_rng(0))
    is_seen = np.zeros((FRAMES * SURROUND_CAMERAS, GRID.h * GRID.w), dtype=bool)
    np.put_along_axis(is_seen, prepared["visible"], True, axis=1)
    cells = is_seen.reshape(-1, GRID.h // 2, 2, GRID.w // 2, 2).transpose(0, 1, 3, 2, 4).reshape(len(is_seen), -1, 4)
    assert (cells.all(-1) | ~cells.any(-1)).all()
    assert (cells.all(-1).sum(1) == 3).all()
    assert len({row.tobytes() for row in is_seen}) > 3


def test_rays_go_through_lidar_points_at_their_depth_and_fill_up_below_the_sky() -> None:
    sample = surround_sample(GRID)
    prepared = preparation_of(config_of(rays=400)).prepare(sample, np.random.default_rng(0))
    first, end = sample["first_point"][:2] + sample["first_point"][1] * prepared["targets"][0]
    points = sample["points_lidar"][first:end, :3]
    width, height = GRID.w * PATCH_PX, GRID.h * PATCH_PX
    for camera, pix_from_ego in enumerate(sample["pix_from_ego"][0]):
        known, depth_m = prepared["ray_depth_m"][0, camera] > 0, prepared["ray_depth_m"][0, camera]
        assert known.any()
        pixels, at_m = project_into(points, pix_from_ego, (width, height))
        all_known = {(round(float(u), 3), round(float(v), 3), round(float(z), 3)) for (u, v), z in zip(pixels, at_m, strict=True)}
        for (u, v), z in zip(prepared["ray_pixels"][0, camera][known], depth_m[known], strict=True):
            assert (round(float(u), 3), round(float(v), 3), round(float(z), 3)) in all_known
        assert (prepared["ray_pixels"][0, camera][~known][:, 1] >= 0.4 * height - 1e-3).all()
        column, row = np.floor(prepared["ray_pixels"][0, camera]).astype(int).T
        frame = prepared["targets"][0]
        np.testing.assert_array_equal(prepared["ray_rgb"][0, camera], sample["images"][frame, camera][:, row, column].T)


@pytest.mark.parametrize(("targets", "expected"), [("current_and_past", {FRAMES - 1}), ("any", set(range(FRAMES)))])
def test_which_instants_are_rebuilt(targets: str, expected: set[int]) -> None:
    preparation, sample = preparation_of(config_of(targets=targets)), surround_sample(GRID)
    drawn = [preparation.prepare(sample, np.random.default_rng(seed)) for seed in range(40)]
    assert {int(prepared["targets"][0]) for prepared in drawn} == expected
    for prepared in drawn:
        first, second = prepared["targets"]
        assert first != second
        for target, sources in zip((first, second), prepared["sources"], strict=True):
            assert sorted([*sources.tolist(), int(target)]) == list(range(FRAMES))


def test_one_instant_is_rendered_directly_alone() -> None:
    grid, encoder = Grid(1, 1, 4, 6), VIDEO_ENCODER.model_copy(update={"tubelet_frames": 1})
    model, batch = model_of(grid=grid, encoder=encoder), batch_of(grid=grid, encoder=encoder)
    losses = model(batch, "train")
    losses.total.backward()
    assert not any("rebuilt" in name for name in losses.parts) and losses.parts["mim4d/direct_rgb"] > 0
    assert all(weight.grad is not None for weight in model.parameters())
    assert set(model(batch, "draw")["mim4d"]) == {"image", "LiDAR depth, near is red", "direct: colour", "direct: depth"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lift", ["pull", "push"])
def test_every_parameter_learns_and_every_task_runs(mode: str, lift: str) -> None:
    config = config_of(mode=mode, lift=lift)
    model, batch = model_of(config), batch_of(config)
    losses = model(batch, "train")
    losses.total.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
    figures = model.eval()(batch, "evaluate")
    assert all(values.shape == (2,) and values.isfinite().all() for values in figures.values())
    assert {
        "mim4d/loss",
        "mim4d/rebuilt_depth_m",
        "mim4d/nearest_frame_depth_m",
        "mim4d/another_clip_depth_m",
        "mim4d/constant_depth_m",
    } <= figures.keys()
    drawn = model(batch, "draw")["mim4d"]
    assert all(image.isfinite().all() and image.min() >= 0 and image.max() <= 1 for image in drawn.values())
    assert "rebuilt: depth" in drawn and "learned flow from above" in drawn


def test_the_loss_is_the_weighted_sum_over_branches() -> None:
    config = config_of(eikonal_weight=0.5, rgb_weight=3.0, depth_weight=7.0)
    parts = model_of(config)(batch_of(config), "train").parts
    expected = sum(
        3.0 * parts[f"mim4d/{branch}_rgb"]
        + 7.0 / 25.6 * parts[f"mim4d/{branch}_depth_m"]
        + 0.5 * parts[f"mim4d/{branch}_eikonal"]
        for branch in ("rebuilt", "direct")
    )
    torch.testing.assert_close(parts["mim4d/loss"], expected)


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    model, batch = model_of().eval(), batch_of(samples=3)
    alone = Batch(
        {name: tensor[1:2] for name, tensor in batch.shared.items()},
        {"mim4d": {name: tensor[1:2] for name, tensor in batch.prepared["mim4d"].items()}},
        batch.clips[1:2],
    )
    with torch.no_grad():
        torch.testing.assert_close(volumes_of(model, batch)[1:2], volumes_of(model, alone), atol=1e-5, rtol=1e-5)
        together = rebuilt_of(model, batch, 0)[1:2]
        torch.testing.assert_close(together, rebuilt_of(model, alone, 0), atol=1e-5, rtol=1e-5)


def without_lidar(sample: dict[str, np.ndarray]) -> None:
    sample["points_lidar"], sample["first_point"] = sample["points_lidar"][:0], np.zeros_like(sample["first_point"])
    sample["ego_from_lidar"] = np.zeros_like(sample["ego_from_lidar"])


def absurdly_far(sample: dict[str, np.ndarray]) -> None:
    sample["points_lidar"][:, :3] *= 1e9


def seen_by_no_camera(sample: dict[str, np.ndarray]) -> None:
    """All cameras look up from high above: no voxel is seen and every ray misses."""
    up = np.array([[8, 0, 4, 0], [0, 8, 4, 0], [0, 0, 1, -500]], dtype=np.float32)
    sample["pix_from_ego"] = np.broadcast_to(up, sample["pix_from_ego"].shape)


@pytest.mark.parametrize("change", [without_lidar, absurdly_far, seen_by_no_camera])
def test_holes_in_the_data_leave_loss_gradients_and_figures_finite(change: Any) -> None:
    bad = surround_sample(GRID)
    change(bad)
    for samples in ([bad, bad], [bad, surround_sample(GRID)]):
        model, batch = model_of(), surround_batch({"mim4d": preparation_of()}, samples)
        losses = model(batch, "train")
        losses.total.backward()
        assert all(value.isfinite() for value in losses.parts.values())
        assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())
        assert all(values.isfinite().all() for values in model.eval()(batch, "evaluate").values())
        assert all(image.isfinite().all() for image in model(batch, "draw")["mim4d"].values())


def test_rays_without_lidar_teach_colours_alone() -> None:
    config = config_of(depth_supervision=False)
    assert preparation_of(config).needs == {"images", "images_colours", "pix_from_ego", "first_from_ego", "elapsed_s"}
    model = model_of(config)
    parts = model(batch_of(config), "train").parts
    assert parts["mim4d/rebuilt_depth_m"] == 0 and parts["mim4d/rebuilt_rgb"] > 0
    figures = model.eval()(batch_of(config), "evaluate")
    assert "mim4d/rebuilt_psnr" in figures and not any("depth" in name for name in figures), "no truth, no figure"


def test_preparing_is_a_function_of_its_stream_and_survives_pickling() -> None:
    encoder = VIDEO_ENCODER.model_copy(update={"drop_path": 0.1})
    preparation = preparation_of(encoder=encoder)
    again, sample = pickle.loads(pickle.dumps(preparation)), surround_sample(GRID)
    first, second, other = (
        p.prepare(sample, np.random.default_rng(s)) for p, s in ((preparation, 0), (again, 0), (preparation, 1))
    )
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
        assert array.shape == other[name].shape and array.dtype == other[name].dtype
    assert first["drop_path"].shape == (FRAMES * SURROUND_CAMERAS, VIDEO_ENCODER.shape.depth, 2)


def test_moved_volumes_say_the_same_of_the_same_place_in_the_world() -> None:
    """Volumes that hold the place of each voxel in the first frame, moved to a target's pose, hold that of its voxels."""
    config = config_of(volume="tiny")
    objective, batch = objective_of(model_of(config)), batch_of(config)
    centres = voxel_centres(objective.voxels, torch.device("cpu")).view(1, 1, -1, 3)
    first_from_ego = batch.shared["first_from_ego"]  # every frame is an instant
    places = transform(first_from_ego, centres.expand(*first_from_ego.shape[:2], -1, -1))  # (B, I, K, 3)
    volumes = rearrange(places, "B I (Z Y X) c -> B I c Z Y X", Z=objective.voxels.zyx[0], Y=objective.voxels.zyx[1])
    moved = objective._nearest_volumes(volumes, batch, is_moved=True)
    targets = batch.prepared["mim4d"]["targets"]
    for sample in range(2):
        for number, target in enumerate(targets[sample].tolist()):
            inside = (..., slice(1, -1), slice(6, -6), slice(6, -6))
            torch.testing.assert_close(moved[sample, number][inside], volumes[sample, target][inside], atol=1e-3, rtol=0)


def test_it_overfits_two_clips() -> None:
    model, batch = model_of(config_of(rays=24)), batch_of(config_of(rays=24))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        total = model(batch, "train").total
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert min(losses[-3:]) < 0.75 * losses[0]


def test_the_reference_preset_is_the_published_recipe_unless_a_key_says_otherwise() -> None:
    reference = Mim4dConfig(preset="reference")
    assert (reference.mask_ratio, reference.targets, reference.eikonal_weight) == (0.3, "current_and_past", 0.0)
    assert (reference.rgb_weight, reference.depth_weight, reference.mask_cell_px) == (10.0, 10.0, 32)
    shape = reference.shape
    assert shape.cells == (128, 128, 5) and (shape.coarse, shape.fine) == (72, 24)
    assert math.isclose((shape.high_m[0] - shape.low_m[0]) / shape.cells[0], 0.8)
    assert Mim4dConfig(preset="reference", mask_ratio=0.6).mask_ratio == 0.6
