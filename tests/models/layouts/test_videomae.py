"""VideoMAE in: split biases, and the table that lies in no file."""

import math

import pytest
import torch
from torch import Tensor

from models.config import EncoderConfig, Grid
from models.layouts.plain import fit_encoder
from models.layouts.published import read_published
from models.layouts.videomae import TABLE_GRID, sinusoid_table
from tests.models.layouts.vits import PATCH_PX, SHAPE, our_features, random_timm, timm_features


def random_videomae() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A pre-training's weights under its own names, and the same as a ViT whose keys have a bias of zeros."""
    vit = random_timm(table=TABLE_GRID.tokens, frames=2)
    named = {f"encoder.{name}": tensor for name, tensor in vit.items() if name != "pos_embed"}
    for name in [name for name in named if name.endswith("qkv.bias")]:
        q, k, v = named.pop(name).chunk(3)
        vit[name.removeprefix("encoder.")] = torch.cat([q, torch.zeros_like(k), v])
        named |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
    vit["pos_embed"] = sinusoid_table(TABLE_GRID.tokens, SHAPE.width)[None]
    return named | {
        "decoder.norm.bias": torch.zeros(1),
        "encoder_to_decoder.weight": torch.zeros(1),
        "mask_token": torch.zeros(1),
    }, vit


def test_a_pretraining_comes_in_with_its_features_of_clips() -> None:
    named, vit = random_videomae()
    clips = torch.randn(1, 16, 1, 3, 14 * PATCH_PX, 14 * PATCH_PX)
    config = EncoderConfig(size="tiny", patch_px=PATCH_PX, tubelet_frames=2, positions="learned")
    fitted = fit_encoder(read_published(named, "videomae", TABLE_GRID), config, TABLE_GRID)
    expected = timm_features(vit, clips[:, :, 0].transpose(1, 2))
    torch.testing.assert_close(our_features(fitted, config, TABLE_GRID, clips), expected, atol=2e-5, rtol=1e-5)
    assert fitted.changes == ["left out: decoder.norm.bias, encoder_to_decoder.weight, mask_token"]


def test_another_clip_gets_its_table_resampled_in_space_and_time() -> None:
    named, _ = random_videomae()
    grid = Grid(2, 1, 5, 9)
    config = EncoderConfig(size="tiny", patch_px=PATCH_PX, tubelet_frames=2, positions="learned")
    fitted = fit_encoder(read_published(named, "videomae", grid), config, grid)
    assert fitted.weights["table.weight"].shape == (2, 5, 9, SHAPE.width)
    assert fitted.changes[-1] == "positions of 8 x 14 x 14 resampled to 2 x 5 x 9"


def test_the_table_has_sines_and_cosines_in_turns() -> None:
    table = sinusoid_table(3, 4)
    expected = [[math.sin(p), math.cos(p), math.sin(p / 100), math.cos(p / 100)] for p in range(3)]
    torch.testing.assert_close(table, torch.tensor(expected))


def test_half_a_bias_is_no_bias_of_zeros() -> None:
    named, _ = random_videomae()
    del named["encoder.blocks.2.attn.v_bias"]
    with pytest.raises(ValueError, match=r"unexpected blocks\.2\.attn\.q_bias$"):
        read_published(named, "videomae", TABLE_GRID)


def test_weights_after_fine_tuning_are_refused_with_the_reason() -> None:
    named, _ = random_videomae()
    tuned = {
        name.removeprefix("encoder.").replace("norm.", "fc_norm.", 1) if ".norm." in name else name: t
        for name, t in named.items()
    }
    with pytest.raises(ValueError, match=r"missing norm\.bias, norm\.weight; unexpected fc_norm\.bias.* before fine-tuning"):
        read_published(tuned, "videomae", TABLE_GRID)
