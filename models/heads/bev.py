"""From features seen from above to layers of a map: the last steps of Lift-Splat's decoder (Philion and Fidler 2020), which are also DPT's.

Upsampling to the cells that are asked for, 3 x 3, ReLU, 1 x 1. A fresh head answers almost zero.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class MapHead(nn.Module):
    """Logits of `layers` over a map of `size` cells."""

    def __init__(self, *, width: int, layers: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        """Rows and columns."""
        self.refine = nn.Conv2d(width, width // 2, 3, padding=1)
        self.out = nn.Conv2d(width // 2, layers, 1)
        for parameter in self.out.parameters():
            nn.init.normal_(parameter, std=0.01)

    def forward(self, features: Float[Tensor, "B E Y X"]) -> Float[Tensor, "B layers rows columns"]:
        """Float32."""
        finer = F.interpolate(features, size=self.size, mode="bilinear")
        return self.out(F.relu(self.refine(finer))).float()
