"""The dense head: shapes for any patch, gradients everywhere, and where a token lies."""

import pytest
import torch

from models.heads.dense import DenseHead


def build_head(patch_px: int) -> DenseHead:
    torch.manual_seed(0)
    return DenseHead(encoder_width=32, width=16, values=2, patch_px=patch_px)


@pytest.mark.parametrize("patch_px", [4, 8, 14, 16])
def test_a_map_has_a_value_for_every_pixel_and_begins_near_zero(patch_px: int) -> None:
    answer = build_head(patch_px)(torch.randn(2, 6, 32), (2, 3))
    assert answer.shape == (2, 2, 2 * patch_px, 3 * patch_px)
    assert answer.dtype == torch.float32
    assert answer.abs().max() < 0.5


def test_every_parameter_learns() -> None:
    head = build_head(8)
    head(torch.randn(2, 6, 32), (2, 3)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in head.parameters())


def test_a_token_changes_its_own_place_most() -> None:
    head, tokens = build_head(8), torch.randn(1, 12, 32)
    other = tokens.clone()
    other[0, 1 * 4 + 2] += 1.0  # row 1, column 2 of 3 x 4
    changed = (head(other, (3, 4)) - head(tokens, (3, 4))).abs().sum(dim=(0, 1)).unflatten(0, (3, 8)).unflatten(2, (4, 8))
    by_patch = changed.sum(dim=(1, 3))
    assert by_patch.argmax() == 1 * 4 + 2
