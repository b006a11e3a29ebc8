"""SimIPU: what is a pair, who learns from what, and that bad sweeps are masked."""

import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from models.batch import Batch
from models.config import CrocoConfig, Grid, SimipuConfig
from models.objectives.base import Preparation, encode
from models.objectives.simipu import Compared, SimipuObjective, bilinear_corners, keep_nearest, sample_tokens
from models.pretraining import PretrainingModel, build_model, build_preparations
from tests.models.samples import (
    CROCO,
    PATCH_PX,
    SIMIPU,
    SURROUND_CAMERAS,
    VIDEO_ENCODER,
    VIDEO_GRID,
    random_batch,
    surround_batch,
    surround_sample,
)

GRID = Grid(t=2, v=1, h=4, w=6)
CENTRES = SIMIPU.shape.centres
REFERENCE = SimipuConfig(points="tiny", preset="reference")


def preparation_of(config: SimipuConfig = SIMIPU, grid: Grid = GRID) -> Preparation:
    return build_preparations([config], grid, VIDEO_ENCODER, cameras=SURROUND_CAMERAS)["simipu"]


def batch_of(config: SimipuConfig = SIMIPU, *, samples: int = 2, points: int = 4000) -> Batch:
    made = [surround_sample(GRID, points=points, seed=seed) for seed in range(samples)]
    return surround_batch({"simipu": preparation_of(config)}, made)


def model_of(config: SimipuConfig = SIMIPU) -> PretrainingModel:
    torch.manual_seed(0)
    return build_model(VIDEO_ENCODER, [config], GRID, cameras=SURROUND_CAMERAS)


def objective_of(model: PretrainingModel) -> SimipuObjective:
    objective = model.objectives["simipu"]
    assert isinstance(objective, SimipuObjective)
    return objective


def test_a_centre_is_paired_with_the_camera_and_pixel_that_it_projects_to() -> None:
    sample = surround_sample(GRID)
    config = SimipuConfig(points="tiny", one_pair_per_patch=False)
    prepared = preparation_of(config).prepare(sample, np.random.default_rng(0))
    projection = sample["pix_from_lidar"][prepared["frame"]]
    width, height = GRID.w * PATCH_PX, GRID.h * PATCH_PX
    for centre in range(CENTRES):
        point = np.append(prepared["points_a"][centre, :3], 1)
        seen = {}
        for camera in range(SURROUND_CAMERAS):
            u, v, depth = projection[camera] @ point
            if depth > 1 and 0 < u / depth < width and 0 < v / depth < height:
                seen[camera] = np.array([u, v]) / depth
        assert prepared["pair_valid"][centre] == bool(seen)
        if seen:
            np.testing.assert_allclose(prepared["pixels"][centre], seen[int(prepared["camera"][centre])], atol=1e-3)
            margins = {camera: min(*pixel, width - pixel[0], height - pixel[1]) for camera, pixel in seen.items()}
            assert margins[int(prepared["camera"][centre])] == pytest.approx(max(margins.values()), abs=1e-3)


