"""Parameter groups, the learning rate of a step and the moving average, on a module whose names are a model's."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from trainer.config.training import OptimConfig
from trainer.optim import MovingAverage, build_optimizer, learning_rate, set_learning_rate

DEPTH = 3


class Named(nn.Module):
    """Parameters with the names that decide: an embedding, positions, registers, blocks, a norm, a mask token."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.embed = nn.Linear(4, 4)
        self.encoder.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(DEPTH))
        self.encoder.norm = nn.LayerNorm(4)
        self.encoder.table = nn.Embedding(3, 4)
        self.encoder.registers = nn.Parameter(torch.zeros(2, 4))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 4))


def group_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, object]:
    return next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))


def test_norms_and_biases_have_no_decay_and_the_mask_token_has() -> None:
    model = Named()
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.05), depth=DEPTH)
    assert group_of(optimizer, model.encoder.norm.weight)["weight_decay"] == 0
    assert group_of(optimizer, model.encoder.embed.bias)["weight_decay"] == 0
    assert group_of(optimizer, model.encoder.embed.weight)["weight_decay"] == 0.05
    assert group_of(optimizer, model.mask_token)["weight_decay"] == 0.05
    assert group_of(optimizer, model.encoder.table.weight)["weight_decay"] == 0
    assert group_of(optimizer, model.encoder.registers)["weight_decay"] == 0


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = Named()
    optimizer = build_optimizer(model, OptimConfig(layer_decay=0.5), depth=DEPTH)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


def test_layer_decay_halves_the_rate_of_each_block_below_the_heads() -> None:
    model = Named()
    optimizer = build_optimizer(model, OptimConfig(layer_decay=0.5), depth=DEPTH)
    set_learning_rate(optimizer, 1.0)
    rates = [group_of(optimizer, block.weight)["lr"] for block in model.encoder.blocks]
    assert rates == [0.5**3, 0.5**2, 0.5**1]
    for lowest in (model.encoder.embed.weight, model.encoder.table.weight, model.encoder.registers):
        assert group_of(optimizer, lowest)["lr"] == 0.5**4
    assert group_of(optimizer, model.mask_token)["lr"] == 1.0


def test_the_rate_rises_linearly_from_zero_and_falls_as_half_a_cosine() -> None:
    config = OptimConfig(lr=2.0, min_lr=0.5, warmup_steps=10)
    rates = [learning_rate(step, config, steps=110) for step in range(111)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx((2.0 + 0.5) / 2)
    assert rates[110] == pytest.approx(0.5)
    assert all(later <= earlier for earlier, later in pairwise(rates[10:]))


def test_a_longer_cosine_stops_half_way_down_as_croco_does() -> None:
    # Spec: 400 of 800 epochs after a warm-up of 40 leaves 54 % of the peak.
    config = OptimConfig(lr=1.0, warmup_steps=40, cosine_steps=800)
    expected = 0.5 * (1 + math.cos(math.pi * (400 - 40) / (800 - 40)))
    assert learning_rate(400, config, steps=400) == pytest.approx(expected)
    assert expected == pytest.approx(0.54, abs=0.005)


def test_the_moving_average_follows_the_encoder_alone() -> None:
    model = Named()
    average = MovingAverage(model.named_parameters(), decay=0.9)
    before = model.encoder.embed.weight.detach().clone()
    with torch.no_grad():
        model.encoder.embed.weight += 1
    average.update(torch.tensor(False))
    assert torch.equal(average.averages["encoder.embed.weight"], before), "a step that was none moves no average"
    average.update(torch.tensor(True))
    torch.testing.assert_close(average.averages["encoder.embed.weight"], before + 0.1)
    assert "mask_token" not in average.averages
