"""Global matching: what agrees pulls, wherever it stands."""

import torch

from models.heads.matching import match

SIZE = (3, 5)


def features() -> torch.Tensor:
    """Of every place its own direction, far from all others."""
    return 40 * torch.eye(SIZE[0] * SIZE[1])[None]


def test_an_image_matched_with_itself_does_not_move() -> None:
    torch.testing.assert_close(match(features(), features(), SIZE), torch.zeros(1, 2, *SIZE), atol=1e-4, rtol=0)


def test_what_stands_elsewhere_in_the_second_image_has_moved_there() -> None:
    first = features().unflatten(1, SIZE)
    second = first.roll((1, 2), dims=(1, 2)).flatten(1, 2)  # a row down, two columns right
    flow = match(first.flatten(1, 2), second, SIZE)
    inside = flow[0, :, : SIZE[0] - 1, : SIZE[1] - 2]
    torch.testing.assert_close(inside, torch.tensor([2.0, 1.0])[:, None, None].expand_as(inside), atol=1e-4, rtol=0)


def test_features_that_say_nothing_point_to_the_middle() -> None:
    flow = match(torch.zeros(1, 15, 8), torch.zeros(1, 15, 8), SIZE)
    torch.testing.assert_close(flow[0, :, 1, 2], torch.zeros(2))
    torch.testing.assert_close(flow[0, :, 0, 0], torch.tensor([2.0, 1.0]))
