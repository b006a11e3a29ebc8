"""timm's VisionTransformer, whose names DINOv2's own files and MAE's share, in and out.

    patch_embed.proj.*   cls_token   reg_token (register_tokens)   pos_embed   blocks.i.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}.*
    blocks.i.{ls1,ls2}.gamma   norm.*

LayerScale (Touvron et al. 2021) multiplies what a branch adds, channel by channel, which the last layer of the branch can do itself: it
is folded into its weight and bias. A qkv without bias gets one of zeros. Heads for classes, MAE's decoder and mask tokens are left out, and
named; whatever else is there is refused, since features would not be the published ones.

Out, registers become the class token and timm's registers, the table has rows for patches alone (timm: no_embed_class).
"""

import math
import re
from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from models.config import Grid
from models.layouts.plain import Pixels, PlainVit
from models.positions import resample_table, sincos_table

_LAYERS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_SCALED = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}
_TOKENS = {"cls_token", "reg_token", "register_tokens", "pos_embed"}
_LEFT_OUT = re.compile(r"(head|fc|classifier|pooler)\.|mask_token$|decoder[._]|encoder_to_decoder\.")
_REASONS = (
    (r"fc_norm\.", "it normalises the mean of its tokens, not each: give the weights from before fine-tuning"),
    (r".*attn\.[qk]_norm\.", "it normalises queries and keys, and our blocks do not"),
    (r".*mlp\.(w12|w3|fc1_g|fc1_x|norm)\.", "its MLP has gates, and ours has none"),
    (r"norm_pre\.|patch_embed\.norm\.", "it normalises tokens before the first block, and ours does not"),
    (r"dist_token|head_dist\.", "it is distilled, with a second class token that is read: give the plain one"),
    (r"rope|.*\brel_pos|.*relative_position", "its positions are of another kind than a table that is added"),
)
_NAMED = 5


def read_timm(
    weights: Mapping[str, Tensor], grid: Grid, *, table_grid: Grid | None = None, pixels: Pixels = "imagenet"
) -> PlainVit:
    """The ViT in `weights`, for a run of clips with `grid`; `table_grid` says the places of its positions where the file does.

    ValueError names what is missing and what is there and must not be.
    """
    kept = {name: tensor for name, tensor in weights.items() if not _LEFT_OUT.match(name)}
    changes = [f"left out: {', '.join(sorted(weights.keys() - kept.keys()))}"] if len(kept) < len(weights) else []
    blocks, notes = _read_blocks(kept)
    kernel = kept["patch_embed.proj.weight"]
    tokens, table = _read_tokens(kept, grid, table_grid)
    return PlainVit(
        blocks=blocks,
        kernel=kernel if kernel.ndim == 5 else kernel[:, :, None],
        bias=kept["patch_embed.proj.bias"],
        table=table,
        registers=tokens,
        pixels=pixels,
        changes=[*changes, *notes],
    )


def write_timm(encoder: Mapping[str, Tensor], grid: Grid) -> dict[str, Tensor]:
    """The bare encoder of clips with `grid`, its positions sin-cos or learned, as timm names an image ViT."""
    registers = encoder.get("registers")
    ours = ("embed.", "table.", "registers")
    weights = {name: tensor for name, tensor in encoder.items() if not name.startswith(ours)}
    weights |= {
        "pos_embed": image_table(encoder, grid)[None],
        "patch_embed.proj.weight": encoder["embed.weight"].sum(dim=2),
        "patch_embed.proj.bias": encoder["embed.bias"],
    }
    if registers is not None:
        weights["cls_token"] = registers[None, :1].contiguous()
        if len(registers) > 1:
            weights["reg_token"] = registers[None, 1:].contiguous()
    return weights


def image_table(encoder: Mapping[str, Tensor], grid: Grid) -> Float[Tensor, "N C"]:
    """What is added to the tokens of a still image."""
    still = Grid(1, 1, grid.h, grid.w)
    if "table.weight" in encoder:
        return resample_table(encoder["table.weight"], still).flatten(0, 2).contiguous()
    return sincos_table(still, len(encoder["embed.bias"]), torch.device("cpu"))


