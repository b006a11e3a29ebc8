"""The module that is trained: its one entry, its purity, and sharded training of it."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from models.batch import Batch, Losses
from models.config import CrocoConfig, DepthConfig, EncoderConfig, Grid, ObjectiveConfig
from models.layers import Block, DecoderBlock
from models.pretraining import PretrainingModel, build_model, build_preparations
from tests.gloo import run_ranks
from tests.models.samples import (
    CROCO,
    MIM4D,
    SIMIPU,
    SURROUND_CAMERAS,
    VIDEO_ENCODER,
    VIDEO_GRID,
    random_batch,
    surround_batch,
    surround_sample,
)
from tests.waits import Waits

DROPPING = VIDEO_ENCODER.model_copy(update={"drop_path": 0.2})


def seeded_model(encoder: EncoderConfig = VIDEO_ENCODER, croco: CrocoConfig = CROCO) -> PretrainingModel:
    torch.manual_seed(0)
    return build_model(encoder, [croco], VIDEO_GRID)


def test_training_gives_the_weighted_sum_and_its_parts() -> None:
    batch = random_batch()
    plain = seeded_model()(batch, "train")
    weighted = seeded_model(croco=CROCO.model_copy(update={"weight": 3.0}))(batch, "train")
    assert isinstance(plain, Losses)
    assert plain.parts.keys() == {"croco/loss"}
    assert plain.total.ndim == 0 and plain.total.requires_grad and not plain.parts["croco/loss"].requires_grad
    torch.testing.assert_close(weighted.total, 3 * plain.total)
    torch.testing.assert_close(weighted.parts["croco/loss"], plain.total.detach())


def test_the_mean_of_the_evaluated_losses_is_the_training_loss() -> None:
    model, batch = seeded_model(), random_batch()
    figures = model.eval()(batch, "evaluate")
    assert figures.keys() == {"croco/loss", "croco/loss_wrong_reference", "croco/loss_blank_reference"}
    assert all(values.shape == (3,) for values in figures.values())
    torch.testing.assert_close(figures["croco/loss"].mean(), model(batch, "train").total)


def test_pictures_come_by_objective_and_title() -> None:
    drawn = seeded_model().eval()(random_batch(), "draw")
    assert list(drawn) == ["croco"]
    assert list(drawn["croco"]) == ["masked input", "reconstruction, patch means given", "target", "reference"]


def test_tokens_per_sample_are_those_that_the_encoder_sees() -> None:
    model, lengths = seeded_model(), []
    model.encoder.blocks[0].register_forward_hook(lambda module, inputs, output: lengths.append(len(output)))
    model(random_batch(), "train")
    assert lengths == [3 * model.tokens_per_sample]


@pytest.mark.parametrize("positions", ["rope", "sincos"])
def test_every_parameter_learns(positions: str) -> None:
    model = seeded_model(VIDEO_ENCODER.model_copy(update={"positions": positions}))
    model(random_batch(), "train").total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_forward_is_a_function_of_weights_and_batch() -> None:
    model, batch = seeded_model(DROPPING), random_batch(DROPPING)
    torch.manual_seed(1)
    first = model(batch, "train").total
    torch.manual_seed(2)
    assert torch.equal(first, model(batch, "train").total)
    other = random_batch(DROPPING, seed=1).prepared["croco"]["drop_path"]
    prepared = {"croco": {**batch.prepared["croco"], "drop_path": other}}
    assert not torch.equal(first, model(Batch(batch.shared, prepared, batch.clips), "train").total)


@pytest.mark.parametrize("config", [CROCO, SIMIPU, MIM4D], ids=lambda config: config.kind)
def test_colours_that_change_on_the_device_are_learnt_as_if_the_files_had_them(config: ObjectiveConfig) -> None:
    """Half as bright, from even bytes: the one change of colours that bytes hold without rounding."""
    grid = Grid(t=2, v=1, h=4, w=6)
    bright, dark = (colour_batch(config, grid, in_files=in_files) for in_files in (False, True))
    torch.manual_seed(0)
    model = build_model(VIDEO_ENCODER, [config], grid, cameras=SURROUND_CAMERAS)
    assert torch.equal(model(bright, "train").total, model(dark, "train").total)
    columns = (model(batch, "draw")[config.kind] for batch in (bright, dark))
    for left, right in zip(*(column.values() for column in columns), strict=True):
        assert torch.equal(left, right)


def colour_batch(config: ObjectiveConfig, grid: Grid, *, in_files: bool) -> Batch:
    """Clips of half the brightness: in the files, or as a factor that the device applies."""
    if isinstance(config, CrocoConfig):
        batch = random_batch(grid=grid, croco=config)
    else:
        preparations = build_preparations([config], grid, VIDEO_ENCODER, cameras=SURROUND_CAMERAS)
        batch = surround_batch(preparations, [surround_sample(grid, seed=seed) for seed in range(2)])

    def darken(name: str, tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.uint8:
            return tensor // 2 if in_files else tensor // 2 * 2
        return tensor * torch.tensor([0.5, 1, 1]) if name.endswith("_colours") and not in_files else tensor

    shared = {name: darken(name, tensor) for name, tensor in batch.shared.items()}
    prepared = {name: darken(name, tensor) for name, tensor in batch.prepared[config.kind].items()}
    return Batch(shared, {config.kind: prepared}, batch.clips)


def test_drop_path_numbers_are_prepared_where_the_encoder_has_it() -> None:
    assert random_batch().prepared["croco"].keys() == {"visible"}
    numbers = random_batch(DROPPING).prepared["croco"]["drop_path"]
    assert numbers.shape == (3, 2, VIDEO_ENCODER.shape.depth, 2) and numbers.dtype == torch.float32
    assert build_preparations([CROCO], VIDEO_GRID, DROPPING).keys() == {"croco"}


@pytest.mark.parametrize("positions", ["rope", "sincos"])
def test_no_task_waits_for_the_device(positions: str) -> None:
    encoder = DROPPING.model_copy(update={"positions": positions})
    model, batch = seeded_model(encoder), random_batch(encoder)
    model(batch, "train")  # builds the position tables
    with Waits() as waits:
        for task in ("train", "evaluate", "draw"):
            model(batch, task)
    assert not waits.found


def test_a_model_trains_after_an_evaluation_in_inference_mode() -> None:
    for positions in ("rope", "sincos"):
        model = seeded_model(VIDEO_ENCODER.model_copy(update={"positions": positions}))
        with torch.inference_mode():
            model(random_batch(), "evaluate")
        model(random_batch(), "train").total.backward()


def test_a_model_under_fake_tensors_leaves_nothing_behind() -> None:
    batch, real = random_batch(), seeded_model()
    before = real(batch, "train").total
    with FakeTensorMode() as mode:
        fake_batch = batch._map(mode.from_tensor)
        loss = build_model(VIDEO_ENCODER, [CROCO], VIDEO_GRID)(fake_batch, "train").total
        loss.backward()
    assert type(loss) is not Tensor
    assert torch.equal(seeded_model()(batch, "train").total, before)


def test_bf16_autocast_gives_a_float32_loss_nearby() -> None:
    model, batch = seeded_model(), random_batch()
    exact = model(batch, "train").total
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch, "train")
    losses.total.backward()
    assert losses.total.dtype == losses.parts["croco/loss"].dtype == torch.float32
    assert losses.total.item() == pytest.approx(exact.item(), rel=1e-2)


def test_a_batch_is_learnt_by_heart() -> None:
    model, batch = seeded_model(), random_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(40):
        loss = model(batch, "train").total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert sum(after < before for before, after in pairwise(losses)) > 30


def sharded_and_whole(*, bf16: bool) -> dict[str, Any]:
    """One step of a sharded model and of its unsharded twin on the same batch; runs on every rank."""
    whole, model, batch = seeded_model(DROPPING), seeded_model(DROPPING), random_batch(DROPPING)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in model.modules():
        if isinstance(module, Block | DecoderBlock):
            fully_shard(module, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    losses = []
    for each in (whole, model):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = each(batch, "train").total
        loss.backward()
        losses.append(loss.item())
    # before the next forward, which leaves the root gathered and its shards out of sight
    gradients = zip(model.parameters(), whole.parameters(), strict=True)
    error = max(relative_error(mine.grad.full_tensor(), theirs.grad) for mine, theirs in gradients)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        titles = list(model.eval()(batch, "draw")["croco"])
        figures = {name: values.tolist() for name, values in model(batch, "evaluate").items()}
        expected = {name: values.tolist() for name, values in whole.eval()(batch, "evaluate").items()}
    return {"losses": losses, "gradient_error": error, "figures": figures, "expected": expected, "titles": titles}


def relative_error(mine: Tensor, theirs: Tensor) -> float:
    return ((mine - theirs).norm() / (theirs.norm() + 1e-6)).item()


def sharded_in_both_precisions() -> tuple[dict[str, Any], dict[str, Any]]:
    return sharded_and_whole(bf16=False), sharded_and_whole(bf16=True)


def test_two_sharded_ranks_compute_what_one_process_does() -> None:
    for exact, rounded in run_ranks(sharded_in_both_precisions, 2):
        assert exact["losses"][1] == pytest.approx(exact["losses"][0], rel=1e-6)
        assert exact["gradient_error"] < 1e-4
        assert exact["figures"].keys() == exact["expected"].keys()
        for name, values in exact["expected"].items():
            assert exact["figures"][name] == pytest.approx(values, rel=1e-5)
        assert len(exact["titles"]) == 4
        # gathered weights are bf16 then, those of norms too, which autocast alone leaves float32
        assert rounded["losses"][1] == pytest.approx(rounded["losses"][0], rel=1e-2)
        assert rounded["gradient_error"] < 0.1


def test_a_frozen_encoder_has_no_gradients_and_drops_nothing_while_the_rest_trains() -> None:
    model, batch = seeded_model(DROPPING), random_batch(DROPPING)
    model.freeze_encoder()
    model.train()
    assert model.objectives.training and not any(module.training for module in model.encoder.modules())
    model(batch, "train").total.backward()
    learning = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert learning == {name for name, _ in model.named_parameters() if name.startswith("objectives.")}


def test_only_downstream_tasks_predict() -> None:
    grid = Grid(1, 1, 2, 3)
    preparations = build_preparations([DepthConfig(points=8), SIMIPU], grid, VIDEO_ENCODER, cameras=SURROUND_CAMERAS)
    batch = surround_batch(preparations, [surround_sample(grid, tubelet_frames=1)])
    model = build_model(VIDEO_ENCODER, [DepthConfig(points=8), SIMIPU], grid, cameras=SURROUND_CAMERAS).eval()
    assert model(batch, "predict").keys() == {"depth"}


def test_an_encoder_of_clips_knows_time_where_it_is_given_images() -> None:
    images, clips = Grid(1, 1, 2, 3), Grid(2, 1, 2, 3)
    flat = EncoderConfig(size="tiny", patch_px=4)
    assert [flat.knows_time(grid) for grid in (images, clips)] == [False, True]
    told = flat.model_copy(update={"has_time": True})
    assert build_model(told, [DepthConfig(points=8)], images, cameras=1).encoder.has_time
    assert VIDEO_ENCODER.knows_time(images)