def test_of_the_centres_on_one_patch_the_nearest_to_the_camera_stays() -> None:
    sample, rng = surround_sample(GRID, points=8000), np.random.default_rng
    every = preparation_of(SimipuConfig(points="tiny", one_pair_per_patch=False)).prepare(sample, rng(0))
    thinned = preparation_of().prepare(sample, rng(0))
    patches: dict[tuple[int, int, int], list[int]] = {}
    for centre in np.flatnonzero(every["pair_valid"]):
        column, row = (every["pixels"][centre] // PATCH_PX).astype(int)
        patches.setdefault((int(every["camera"][centre]), row, column), []).append(int(centre))
    projection = sample["pix_from_lidar"][every["frame"]]
    kept = set(np.flatnonzero(thinned["pair_valid"]).tolist())
    assert len(kept) == len(patches) < every["pair_valid"].sum()
    for (camera, _, _), centres in patches.items():
        depths = {centre: projection[camera, 2] @ np.append(every["points_a"][centre, :3], 1) for centre in centres}
        assert [centre for centre in centres if centre in kept] == [min(depths, key=depths.__getitem__)]


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 9), st.booleans()), min_size=1, max_size=30))
def test_one_of_each_place_is_kept_if_any_was(entries: list[tuple[int, float, bool]]) -> None:
    place, depth_m, is_kept = (np.array(column) for column in zip(*entries, strict=True))
    nearest = keep_nearest(place, depth_m.astype(float), is_kept)
    assert not (nearest & ~is_kept).any()
    for one in set(place[is_kept].tolist()):
        here = (place == one) & is_kept
        assert (nearest & here).sum() == 1
        assert depth_m[nearest & here][0] == depth_m[here].min()


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_sampling_four_tokens_is_torchs_grid_sample(h: int, w: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = Grid(1, 1, h, w)
    places = rng.uniform(0, 1, (9, 2)) * (w, h)
    corners, weights = bilinear_corners(places, grid)
    tokens = torch.from_numpy(rng.normal(size=(1, h * w, 3))).float()
    sampled = sample_tokens(tokens, torch.from_numpy(corners)[None], torch.from_numpy(weights)[None])
    at = torch.from_numpy(2 * places / (w, h) - 1).float()[None, None]
    image = tokens[0].T.reshape(1, 3, h, w)
    expected = F.grid_sample(image, at, mode="bilinear", padding_mode="border", align_corners=False)[0, :, 0].T
    torch.testing.assert_close(sampled[0], expected, atol=1e-5, rtol=1e-5)


def test_features_are_sampled_from_the_camera_and_tubelet_of_the_pair() -> None:
    """Tokens that say which camera, tubelet, row and column they are of come back as such."""
    sample = surround_sample(GRID)
    prepared = preparation_of().prepare(sample, np.random.default_rng(3))
    camera, t, y, x = torch.meshgrid(*(torch.arange(n) for n in (SURROUND_CAMERAS, GRID.t, GRID.h, GRID.w)), indexing="ij")
    tokens = torch.stack([camera, t, y, x], dim=-1).flatten(1, 3).float()  # (V, N, 4)
    found = sample_tokens(tokens, *(torch.from_numpy(prepared[name])[None] for name in ("corners", "corner_weights")))[0]
    valid = prepared["pair_valid"]
    np.testing.assert_allclose(found[valid, 0], prepared["camera"][valid], atol=1e-5)
    np.testing.assert_allclose(found[valid, 1], prepared["frame"] // VIDEO_ENCODER.tubelet_frames, atol=1e-5)
    expected = np.clip(prepared["pixels"][valid] / PATCH_PX - 0.5, 0, (GRID.w - 1, GRID.h - 1))
    np.testing.assert_allclose(found[valid][:, [3, 2]], expected, atol=1e-4)


def test_matched_centres_are_the_same_points_once_the_transformation_is_undone() -> None:
    # a sweep of as many points as there are centres: both views choose all of them, in another order
    prepared = preparation_of().prepare(surround_sample(GRID, points=CENTRES), np.random.default_rng(1))
    assert prepared["match_valid"].all() and prepared["match_distance_m"].max() < 1e-4
    assert sorted(prepared["match"]) == list(range(CENTRES)) and (prepared["match"] != np.arange(CENTRES)).any()
    # distances to the LiDAR scale by one factor between the two views, whatever the turn and the flip
    first = np.linalg.norm(prepared["points_a"][:CENTRES, :3], axis=1)
    second = np.linalg.norm(prepared["points_b"][prepared["match"], :3], axis=1)
    np.testing.assert_allclose(second / first, (second / first)[0], rtol=1e-4)
    assert 0.75 <= (second / first)[0] <= 1.25
    np.testing.assert_array_equal(prepared["points_a"][:CENTRES, 3], prepared["points_b"][prepared["match"], 3])


def test_without_a_gate_every_centre_is_a_pair() -> None:
    prepared = preparation_of(REFERENCE).prepare(surround_sample(GRID), np.random.default_rng(1))
    assert prepared["match_valid"].all() and prepared["match_distance_m"].max() > 1


def test_preparing_is_a_function_of_its_stream_and_survives_pickling() -> None:
    encoder = VIDEO_ENCODER.model_copy(update={"drop_path": 0.1})
    preparation = build_preparations([SIMIPU], GRID, encoder, cameras=SURROUND_CAMERAS)["simipu"]
    again, sample = pickle.loads(pickle.dumps(preparation)), surround_sample(GRID)
    first, second, other = (
        p.prepare(sample, np.random.default_rng(s)) for p, s in ((preparation, 0), (again, 0), (preparation, 1))
    )
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
        assert array.shape == other[name].shape and array.dtype == other[name].dtype
    assert not np.array_equal(first["points_b"], other["points_b"])
    assert first["drop_path"].shape == (SURROUND_CAMERAS, VIDEO_ENCODER.shape.depth, 2)


SweepChange = Callable[[dict[str, np.ndarray]], None]


def without_points(sample: dict[str, np.ndarray]) -> None:
    sample["points_lidar"], sample["first_point"] = sample["points_lidar"][:0], np.zeros_like(sample["first_point"])


def with_three_points(sample: dict[str, np.ndarray]) -> None:
    sample["points_lidar"] = np.array([[5, 0, 0, 1], [0, 5, 0, 1], [-5, 1, 0, 1]], dtype=np.float32)
    sample["first_point"] = np.array([0, 3, 3, 3, 3])


def out_of_sight(sample: dict[str, np.ndarray]) -> None:
    sample["points_lidar"][:, :3] = np.array([0, 0, 30]) + sample["points_lidar"][:, :3] / 100


def out_of_range(sample: dict[str, np.ndarray]) -> None:
    sample["points_lidar"][:, :3] *= 1e6


def all_alike(sample: dict[str, np.ndarray]) -> None:
    sample["points_lidar"][:] = (8, 1, 0, 0.5)


@pytest.mark.parametrize(
    ("change", "views", "pairs"),
    [(without_points, 0, 0), (with_three_points, 3, 3), (out_of_sight, None, 0), (out_of_range, 0, 0), (all_alike, 1, 1)],
)
@pytest.mark.parametrize("config", [SIMIPU, REFERENCE])
def test_bad_sweeps_are_masked_and_leave_loss_and_gradients_finite(
    config: SimipuConfig, change: SweepChange, views: int | None, pairs: int
) -> None:
    bad = surround_sample(GRID)
    change(bad)
    prepared = preparation_of(config).prepare(bad, np.random.default_rng(0))
    assert views is None or prepared["match_valid"].sum() == views
    assert prepared["pair_valid"].sum() == pairs
    for samples in ([bad, bad], [bad, surround_sample(GRID)]):
        model = model_of(config)
        batch = surround_batch({"simipu": preparation_of(config)}, samples)
        losses = model(batch, "train")
        losses.total.backward()
        assert all(value.isfinite() for value in losses.parts.values())
        assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())
        assert all(values.isfinite().all() for values in model(batch, "evaluate").values())
        assert all(image.isfinite().all() for image in model(batch, "draw")["simipu"].values())


def gradients(model: PretrainingModel, batch: Batch) -> dict[str, Tensor]:
    model(batch, "train").total.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}


