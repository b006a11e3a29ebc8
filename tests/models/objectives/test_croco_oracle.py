"""Numeric parity with the official CroCo: predictions, losses, every gradient, an optimiser step, on its own weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from models.config import CrocoConfig, Grid
from models.encoder import ClipGroup
from models.objectives.base import encode
from models.objectives.completion import patchify
from models.objectives.croco import CrocoObjective
from models.official_croco import build_official, export_official, load_official_weights, rename_to_official
from models.pretraining import PretrainingModel
from trainer.config.training import OptimConfig
from trainer.optim import build_optimizer

PREDICTION_ATOL = 1e-5
GRADIENT_TOLERANCE = {"rtol": 1e-4, "atol": 1e-7}


@dataclass(frozen=True)
class Oracle:
    """The stored numbers of one official model, and ours with its weights."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    loss: dict[str, float]
    adamw: dict[str, Any]
    model: PretrainingModel

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    @property
    def grid(self) -> Grid:
        height, width = self.config["img_size"]
        return Grid(1, 1, height // 16, width // 16)

    @property
    def visible(self) -> Tensor:
        shown = ~self.tensors["mask"]
        return shown.nonzero()[:, 1].reshape(len(shown), -1)

    @property
    def views(self) -> tuple[Tensor, Tensor]:
        return self.tensors["img1"][:, None, None], self.tensors["img2"][:, None, None]

    @property
    def objective(self) -> CrocoObjective:
        objective = self.model.objectives["croco"]
        assert isinstance(objective, CrocoObjective)
        return objective

    def complete(self) -> Any:
        first, second = self.views
        target, reference = encode(self.model.encoder, [ClipGroup(first, self.visible), ClipGroup(second)])
        return self.objective.complete(target, reference.tokens)


@pytest.fixture(params=["cosine", "rope"])
def oracle(request: pytest.FixtureRequest, oracle_dir: Path) -> Oracle:
    with safe_open(oracle_dir / f"croco-tiny-rect-{request.param}.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        meta = {key: json.loads(text) for key, text in file.metadata().items() if text[0] in "{["}
    model = build_official(meta["config"])
    oracle = Oracle(tensors, meta["config"], meta["loss"], meta["adamw"], model)
    load_official_weights(model, oracle.part("state_dict."))
    return oracle


def test_the_encoder_gives_the_official_features(oracle: Oracle) -> None:
    first, second = oracle.views
    target, reference = oracle.model.encoder([ClipGroup(first, oracle.visible), ClipGroup(second)])
    torch.testing.assert_close(target, oracle.tensors["feat1"], atol=PREDICTION_ATOL, rtol=0)
    torch.testing.assert_close(reference, oracle.tensors["feat2"], atol=PREDICTION_ATOL, rtol=0)


def test_every_block_gives_the_official_tokens(oracle: Oracle) -> None:
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: seen.__setitem__(name, output)

    for place, block in enumerate(oracle.model.encoder.blocks):
        block.register_forward_hook(keep(f"enc_blocks2.{place}"))
    for place, block in enumerate(oracle.objective.decoder.blocks):
        block.register_forward_hook(keep(f"dec_blocks.{place}"))
    oracle.complete()
    # The official model normalises the last block's tokens before it returns them.
    norms = {"enc_blocks2": oracle.model.encoder.norm, "dec_blocks": oracle.objective.decoder.norm}
    for name, expected in ((name, oracle.tensors[name]) for name in seen):
        stack, _, place = name.partition(".")
        is_last = f"{stack}.{int(place) + 1}" not in seen
        packed = norms[stack](seen[name]) if is_last else seen[name]
        whole_views = packed[-expected.shape[0] * expected.shape[1] :]  # the reference comes after the masked target
        torch.testing.assert_close(whole_views.view_as(expected), expected, atol=PREDICTION_ATOL, rtol=0)


def test_predictions_and_targets_are_the_official_ones(oracle: Oracle) -> None:
    done = oracle.complete()
    torch.testing.assert_close(done.prediction, oracle.tensors["pred"], atol=PREDICTION_ATOL, rtol=0)
    torch.testing.assert_close(patchify(oracle.views[0], oracle.grid), oracle.tensors["target"])
    torch.testing.assert_close(done.hidden.bool(), oracle.tensors["mask"])


@pytest.mark.parametrize(("kind", "normalise_target"), [("norm_pix", True), ("plain", False)])
def test_both_losses_are_the_official_ones(oracle: Oracle, kind: str, normalise_target: bool) -> None:
    oracle.objective.config = CrocoConfig(normalise_target=normalise_target)
    assert oracle.complete().loss.mean().item() == pytest.approx(oracle.loss[kind], rel=1e-6)


def test_all_gradients_are_the_official_ones(oracle: Oracle) -> None:
    oracle.complete().loss.mean().backward()
    found = {rename_to_official(name): weight.grad for name, weight in oracle.model.named_parameters()}
    expected = oracle.part("grads.")
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient is not None
        # mathematically zero without rotary positions: a constant added to all keys changes no softmax
        if oracle.config["pos_embed"] == "cosine" and name.endswith("cross_attn.projk.bias"):
            assert gradient.abs().max() < 1e-7
            continue
        torch.testing.assert_close(gradient.view_as(expected[name]), expected[name], **GRADIENT_TOLERANCE)


def test_one_optimiser_step_is_the_official_one(oracle: Oracle) -> None:
    settings = oracle.adamw
    config = OptimConfig(lr=settings["lr"], betas=settings["betas"], weight_decay=settings["weight_decay"])
    optimizer = build_optimizer(oracle.model, config, depth=oracle.model.encoder.shape.depth)
    oracle.complete().loss.mean().backward()
    optimizer.step()
    stepped = export_official(oracle.model, oracle.grid)
    gradients = oracle.part("grads.")
    for name, expected in oracle.part("stepped.").items():
        if name not in gradients:
            continue  # position tables do not move
        # Adam divides a gradient by its own size: one that is rounding noise makes a step of either sign.
        is_clear = gradients[name].abs() > 100 * GRADIENT_TOLERANCE["atol"]
        difference = (stepped[name] - expected).abs()
        assert torch.all(difference[is_clear] <= 1e-6)
        assert torch.all(difference <= 2 * settings["lr"] * 1.01)


def test_exported_weights_are_the_official_ones_again(oracle: Oracle) -> None:
    exported, official = export_official(oracle.model, oracle.grid), oracle.part("state_dict.")
    assert exported.keys() == official.keys()
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, official[name])
