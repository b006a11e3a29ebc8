"""ViTs as others publish them, small and with random weights, and their forward written down once more in plain torch."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import EncoderConfig, Grid, TransformerShape
from models.encoder import ClipGroup, build_encoder
from models.layouts.plain import FittedEncoder

PATCH_PX = 8
SHAPE = TransformerShape(width=48, depth=3, heads=3, hidden=192)
LAYERS = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}


def random_timm(
    *, table: int, registers: str = "", scale: bool = False, bias: bool = True, frames: int | None = None
) -> dict[str, Tensor]:
    """timm's names: `registers` of `cls_token`, `reg_token`, `register_tokens`, with spaces between, the last two of four tokens."""
    generator, C = torch.Generator().manual_seed(0), SHAPE.width

    def random(*shape: int) -> Tensor:
        return 0.05 * torch.randn(shape, generator=generator)

    kernel = (C, 3, PATCH_PX, PATCH_PX) if frames is None else (C, 3, frames, PATCH_PX, PATCH_PX)
    weights = {"patch_embed.proj.weight": random(*kernel), "patch_embed.proj.bias": random(C), "pos_embed": random(1, table, C)}
    weights |= {name: random(1, 1 if name == "cls_token" else 4, C) for name in registers.split()}
    for place in range(SHAPE.depth):
        root = f"blocks.{place}."
        for name, (rows, columns) in LAYERS.items():
            weights |= {f"{root}{name}.weight": random(rows * C, columns * C), f"{root}{name}.bias": random(rows * C)}
        weights |= {f"{root}{norm}.{kind}": 1 + random(C) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        weights |= {f"{root}{name}.gamma": 1 + random(C) for name in ("ls1", "ls2")} if scale else {}
        if not bias:
            del weights[f"{root}attn.qkv.bias"]
    return weights | {"norm.weight": 1 + random(C), "norm.bias": random(C)}


def timm_features(weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Tokens of patches of timm's VisionTransformer, or DINOv2's, from Dosovitskiy et al. 2021; `images` B 3 H W or B 3 T H W."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)

    kernel, bias = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
    convolve = F.conv3d if kernel.ndim == 5 else F.conv2d
    patches = convolve(images, kernel, bias, stride=kernel.shape[2:]).flatten(2).mT
    x, N = put_tokens(weights, patches), patches.shape[1]
    one = torch.ones(())
    for block in (f"blocks.{place}" for place in range(SHAPE.depth)):
        q, k, v = (
            linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x)).unflatten(-1, (3, SHAPE.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        attended = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + weights.get(f"{block}.ls1.gamma", one) * linear(f"{block}.attn.proj", attended.transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x)))
        x = x + weights.get(f"{block}.ls2.gamma", one) * linear(f"{block}.mlp.fc2", hidden)
    return norm("norm", x)[:, -N:]


def put_tokens(weights: Mapping[str, Tensor], patches: Tensor) -> Tensor:
    """Class token and registers before the patches, each with its row of the table if it has one."""
    names = [name for name in ("cls_token", "reg_token", "register_tokens") if name in weights]
    tokens = torch.cat([weights[name].expand(len(patches), -1, -1) for name in names] + [patches], dim=1)
    table = weights["pos_embed"]
    without_row = tokens.shape[1] - table.shape[1]
    if "register_tokens" in weights:  # DINOv2: a row for the class token and for patches, none for registers
        table = torch.cat([table[:, :1], torch.zeros(1, without_row, SHAPE.width), table[:, 1:]], dim=1)
    elif without_row:  # timm's no_embed_class
        table = torch.cat([torch.zeros(1, without_row, SHAPE.width), table], dim=1)
    return tokens + table


def our_features(fitted: FittedEncoder, config: EncoderConfig, grid: Grid, clips: Tensor) -> Tensor:
    """Those of our encoder with these weights; `clips` B T V 3 H W."""
    encoder = build_encoder(config, grid).eval()
    encoder.load_state_dict(fitted.weights)
    with torch.no_grad():
        return encoder([ClipGroup(clips)])[0]
