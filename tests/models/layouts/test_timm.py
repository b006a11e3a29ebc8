"""timm's ViTs in and out: features of patches stay what they were, and what is no plain ViT is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import EncoderConfig, Grid
from models.layouts.plain import fit_encoder
from models.layouts.timm import read_timm, write_timm
from models.positions import resample_table, sincos_table
from tests.models.layouts.vits import PATCH_PX, SHAPE, our_features, random_timm, timm_features

GRID = Grid(1, 1, 3, 3)
IMAGES = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))

VITS: dict[str, tuple[dict[str, Any], int]] = {
    "class token": ({"table": 10, "registers": "cls_token"}, 1),
    "class token without a row": ({"table": 9, "registers": "cls_token"}, 1),
    "no class token": ({"table": 9}, 0),
    "registers with rows": ({"table": 14, "registers": "cls_token reg_token"}, 5),
    "registers without rows": ({"table": 9, "registers": "cls_token reg_token"}, 5),
    "DINOv2": ({"table": 10, "registers": "cls_token register_tokens", "scale": True}, 5),
    "no bias": ({"table": 9, "bias": False}, 0),
}


def config_of(registers: int, **others: Any) -> EncoderConfig:
    return EncoderConfig(size="tiny", patch_px=PATCH_PX, positions="learned", registers=registers, **others)


@pytest.mark.parametrize("vit", VITS.values(), ids=VITS)
def test_a_vit_comes_in_with_its_features_and_goes_out_with_them(vit: tuple[dict[str, Any], int]) -> None:
    settings, registers = vit
    weights, config = random_timm(**settings), config_of(registers)
    fitted = fit_encoder(read_timm(weights, GRID), config, GRID)
    expected = timm_features(weights, IMAGES)
    torch.testing.assert_close(our_features(fitted, config, GRID, IMAGES[:, None, None]), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(timm_features(write_timm(fitted.weights, GRID), IMAGES), expected, atol=1e-5, rtol=1e-5)


def test_a_video_encoder_gives_the_features_of_the_image_for_a_clip_that_stands_still() -> None:
    weights, config = random_timm(table=10, registers="cls_token"), config_of(1, tubelet_frames=2)
    grid = GRID._replace(t=1)
    fitted = fit_encoder(read_timm(weights, grid), config, grid)
    still = IMAGES[:, None, None].expand(-1, 2, -1, -1, -1, -1)
    expected = timm_features(weights, IMAGES)
    torch.testing.assert_close(our_features(fitted, config, grid, still), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_features(fitted, config, grid, still[:, :1]), expected, atol=1e-5, rtol=1e-5)


def test_each_instant_begins_with_the_table_of_the_image_and_another_size_with_a_resampled_one() -> None:
    weights, grid = random_timm(table=9), Grid(2, 1, 3, 5)
    fitted = fit_encoder(read_timm(weights, grid), config_of(0), grid)
    table = fitted.weights["table.weight"]
    square = weights["pos_embed"].unflatten(1, (3, 3))
    assert table.shape == (2, 3, 5, SHAPE.width)
    torch.testing.assert_close(table[0], table[1])
    torch.testing.assert_close(table[0], resample_table(square, Grid(1, 1, 3, 5))[0])
    assert fitted.changes == ["positions of 1 x 3 x 3 resampled to 2 x 3 x 5"]


def test_a_table_that_is_the_fixed_one_needs_no_learning() -> None:
    weights = random_timm(table=9)
    weights["pos_embed"] = sincos_table(GRID, SHAPE.width, torch.device("cpu"))[None]
    config = EncoderConfig(size="tiny", patch_px=PATCH_PX, positions="sincos")
    fitted = fit_encoder(read_timm(weights, GRID), config, GRID)
    torch.testing.assert_close(
        our_features(fitted, config, GRID, IMAGES[:, None, None]), timm_features(weights, IMAGES), atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match=r"set encoder\.positions=sincos"):
        fit_encoder(read_timm(weights, GRID), config.model_copy(update={"positions": "rope"}), GRID)


def test_a_table_of_an_oblong_image_is_taken_where_the_file_or_the_run_says_its_sides() -> None:
    weights = random_timm(table=36)
    assert read_timm(weights, GRID).table.shape[:3] == (1, 6, 6)
    assert read_timm(weights, GRID, table_grid=Grid(1, 1, 4, 9)).table.shape[:3] == (1, 4, 9)
    weights = random_timm(table=15)
    assert read_timm(weights, Grid(4, 1, 3, 5)).table.shape[:3] == (1, 3, 5)
    with pytest.raises(ValueError, match="has 15 rows, which are neither a square of patches nor the 3 x 3 of the run"):
        read_timm(weights, GRID)


def test_what_is_left_out_and_what_is_done_is_said() -> None:
    weights = random_timm(table=10, registers="cls_token", scale=True, bias=False)
    weights |= {"head.weight": torch.zeros(2, 2), "mask_token": torch.zeros(1), "decoder_blocks.0.norm1.bias": torch.zeros(1)}
    assert fit_encoder(read_timm(weights, GRID), config_of(1), GRID).changes == [
        "left out: decoder_blocks.0.norm1.bias, head.weight, mask_token",
        "LayerScale folded into the layers before it",
        "a bias of zeros given to queries, keys and values",
        "1 token without a place (class token, registers) kept as registers",
    ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda vit: vit.pop("norm.bias"), r"missing norm\.bias$"),
        (lambda vit: vit.pop("blocks.1.mlp.fc1.weight"), r"missing blocks\.1\.mlp\.fc1\.weight$"),
        (lambda vit: vit.update(pos_drop=torch.zeros(1)), "unexpected pos_drop$"),
        (
            lambda vit: vit.update({f"blocks.{i}.attn.{qk}_norm.bias": torch.zeros(1) for i in range(3) for qk in "qk"}),
            r"and 1 more \(it normalises q",
        ),
        (lambda vit: vit.update({"fc_norm.weight": vit.pop("norm.weight")}), "before fine-tuning"),
        (lambda vit: vit.update({"norm_pre.weight": torch.zeros(1)}), "before the first block"),
        (lambda vit: vit.update({"blocks.0.mlp.w12.weight": torch.zeros(1)}), "its MLP has gates"),
        (lambda vit: vit.update(dist_token=torch.zeros(1)), "it is distilled"),
    ],
)
def test_what_is_no_plain_vit_is_refused_by_name(change: Callable[[dict[str, Tensor]], Any], sentence: str) -> None:
    weights = random_timm(table=9)
    change(weights)
    with pytest.raises(ValueError, match=sentence):
        read_timm(weights, GRID)