def test_the_point_encoder_learns_from_the_sweep_alone_and_the_video_encoder_from_the_images_alone() -> None:
    batch = batch_of()
    of_intra = gradients(model_of(SIMIPU.model_copy(update={"inter_weight": 0.0})), batch)
    of_inter = gradients(model_of(SIMIPU.model_copy(update={"intra_weight": 0.0})), batch)
    assert {name.split(".")[0] for name in of_intra} == {"objectives"}
    assert {name.split(".")[2] for name in of_intra} == {"points", "view_head"}
    assert {name.split(".")[2] for name in of_inter if name.startswith("objectives")} == {"image_head", "point_head"}
    assert any(name.startswith("encoder.blocks.0.") for name in of_inter)


@pytest.mark.parametrize(("stop", "learns"), [("feature", {"point_head"}), ("head", set()), ("none", {"points", "point_head"})])
def test_where_the_gradient_stops_between_image_and_point(stop: str, learns: set[str]) -> None:
    config = SIMIPU.model_copy(update={"stop_gradient": stop, "intra_weight": 0.0})
    moved = {name.split(".")[2] for name in gradients(model_of(config), batch_of()) if name.startswith("objectives")}
    assert moved == learns | {"image_head"}
    head = objective_of(model_of(config)).point_head
    assert all(weight.requires_grad == (stop != "head") for weight in head.parameters())


