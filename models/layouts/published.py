"""Which of the layouts some weights have, by their names alone.

croco         enc_blocks.*                                      videomae       q_bias beside qkv, or encoder.blocks.*
transformers  encoder.layer.*, with or without a model's name   timm           blocks.*; DINOv2's own files and MAE's too
odonata       blocks.* and embed.*, from `odonata export`
"""

from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor

from models.config import Grid
from models.layouts import croco, transformers, videomae
from models.layouts.own import Exported, read_own
from models.layouts.plain import Pixels, PlainVit
from models.layouts.timm import read_timm

_NAMED = 3
Published = Literal["croco", "timm", "transformers", "videomae", "odonata"]

_TO_TIMM: dict[Published, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
    "croco": croco.to_timm,
    "timm": dict,
    "transformers": transformers.to_timm,
    "videomae": videomae.to_timm,
}


def recognise(names: set[str]) -> Published | None:
    """The layout of weights of these names; none where it is no ViT that is known here."""
    if "embed.weight" in names and any(name.startswith("blocks.") for name in names):
        return "odonata"
    if not any(name.endswith(("patch_embed.proj.weight", "patch_embeddings.projection.weight")) for name in names):
        return None
    if any(name.startswith("enc_blocks.") for name in names):
        return "croco"
    if any("encoder.layer." in name for name in names):
        return "transformers"
    if any(name.endswith("attn.q_bias") or name.startswith("encoder.blocks.") for name in names):
        return "videomae"
    return "timm" if any(name.startswith("blocks.") for name in names) else None


def read_published(
    weights: Mapping[str, Tensor],
    layout: Published,
    grid: Grid,
    *,
    exported: Exported | None = None,
    pixels: Pixels = "imagenet",
) -> PlainVit:
    """The ViT in `weights`, for a run of clips with `grid`; ValueError where its weights are not those of a plain ViT.

    `exported` is what a file says that `odonata export` has written, in whatever layout.
    """
    if exported and pixels != "imagenet":
        raise ValueError(f"it was written by `odonata export`, whose images are normalised as ImageNet's, not as {pixels}")
    if layout == "odonata":
        return read_own(weights, exported)
    table_grid = exported.image_grid if exported else None
    timm = _TO_TIMM[layout](weights)
    if "patch_embed.proj.weight" not in timm:
        named = ", ".join(sorted(weights)[:_NAMED])
        raise ValueError(f"its names ({named}, ...) are those of a model that is not known here; give a plain ViT's")
    if layout == "videomae" or timm["patch_embed.proj.weight"].ndim == 5:
        table_grid = videomae.TABLE_GRID
    vit = read_timm(timm, grid, table_grid=table_grid, pixels=pixels)
    if vit.table is None and layout != "croco":
        raise ValueError(
            "it has no pos_embed, so positions of a kind that is not known here; give a ViT with a table of positions"
        )
    return vit
