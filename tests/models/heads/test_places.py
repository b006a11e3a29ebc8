"""Where tokens stand: nothing at first, then what differs from place to place and nothing else."""

import torch

from models.config import ENCODER_SHAPES, Grid
from models.heads.places import PlaceSignal

SHAPE = ENCODER_SHAPES["nano"]
GRID = Grid(1, 1, 2, 3)


def test_a_fresh_signal_leaves_tokens_as_they_are() -> None:
    tokens = torch.randn(2, GRID.tokens, SHAPE.width)
    torch.testing.assert_close(PlaceSignal(SHAPE, GRID)(tokens), tokens, rtol=0, atol=0)


def test_a_learnt_signal_tells_every_place_from_every_other_and_no_sample_from_another() -> None:
    signal = PlaceSignal(SHAPE, GRID)
    torch.nn.init.eye_(signal.project.weight)
    added = signal(torch.zeros(2, GRID.tokens, SHAPE.width))
    torch.testing.assert_close(added[0], added[1], rtol=0, atol=0)
    distances = torch.cdist(added[0], added[0]) + torch.eye(GRID.tokens)
    assert distances.min() > 0.1