def test_a_second_view_without_gradients_gives_those_of_a_detached_one_for_about_half_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, batch = SIMIPU.model_copy(update={"inter_weight": 0.0}), batch_of()

    def learn() -> tuple[dict[str, Tensor], int]:
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model = model_of(config)
        for block in model.encoder.parameters():
            block.requires_grad_(False)
        with saved_tensors_hooks(note, lambda tensor: tensor):
            total = model(batch, "train").total
        total.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}, sum(kept.values())

    def compare_and_detach(self: SimipuObjective, tokens: Tensor, prepared: dict[str, Tensor]) -> Compared:
        """The second view with a graph that is then thrown away, as the release has it."""
        first, second = (self._encode_points(prepared, view) for view in "ab")
        other_view = self.view_head(second.gather(1, prepared["match"][..., None].expand_as(second))).detach()
        image = self.image_head(sample_tokens(tokens, prepared["corners"], prepared["corner_weights"]))
        return Compared(self.view_head(first), other_view, image, self.point_head(first.detach()))

    without, small = learn()
    monkeypatch.setattr(SimipuObjective, "compare", compare_and_detach)
    detached, large = learn()
    assert without.keys() == detached.keys()
    for name, gradient in without.items():
        assert torch.equal(gradient, detached[name]), name
    assert small < 0.6 * large


def test_turning_the_world_changes_nothing_without_coordinates_and_something_with_them() -> None:
    for use_xyz in (False, True):
        config = SimipuConfig(points="tiny", use_xyz=use_xyz)
        batch, objective = batch_of(config), objective_of(model_of(config))
        prepared = batch.prepared["simipu"]
        turned = dict(prepared)
        points = prepared["points_a"].clone()
        points[..., :2] = torch.stack([-points[..., 1], -points[..., 0]], dim=-1)  # a turn and a flip
        turned["points_a"] = points
        difference = (objective._encode_points(prepared, "a") - objective._encode_points(turned, "a")).abs().max()
        assert (difference == 0) == (not use_xyz)


def test_metrics_are_honest_about_chance_and_pairs() -> None:
    model, batch = model_of(), batch_of()
    prepared = batch.prepared["simipu"]
    pairs = int(prepared["pair_valid"].sum())
    parts = model(batch, "train").parts
    assert parts["simipu/image_to_point_chance"].item() == pytest.approx(1 / pairs)
    assert parts["simipu/pairs_per_image"].item() == pytest.approx(pairs / len(batch) / SURROUND_CAMERAS)
    ok = prepared["match_valid"]
    assert parts["simipu/match_distance_m"].item() == pytest.approx(prepared["match_distance_m"][ok].mean().item(), rel=1e-5)
    evaluated = model(batch, "evaluate")
    assert evaluated.keys() == parts.keys()
    for name, values in evaluated.items():
        assert values.shape == (len(batch),)
        assert values.mean().item() == pytest.approx(parts[name].item(), rel=1e-4, abs=1e-6), name


