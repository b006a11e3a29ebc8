"""Where the tokens of one image stand in another: global matching (Xu et al. 2022, GMFlow, equations 1 to 3).

    share(i, j) = softmax over j of f_i . g_j / sqrt(C)        flow(i) = sum over j of share(i, j) place(j) - place(i)

Nothing is learnt here, and no search range is set: features that agree pull each other, whatever lies between. GMFlow's propagation into
what has no match is left to the head that goes on from here.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def match(first: Float[Tensor, "B N C"], second: Float[Tensor, "B N C"], size: tuple[int, int]) -> Float[Tensor, "B 2 h w"]:
    """Flow of images with `size` (h, w) patches from the first to the second, in patches to the right and down, float32."""
    h, w = size
    share = torch.softmax(first.float() @ second.float().mT / first.shape[-1] ** 0.5, dim=-1)  # (B, N, N)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    places = torch.stack([columns, rows], dim=-1).flatten(0, 1).to(share)  # (N, 2)
    return rearrange(share @ places - places, "B (h w) d -> B d h w", h=h)
