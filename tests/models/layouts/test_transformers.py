"""ViTs of transformers in and out: only names differ from timm's, so features follow from those."""

import re

import pytest
import torch
from torch import Tensor

from models.config import EncoderConfig, Grid
from models.layouts.plain import fit_encoder
from models.layouts.published import read_published, recognise
from models.layouts.transformers import describe_transformers, to_timm, write_transformers
from models.layouts.videomae import TABLE_GRID
from tests.models.layouts.vits import PATCH_PX, SHAPE, random_timm

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
