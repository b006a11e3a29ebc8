"""The head of centres: what a fresh one says, and that peaks become the boxes that were drawn."""

import math

import numpy as np
import pytest
import torch

from models.geometry import VoxelGrid
from models.heads.centre import CentreHead, find_boxes

GRID = VoxelGrid((-8, -6, -1), (8, 6, 3), (16, 12, 1))
CLASSES = 3
SURE = 6.0


def empty_maps(batch: int = 1) -> torch.Tensor:
    """Logits of nothing anywhere, and boxes of a metre."""
    maps = torch.zeros(batch, CLASSES + 10, 12, 16)
    maps[:, :CLASSES] = -9.0
    return maps


def test_a_fresh_head_holds_a_centre_unlikely_everywhere_and_boxes_of_a_metre() -> None:
    torch.manual_seed(0)
    maps = CentreHead(inputs=8, width=16, classes=CLASSES)(torch.randn(2, 8, 12, 16))
    assert maps.shape == (2, CLASSES + 10, 12, 16) and maps.dtype == torch.float32
    assert torch.sigmoid(maps[:, :CLASSES]).mean().item() == pytest.approx(0.1, abs=0.05)
    assert maps[:, CLASSES:].abs().max() < 2


def test_a_peak_becomes_the_box_that_the_map_says_there() -> None:
    maps = empty_maps()
    maps[0, 1, 4, 11] = SURE
    maps[0, CLASSES:, 4, 11] = torch.tensor([0.25, 0.5, 1.2, *np.log([4.0, 2.0, 1.5]), math.sin(2.5), math.cos(2.5), 3.0, -1.0])
    (box,) = find_boxes(maps, GRID, 1)[0].tolist()
    expected = [-8 + 11.25, -6 + 4.5, 1.2, 4.0, 2.0, 1.5, 2.5, 3.0, -1.0, 1.0, 1 / (1 + math.exp(-SURE))]
    assert box == pytest.approx(expected, abs=1e-5)


def test_neighbours_of_a_peak_are_no_boxes_of_their_class_and_the_surest_comes_first() -> None:
    maps = empty_maps()
    maps[0, 0, 5, 5], maps[0, 0, 5, 6], maps[0, 0, 5, 8], maps[0, 2, 5, 6] = SURE, SURE - 1, SURE - 2, SURE - 3
    found = find_boxes(maps, GRID, 3)[0]
    assert found[:, 9].tolist() == [0, 0, 2]
    assert found[:, 0].tolist() == [-3, 0, -2]
    assert (found[:, 10].diff() < 0).all()


def test_there_are_always_as_many_boxes_and_those_that_are_none_score_zero() -> None:
    maps = empty_maps(2)
    maps[1, :CLASSES] = torch.linspace(-9, 0, 12 * 16).view(12, 16)  # one peak in a corner of each class
    found = find_boxes(maps, GRID, 50)
    assert found.shape == (2, 50, 11)
    assert (found[1, :, 10] > 0).sum() == CLASSES
    assert found.isfinite().all() and (found[..., 3:6] > 0).all()


@pytest.mark.parametrize("size", [-1e4, 1e4])
def test_an_early_answer_has_sides_that_a_box_can_have(size: float) -> None:
    maps = empty_maps()
    maps[:, CLASSES + 3 : CLASSES + 6] = size
    sides = find_boxes(maps, GRID, 4)[..., 3:6]
    assert (sides > 0).all() and sides.max() < 51
