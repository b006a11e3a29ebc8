"""The ViTs of Hugging Face transformers as they lie in its files: ViT, I-JEPA, DINOv2 (with registers) and VideoMAE in, ViT and I-JEPA out.

They name parts of timm's ViT in their own way, and split qkv in three. A ViT with a class token goes out as ViTModel, one without any
as I-JEPA's (Assran et al. 2023), the one ViT there that has none; in both no norm has another eps than ours once config.json says so.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.config import EncoderConfig, Grid
from models.layers import NORM_EPS
from models.layouts.timm import write_timm
from models.layouts.videomae import TABLE_GRID, sinusoid_table

_ROOT = re.compile(r"^(vit|ijepa|dinov2_with_registers|dinov2|videomae)\.")
_IN = (
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.(cls_token|register_tokens|mask_token)$", r"\1"),
    (r"encoder\.layer\.(\d+)\.(?:layernorm_before|norm1)\.", r"blocks.\1.norm1."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1$", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.(?:layernorm_after|norm2)\.", r"blocks.\1.norm2."),
    (r"encoder\.layer\.(\d+)\.(?:intermediate\.dense|mlp\.fc1)\.", r"blocks.\1.mlp.fc1."),
    (r"encoder\.layer\.(\d+)\.(?:output\.dense|mlp\.fc2)\.", r"blocks.\1.mlp.fc2."),
    (r"layernorm\.", "norm."),
)
_OUT = (
    (r"patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"pos_embed$", "embeddings.position_embeddings"),
    (r"cls_token$", "embeddings.cls_token"),
    (r"blocks\.(\d+)\.norm1\.", r"encoder.layer.\1.layernorm_before."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"blocks\.(\d+)\.norm2\.", r"encoder.layer.\1.layernorm_after."),
    (r"blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
    (r"blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
    (r"norm\.", "layernorm."),
)
_PARTS = ("query", "key", "value")
_SPLIT = "encoder.layer.{}.attention.attention."


def to_timm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names for those of a file of transformers; unknown names stay, and are refused as unexpected."""
    bare = {_ROOT.sub("", name): tensor for name, tensor in weights.items()}
    named = {_rename(name, _IN): tensor for name, tensor in bare.items() if ".attention.attention." not in name}
    places = {found[1] for name in bare if (found := re.match(r"encoder\.layer\.(\d+)\.attention\.attention\.", name))}
    for place in sorted(places, key=int):
        named |= _join_qkv(bare, place)
    kernel = named.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 5:  # VideoMAE, whose table lies in no file
        named["pos_embed"] = sinusoid_table(TABLE_GRID.tokens, len(kernel))[None]
    return named


def write_transformers(encoder: Mapping[str, Tensor], grid: Grid) -> dict[str, Tensor]:
    """Weights of a bare encoder of clips with `grid` as transformers stores those of its ViTs; at most one register."""
    timm = write_timm(encoder, grid)
    weights: dict[str, Tensor] = {}
    for name, tensor in timm.items():
        if fused := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(.+)", name):
            pieces = zip(_PARTS, tensor.chunk(3), strict=True)
            weights |= {f"{_SPLIT.format(fused[1])}{part}.{fused[2]}": piece.contiguous() for part, piece in pieces}
        else:
            weights[_rename(name, _OUT)] = tensor
    if "cls_token" in timm:  # its row of the table is zero: ours is in the token
        positions = weights["embeddings.position_embeddings"]
        weights["embeddings.position_embeddings"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    return weights


def describe_transformers(encoder: EncoderConfig, grid: Grid) -> dict[str, Any]:
    """config.json of the ViT that `write_transformers` belong to."""
    shape, patch = encoder.shape, encoder.patch_px
    return {
        "architectures": ["ViTModel" if encoder.registers else "IJepaModel"],
        "model_type": "vit" if encoder.registers else "ijepa",
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.hidden,
        "hidden_act": "gelu",
        "layer_norm_eps": NORM_EPS,
        "image_size": [grid.h * patch, grid.w * patch],
        "patch_size": patch,
        "num_channels": 3,
        "qkv_bias": True,
    }


def _join_qkv(bare: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """The one qkv of block `place`; biases as far as there are any, VideoMAE's keys having none."""
    root, fused = _SPLIT.format(place), f"blocks.{place}.attn.qkv."
    matrices = [bare[f"{root}{part}.weight"] for part in _PARTS if f"{root}{part}.weight" in bare]
    biases = [bare.get(f"{root}{part}.bias", bare.get(f"{root}{part[0]}_bias")) for part in _PARTS]
    joined = {f"{fused}weight": torch.cat(matrices)} if len(matrices) == len(_PARTS) else {}
    known = [bias for bias in biases if bias is not None]
    if known:
        joined[f"{fused}bias"] = torch.cat([torch.zeros_like(known[0]) if bias is None else bias for bias in biases])
    return joined


def _rename(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for theirs, ours in renames:
        if re.match(theirs, name):
            return re.sub(f"^{theirs}", ours, name)
    return name
