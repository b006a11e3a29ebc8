"""From a published ViT to an encoder of ours: kernels over time, other pixels, and a run that says something else."""

import pytest
import torch
import torch.nn.functional as F

from models.config import EncoderConfig, Grid
from models.images import IMAGENET_MEAN, IMAGENET_STD
from models.layouts.plain import fit_encoder, spread_kernel, take_in_pixels
from models.layouts.timm import read_timm
from tests.models.layouts.vits import PATCH_PX, random_timm

GRID = Grid(1, 1, 3, 3)


@pytest.mark.parametrize(("frames", "asked"), [(1, 4), (2, 2), (2, 1), (1, 1)])
def test_a_kernel_embeds_what_stands_still_as_before_over_however_many_frames(frames: int, asked: int) -> None:
    kernel = torch.randn(5, 3, frames, 4, 4)
    spread = spread_kernel(kernel, asked)
    assert spread.shape == (5, 3, asked, 4, 4)
    torch.testing.assert_close(spread.sum(dim=2), kernel.sum(dim=2))


def test_a_kernel_over_two_frames_does_not_become_one_over_four() -> None:
    with pytest.raises(ValueError, match=r"spans 2 frames and encoder\.tubelet_frames is 4; set it to 2, or to 1"):
        spread_kernel(torch.randn(5, 3, 2, 4, 4), 4)


def test_other_pixels_are_taken_in_by_kernel_and_bias() -> None:
    kernel, bias, rgb = torch.randn(5, 3, 1, 4, 4), torch.randn(5), torch.rand(2, 3, 4, 4)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    ours, our_bias = take_in_pixels(kernel, bias, "half")
    expected = F.conv2d((rgb - 0.5) / 0.5, kernel[:, :, 0], bias)
    torch.testing.assert_close(F.conv2d((rgb - mean) / std, ours[:, :, 0], our_bias), expected, atol=1e-5, rtol=1e-5)
    assert take_in_pixels(kernel, bias, "imagenet") == (kernel, bias)


@pytest.mark.parametrize(
    ("encoder", "keys"),
    [
        ({"size": "base"}, "set encoder.size=tiny encoder.registers=1$"),
        ({"patch_px": 16, "registers": 1}, "set encoder.patch_px=8$"),
        ({"positions": "rope", "registers": 1}, "set encoder.positions=learned$"),
        ({"positions": "sincos", "registers": 5}, "set encoder.registers=1 encoder.positions=learned$"),
    ],
)
def test_a_run_of_another_encoder_is_told_what_to_set(encoder: dict[str, object], keys: str) -> None:
    vit = read_timm(random_timm(table=10, registers="cls_token"), GRID)
    config = EncoderConfig.model_validate({"size": "tiny", "patch_px": PATCH_PX, "positions": "learned"} | encoder)
    with pytest.raises(ValueError, match=keys):
        fit_encoder(vit, config, GRID)


def test_a_size_that_none_of_ours_has_is_told_with_those_that_there_are() -> None:
    weights = {name: tensor for name, tensor in random_timm(table=9).items() if not name.startswith("blocks.2.")}
    with pytest.raises(
        ValueError, match=r"2 blocks of width 48 with 192 hidden, and no encoder.size has; there are .*, tiny \(3 of 48, 192\)"
    ):
        fit_encoder(read_timm(weights, GRID), EncoderConfig(size="tiny", patch_px=PATCH_PX, positions="learned"), GRID)
