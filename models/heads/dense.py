"""From the tokens of an image to a map over its pixels: a light DPT (Ranftl et al. 2021, "Vision Transformers for Dense Prediction").

DPT's parts as they are: a 1 x 1 projection of the tokens, residual units of two pre-activated 3 x 3 convolutions with a doubling of the
resolution after each, and its output head of 3 x 3, upsampling, 3 x 3, ReLU, 1 x 1. One deviation: DPT fuses the tokens of four blocks,
this head reads the last ones alone, from which ViTDet (Li et al. 2022) builds a pyramid that is as good as a fused one.
A quarter of DPT's channels is the default, no norm. A fresh head answers almost zero.
"""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class DenseHead(nn.Module):
    """Maps of `values` channels over all pixels."""

    def __init__(self, *, encoder_width: int, width: int, values: int, patch_px: int) -> None:
        super().__init__()
        self.patch_px = patch_px
        self.project = nn.Conv2d(encoder_width, width, 1)
        doublings = max(0, (patch_px - 1).bit_length() - 1)  # the output head makes what is left of the way to the pixels
        self.units = nn.ModuleList(ResidualUnit(width) for _ in range(doublings))
        self.gather = nn.Conv2d(width, width // 2, 3, padding=1)
        self.refine = nn.Conv2d(width // 2, width // 2, 3, padding=1)
        self.out = nn.Conv2d(width // 2, values, 1)
        for parameter in self.out.parameters():
            nn.init.normal_(parameter, std=0.01)

    def forward(self, tokens: Float[Tensor, "B n C"], size: tuple[int, int]) -> Float[Tensor, "B values H W"]:
        """Of images with `size` (h, w) patches, float32."""
        h, w = size
        x = self.project(rearrange(tokens, "B (h w) C -> B C h w", h=h, w=w))
        for unit in self.units:
            x = F.interpolate(unit(x), scale_factor=2, mode="bilinear")  # (B, C, 2 h, 2 w)
        pixels = (h * self.patch_px, w * self.patch_px)
        x = F.interpolate(self.gather(x), size=pixels, mode="bilinear")  # (B, C / 2, H, W)
        return self.out(F.relu(self.refine(x))).float()


class ResidualUnit(nn.Module):
    """x += conv(relu(conv(relu(x))))"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        return x + self.second(F.relu(self.first(F.relu(x))))
