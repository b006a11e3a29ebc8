"""ViTs of transformers in and out: only names differ from timm's, so features follow from those."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.config import EncoderConfig, Grid
from models.layers import NORM_EPS
from models.layouts.plain import fit_encoder
from models.layouts.published import read_published, recognise
from models.layouts.transformers import describe_transformers, to_timm, write_transformers
from models.layouts.videomae import TABLE_GRID
from tests.models.layouts.vits import PATCH_PX, SHAPE, our_features, random_timm

GRID = Grid(1, 1, 3, 3)

# The names of two families of blocks in transformers 5.23: those of ViT, I-JEPA and VideoMAE, and those of DINOv2.
VIT = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
DINOV2 = VIT | {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
SCALES = {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
OTHERS = {
    "cls_token": "embeddings.cls_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}


def name_as_transformers(vit: dict[str, Tensor], blocks: dict[str, str], root: str = "") -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for name, tensor in vit.items():
        if not (inside := re.fullmatch(r"blocks\.(\d+)\.(.+?)\.?(weight|bias|)", name)):
            named[root + OTHERS[name]] = tensor
            continue
        place, layer, kind = inside.groups()
        layer_root = f"{root}encoder.layer.{place}."
        if layer == "attn.qkv":
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            named |= {f"{layer_root}attention.attention.{part}.{kind}": piece for part, piece in parts}
        else:
            named[layer_root + (SCALES[layer] if layer in SCALES else f"{blocks[layer]}.{kind}")] = tensor
    return named


@pytest.mark.parametrize(
    ("vit", "blocks", "root"),
    [
        (random_timm(table=10, registers="cls_token"), VIT, ""),
        (random_timm(table=10, registers="cls_token"), VIT, "vit."),
        (random_timm(table=9), VIT, "ijepa."),
        (random_timm(table=10, registers="cls_token register_tokens", scale=True), DINOV2, "dinov2_with_registers."),
    ],
    ids=["vit", "vit under its name", "ijepa", "dinov2"],
)
def test_names_come_in_as_timms(vit: dict[str, Tensor], blocks: dict[str, str], root: str) -> None:
    named = name_as_transformers(vit, blocks, root)
    assert recognise(set(named)) == "transformers"
    found = to_timm(named | {f"{root}embeddings.mask_token": torch.zeros(1), "classifier.bias": torch.zeros(2)})
    assert found.keys() == vit.keys() | {"mask_token", "classifier.bias"}
    assert all(torch.equal(found[name], tensor) for name, tensor in vit.items())


@pytest.mark.parametrize("registers", ["", "cls_token"])
def test_names_go_out_and_come_in_again(registers: str) -> None:
    vit = random_timm(table=10 if registers else 9, registers=registers)
    config = EncoderConfig(size="tiny", patch_px=PATCH_PX, positions="learned", registers=1 if registers else 0)
    weights = fit_encoder(read_published(vit, "timm", GRID), config, GRID).weights
    out = write_transformers(weights, GRID)
    again = fit_encoder(read_published(out, "transformers", GRID), config, GRID).weights
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    described = describe_transformers(config, GRID)
    assert (described["model_type"], described["image_size"]) == ("vit" if registers else "ijepa", [24, 24])
    assert out["embeddings.position_embeddings"].shape == (1, 9 + config.registers, SHAPE.width)


def test_videomae_has_biases_of_queries_and_values_alone_under_either_name() -> None:
    vit = {name: tensor for name, tensor in random_timm(table=9, frames=2).items() if name != "pos_embed"}
    named = name_as_transformers(vit, VIT, "videomae.")
    for name in [name for name in named if name.endswith("key.bias")]:
        del named[name]
    older = {re.sub(r"(query|value)\.bias", lambda found: f"{found[1][0]}_bias", name): tensor for name, tensor in named.items()}
    assert older.keys() != named.keys()
    for names in (named, older):
        found = to_timm(names)
        q, k, v = found["blocks.1.attn.qkv.bias"].chunk(3)
        expected = vit["blocks.1.attn.qkv.bias"].chunk(3)
        assert torch.equal(q, expected[0])
        assert torch.equal(v, expected[2])
        assert not k.any()
        assert read_published(names, "transformers", Grid(1, 1, 3, 3)).table.shape[:3] == (
            TABLE_GRID.t,
            TABLE_GRID.h,
            TABLE_GRID.w,
        )


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_a_missing_part_of_qkv_is_missed(part: str) -> None:
    named = name_as_transformers(random_timm(table=9), VIT)
    del named[f"encoder.layer.1.attention.attention.{part}.weight"]
    with pytest.raises(ValueError, match=r"missing blocks\.1\.attn\.qkv\.weight$"):
        read_published(named, "transformers", GRID)


@pytest.mark.parametrize(
    ("family", "settings", "registers"),
    [
        ("ViT", {}, 1),
        ("IJepa", {}, 0),
        ("Dinov2", {}, 1),
        ("Dinov2WithRegisters", {"num_register_tokens": 4}, 5),
        ("VideoMAE", {"num_frames": 16, "image_size": 14 * PATCH_PX, "use_mean_pooling": False}, 0),
    ],
)
def test_a_model_that_transformers_saves_comes_in_with_its_features(
    family: str, settings: dict[str, Any], registers: int, tmp_path: Path
) -> None:
    model = build_theirs(family, settings)
    model.save_pretrained(tmp_path)
    frames, side = (16, 14) if family == "VideoMAE" else (1, 3)
    grid = Grid(max(1, frames // 2), 1, side, side)
    config = EncoderConfig(
        size="tiny", patch_px=PATCH_PX, positions="learned", registers=registers, tubelet_frames=2 if frames > 1 else 1
    )
    weights = load_file(tmp_path / "model.safetensors")
    assert recognise(set(weights)) == "transformers"
    fitted = fit_encoder(read_published(weights, "transformers", grid), config, grid)
    clips = torch.randn(2, frames, 3, side * PATCH_PX, side * PATCH_PX)
    with torch.no_grad():
        theirs = model(clips if frames > 1 else clips[:, 0]).last_hidden_state
    ours = our_features(fitted, config, grid, clips[:, :, None])
    torch.testing.assert_close(ours, theirs[:, -grid.tokens :], atol=1e-5, rtol=1e-5)


def build_theirs(family: str, settings: dict[str, Any]) -> Any:
    """A model of transformers itself, of our small shape, in which no weight is as it begins."""
    import transformers

    shape = {"hidden_size": SHAPE.width, "num_hidden_layers": SHAPE.depth, "num_attention_heads": SHAPE.heads}
    sizes = {"intermediate_size": SHAPE.hidden, "image_size": 3 * PATCH_PX, "patch_size": PATCH_PX, "layer_norm_eps": NORM_EPS}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(shape | sizes | settings))
    model = getattr(transformers, f"{family}Model")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model
