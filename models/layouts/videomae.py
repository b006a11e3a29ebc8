"""VideoMAE (Tong et al. 2022), in: the encoder of a pre-training under timm's names.

Queries and values have a bias, keys have none. Positions are a fixed 1D table over the tokens of a clip of 16 frames and 224 x 224 pixels
in the order (t, y, x): channel 2i is sin(p / 10000^(2i/C)), channel 2i + 1 its cosine (Vaswani et al. 2017). It lies in no file.
"""

import re
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from models.config import Grid

TABLE_GRID = Grid(8, 1, 14, 14)
_OWN = re.compile(r"(encoder\.)?(patch_embed|blocks|norm|fc_norm)\.")


def to_timm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names for those of VideoMAE's files, decoder and head left as they are."""
    named = {name.removeprefix("encoder.") if _OWN.match(name) else name: tensor for name, tensor in weights.items()}
    roots = [name.removesuffix("q_bias") for name in named if name.endswith("attn.q_bias")]
    for root in roots:
        if f"{root}v_bias" in named:
            queries, values = named.pop(f"{root}q_bias"), named.pop(f"{root}v_bias")
            named[f"{root}qkv.bias"] = torch.cat([queries, torch.zeros_like(queries), values])
    kernel = named.get("patch_embed.proj.weight")
    return named if kernel is None else named | {"pos_embed": sinusoid_table(TABLE_GRID.tokens, len(kernel))[None]}


def sinusoid_table(places: int, width: int) -> Float[Tensor, "N C"]:
    """The 1D table, sines and cosines in turns, float32."""
    frequencies = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(places, dtype=torch.float64)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()