def test_training_starts_between_chance_and_the_loss_of_random_vectors() -> None:
    config = SIMIPU.model_copy(update={"embedding": 64})
    model, batch = model_of(config), batch_of(config, samples=4)
    pairs = int(batch.prepared["simipu"]["pair_valid"].sum())
    chance, random = math.log(pairs), math.log(pairs) + 1 / (2 * 64 * config.temperature**2)
    assert chance - 0.1 < model(batch, "train").parts["simipu/image_to_point_loss"].item() < random + 0.5


def test_a_few_steps_lower_both_losses() -> None:
    model, batch = model_of(), batch_of(points=CENTRES)  # every centre is a pair
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        found = model(batch, "train")
        found.total.backward()
        optimizer.step()
        losses.append((found.parts["simipu/intra_loss"].item(), found.parts["simipu/image_to_point_loss"].item()))
    assert losses[-1][0] < 0.8 * losses[0][0] and losses[-1][1] < 0.8 * losses[0][1]


def test_every_parameter_that_may_learn_does() -> None:
    for config in (SIMIPU, REFERENCE):
        model = model_of(config)
        model(batch_of(config), "train").total.backward()
        assert all((weight.grad is not None) == weight.requires_grad for weight in model.parameters())


def test_trained_together_each_objective_has_its_own_loss_in_one_call_of_the_encoder() -> None:
    croco = CrocoConfig(decoder="tiny", mask=CROCO.mask, weight=2.0)
    configs = [croco, SIMIPU.model_copy(update={"weight": 0.5})]
    preparation = build_preparations([SIMIPU], VIDEO_GRID, VIDEO_ENCODER, cameras=SURROUND_CAMERAS)
    pairs = random_batch(scenes=(0, 1))
    surround = surround_batch(preparation, [surround_sample(VIDEO_GRID, seed=seed) for seed in range(2)])
    batch = Batch({**pairs.shared, **surround.shared}, {**pairs.prepared, **surround.prepared}, pairs.clips)
    torch.manual_seed(0)
    model, lengths = build_model(VIDEO_ENCODER, configs, VIDEO_GRID, cameras=SURROUND_CAMERAS), []
    model.encoder.blocks[0].register_forward_hook(lambda module, inputs, output: lengths.append(len(output)))
    losses = model(batch, "train")
    assert lengths == [2 * model.tokens_per_sample]
    alone = model.objectives["croco"](encode(model.encoder, model.objectives["croco"].clips(batch)), batch, model.peers)
    torch.testing.assert_close(losses.parts["croco/loss"], alone.total.detach())
    expected = 2.0 * losses.parts["croco/loss"] + 0.5 * losses.parts["simipu/loss"]
    torch.testing.assert_close(losses.total.detach(), expected)


def test_pictures_show_all_cameras_of_the_instant_of_the_sweep() -> None:
    drawn = model_of()(batch_of(), "draw")["simipu"]
    assert len(drawn) == 2
    for image in drawn.values():
        assert image.shape == (2, 1, 3, GRID.h * PATCH_PX, SURROUND_CAMERAS * GRID.w * PATCH_PX)
        assert image.min() >= 0 and image.max() <= 1


def test_the_reference_preset_is_the_release_unless_a_key_says_otherwise() -> None:
    assert (REFERENCE.use_xyz, REFERENCE.stop_gradient, REFERENCE.match_gate_m) == (False, "head", None)
    assert (REFERENCE.gather_negatives, REFERENCE.norm, REFERENCE.one_pair_per_patch) == (False, "batch", False)
    assert SimipuConfig(preset="reference", use_xyz=True).use_xyz
    assert SimipuConfig.model_validate(REFERENCE.model_dump()) == REFERENCE
    assert SimipuConfig() == SimipuConfig(preset="modern")
