"""Official checkpoints in and out: names, file forms, and what is refused."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import Grid
from models.official_croco import build_official, export_official, load_official, load_official_weights
from models.pretraining import PretrainingModel, build_model
from tests.models.samples import CROCO, VIDEO_ENCODER, VIDEO_GRID

GRID = Grid(1, 1, 2, 3)
KWARGS: dict[str, Any] = {
    "img_size": (32, 48),
    "enc_embed_dim": 32,
    "enc_depth": 2,
    "enc_num_heads": 2,
    "dec_embed_dim": 16,
    "dec_depth": 1,
    "dec_num_heads": 2,
}
POSITIONS = {"cosine": {"enc_pos_embed", "dec_pos_embed"}, "RoPE100": set()}
ARGS_MODEL = "CroCoNet({}, norm_layer=partial(nn.LayerNorm, eps=1e-6))"


def small_model(pos_embed: str = "RoPE100") -> PretrainingModel:
    torch.manual_seed(0)
    return build_official({**KWARGS, "pos_embed": pos_embed})


def official_names(enc_depth: int, dec_depth: int) -> set[str]:
    """The keys of specs/croco.md 1.7."""
    encoder = [
        f"enc_blocks.{i}.{m}" for i in range(enc_depth) for m in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    ]
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "norm3", "norm_y", "mlp.fc1", "mlp.fc2")
    cross = ("cross_attn.projq", "cross_attn.projk", "cross_attn.projv", "cross_attn.proj")
    decoder = [f"dec_blocks.{i}.{m}" for i in range(dec_depth) for m in (*parts, *cross)]
    single = ["patch_embed.proj", "enc_norm", "decoder_embed", "dec_norm", "prediction_head"]
    return {"mask_token"} | {f"{m}.{kind}" for m in (*encoder, *decoder, *single) for kind in ("weight", "bias")}


@pytest.mark.parametrize("pos_embed", POSITIONS)
def test_exported_names_are_the_official_ones(pos_embed: str) -> None:
    exported = export_official(small_model(pos_embed), GRID)
    assert exported.keys() == official_names(2, 1) | POSITIONS[pos_embed]
    assert exported["patch_embed.proj.weight"].shape == (32, 3, 16, 16)


@pytest.mark.parametrize(
    ("kwargs", "keys"),
    [
        ({}, 349),
        ({"pos_embed": "RoPE100"}, 347),
        ({"pos_embed": "RoPE100", "dec_embed_dim": 768, "dec_depth": 12, "dec_num_heads": 12}, 443),
    ],
    ids=["v1", "v2 small decoder", "v2 base decoder"],
)
def test_published_models_have_as_many_keys(kwargs: dict[str, Any], keys: int) -> None:
    with torch.device("meta"):
        assert len(export_official(build_official(kwargs), Grid(1, 1, 14, 14))) == keys


def v2(weights: dict[str, Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"model": weights, "croco_kwargs": kwargs}


def own_pretraining(weights: dict[str, Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    model = ARGS_MODEL.format(", ".join(f"{name}={value!r}" for name, value in kwargs.items()))
    return {"model": weights, "args": argparse.Namespace(model=model, lr=1e-4), "epoch": 3}


@pytest.mark.parametrize("wrap", [v2, own_pretraining])
@pytest.mark.parametrize("pos_embed", POSITIONS)
def test_every_form_of_file_gives_the_model_back(wrap: Callable[..., dict[str, Any]], pos_embed: str, tmp_path: Path) -> None:
    model = small_model(pos_embed)
    torch.save(wrap(export_official(model, GRID), {**KWARGS, "pos_embed": pos_embed}), tmp_path / "croco.pth")
    torch.manual_seed(1)
    loaded = load_official(tmp_path / "croco.pth")
    assert loaded.encoder.positions == model.encoder.positions
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_file_of_weights_alone_is_the_first_croco(tmp_path: Path) -> None:
    torch.save({"model": export_official(small_model("cosine"), GRID)}, tmp_path / "croco.pth")
    with pytest.raises(ValueError, match="not the sin-cos table of a grid of 14 x 14"):
        load_official(tmp_path / "croco.pth")


def test_a_string_from_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    weights = export_official(small_model(), GRID)
    for text in ("__import__('os').abort()", "CroCoNet(enc_depth=__import__('os').abort())", "abort", "CroCoNet(**extra)", "1 +"):
        torch.save({"model": weights, "args": argparse.Namespace(model=text)}, tmp_path / "croco.pth")
        with pytest.raises(ValueError, match=r"args\.model"):
            load_official(tmp_path / "croco.pth")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no 'model'"):
        load_official(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda weights: weights.pop("enc_norm.bias"), r"missing encoder\.norm\.bias"),
        (lambda weights: weights.update(cls_token=torch.zeros(1)), "unexpected cls_token"),
        (lambda weights: weights.update(mask_token=torch.zeros(1, 1, 8)), r"mask_token \(1, 1, 8\) instead of \(1, 1, 16\)"),
        (lambda weights: weights.update(enc_pos_embed=torch.zeros(6, 32)), "carry enc_pos_embed, so sin-cos positions"),
    ],
    ids=["missing", "unexpected", "misshapen", "other positions"],
)
def test_weights_that_do_not_fit_are_named(change: Callable[[dict[str, Tensor]], Any], problem: str) -> None:
    model = small_model()
    weights = export_official(model, GRID)
    change(weights)
    with pytest.raises(ValueError, match=problem):
        load_official_weights(model, weights)


def test_weights_without_tables_do_not_fit_a_cosine_model() -> None:
    with pytest.raises(ValueError, match="carry no enc_pos_embed"):
        load_official_weights(small_model("cosine"), export_official(small_model(), GRID))


def test_unknown_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="pos_embed is RoPE10;"):
        build_official({**KWARGS, "pos_embed": "RoPE10"})


def test_a_video_kernel_has_no_place_in_croco() -> None:
    with pytest.raises(ValueError, match="a kernel over 2 frames"):
        export_official(build_model(VIDEO_ENCODER, [CROCO], VIDEO_GRID), VIDEO_GRID)
