"""The pose head: rotations that are rotations, a fresh head that stands still, and a small difference that is heard."""

import math

import torch

from models.heads.pose import PoseHead, build_transform


def test_any_six_numbers_make_a_rotation() -> None:
    columns = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotation = build_transform(torch.zeros(50, 3, dtype=torch.float64), columns)[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3, dtype=torch.float64).expand(50, 3, 3))
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(50, dtype=torch.float64))


def test_the_columns_of_a_rotation_make_it_whatever_their_length() -> None:
    c, s = math.cos(0.3), math.sin(0.3)
    expected = torch.tensor([[c, -s, 0, 1], [s, c, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1.0]])
    columns = torch.cat([2 * expected[:3, 0], 5 * expected[:3, 1]])
    torch.testing.assert_close(build_transform(expected[None, :3, 3], columns[None])[0], expected)


def test_a_fresh_head_answers_almost_no_motion_and_every_parameter_learns() -> None:
    torch.manual_seed(0)
    head = PoseHead(32)
    answer = head(torch.randn(4, 6, 32), torch.randn(4, 6, 32))
    assert answer.shape == (4, 2, 4, 4)
    assert (answer - torch.eye(4)).abs().max() < 0.5
    answer.square().sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_the_way_back_is_the_way_there_of_the_turned_pair() -> None:
    torch.manual_seed(0)
    head, there, back = PoseHead(32), torch.randn(4, 6, 32), torch.randn(4, 6, 32)
    torch.testing.assert_close(head(back, there), head(there, back).flip(1))


def test_how_the_ways_differ_is_heard_however_little_it_is_beside_what_they_share() -> None:
    torch.manual_seed(0)
    head, shared, differing = PoseHead(32), 10 * torch.randn(4, 6, 32), torch.randn(4, 6, 32)
    little, much = (head(shared + share * differing, shared - share * differing) for share in (0.1, 1.0))
    torch.testing.assert_close(little, much, rtol=0.01, atol=1e-4)
    assert (much[:, 0] - much[:, 1]).abs().max() > 0.01