def _read_blocks(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Blocks and last norm as ours have them, and what was done to them."""
    depth = 1 + max((int(found[1]) for name in weights if (found := re.match(r"blocks\.(\d+)\.", name))), default=0)
    layers = [f"blocks.{place}.{layer}" for place in range(depth) for layer in _LAYERS]
    expected = {f"{layer}.{kind}" for layer in (*layers, "norm", "patch_embed.proj") for kind in ("weight", "bias")}
    scales = {f"blocks.{place}.{scale}": f"blocks.{place}.{layer}" for place in range(depth) for scale, layer in _SCALED.items()}
    biases = {f"blocks.{place}.attn.qkv.bias" for place in range(depth)}
    problems = [
        *_name_up("missing", (expected - biases) - weights.keys()),
        *_name_up("unexpected", weights.keys() - expected - scales.keys() - _TOKENS),
    ]
    if problems:
        raise ValueError("; ".join(problems))
    blocks = {name: tensor for name, tensor in weights.items() if name in expected and not name.startswith("patch_embed.")}
    blocks |= {name: torch.zeros(len(blocks[name.replace("bias", "weight")])) for name in biases - blocks.keys()}
    for scale, layer in scales.items():
        if scale in weights:
            blocks[f"{layer}.weight"] = blocks[f"{layer}.weight"] * weights[scale][:, None]
            blocks[f"{layer}.bias"] = blocks[f"{layer}.bias"] * weights[scale]
    notes = ["LayerScale folded into the layers before it"] if scales.keys() & weights.keys() else []
    notes += ["a bias of zeros given to queries, keys and values"] if biases - weights.keys() else []
    return blocks, notes


def _name_up(heading: str, names: set[str]) -> Iterator[str]:
    if not names:
        return
    reasons = [reason for pattern, reason in _REASONS if any(re.match(pattern, name) for name in names)]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    yield f"{heading} {', '.join(sorted(names)[:_NAMED])}{more}" + "".join(f" ({reason})" for reason in reasons)


def _read_tokens(
    weights: Mapping[str, Tensor], grid: Grid, table_grid: Grid | None
) -> tuple[Float[Tensor, "R C"] | None, Float[Tensor, "t h w C"] | None]:
    """Tokens without a place, each with its row of the table, and the rows of patches."""
    parts = [weights[name][0] for name in ("cls_token", "reg_token", "register_tokens") if name in weights]
    tokens = torch.cat(parts) if parts else None
    if "pos_embed" not in weights:
        return tokens, None
    rows = weights["pos_embed"].flatten(0, -2)
    for first in _rows_without_a_place(weights):
        sizes = _sizes_of(len(rows) - first, grid, table_grid)
        if sizes:
            if tokens is not None and first:
                tokens = torch.cat([tokens[:first] + rows[:first], tokens[first:]])
            return tokens, rows[first:].unflatten(0, sizes)
    raise ValueError(
        f"its pos_embed has {len(rows)} rows, which are neither a square of patches nor the {grid.h} x {grid.w} of the run; "
        "give the run the size of images that it was trained on"
    )


def _rows_without_a_place(weights: Mapping[str, Tensor]) -> tuple[int, ...]:
    """How many rows of the table may belong to tokens without a place, the likeliest first."""
    if "cls_token" not in weights:
        return (0,)
    if "reg_token" in weights:
        return (0, 1 + weights["reg_token"].shape[1])
    return (1,) if "register_tokens" in weights else (1, 0)


def _sizes_of(places: int, grid: Grid, table_grid: Grid | None) -> tuple[int, int, int] | None:
    """Tubelets, rows and columns of a table of so many places."""
    if table_grid is not None:
        return (table_grid.t, table_grid.h, table_grid.w) if places == table_grid.tokens else None
    side = math.isqrt(places)
    if side and side**2 == places:
        return 1, side, side
    return (1, grid.h, grid.w) if places == grid.h * grid.w else None
