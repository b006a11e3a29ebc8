"""The cross-view decoder of CroCo: from what is visible of a clip, and a second view, to the pixels of every token.

Encoded tokens are placed on their grid among copies of one mask token; each block attends to the grid itself, then to the
reference, which no block changes (Weinzaepfel et al. 2022, section 3.2). Both views have the same grid.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.attention import Segments, choose_backend
from models.config import Grid, TransformerShape
from models.layers import NORM_EPS, DecoderBlock, Pack, build_linear
from models.positions import rotary_table, sincos_table


class CrossViewDecoder(nn.Module):
    """Predicts `values` numbers for every token of the target's grid."""

    def __init__(
        self,
        shape: TransformerShape,
        *,
        encoder_width: int,
        values: int,
        positions: Literal["sincos", "rope"],
        has_time: bool,
        attention: Literal["auto", "xformers", "sdpa"] = "auto",
    ) -> None:
        super().__init__()
        self.shape = shape
        self.positions = positions
        self.has_time = has_time
        self.attention = attention
        self.embed = build_linear(encoder_width, shape.width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, shape.width))
        self.blocks = nn.ModuleList(DecoderBlock(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, eps=NORM_EPS)
        self.head = build_linear(shape.width, values)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        target: Float[Tensor, "B n C"],
        visible: Int[Tensor, "B n"],
        reference: Float[Tensor, "B N C"],
        grid: Grid,
    ) -> Float[Tensor, "B N values"]:
        """Predictions for all tokens, those that were visible included."""
        x = self._place_on_grid(self.embed(target).float(), visible, grid)  # (B, N, C)
        memory = self.embed(reference).float()
        if self.positions == "sincos":
            table = sincos_table(grid, self.shape.width, x.device)
            x, memory = x + table, memory + table
        B, N, M = len(x), grid.tokens, memory.shape[1]
        x, memory = x.flatten(0, 1), memory.flatten(0, 1)  # (B N, C)
        pack, cross_pack = self._packs(grid, B, N, M, x.device)
        for block in self.blocks:
            x = block(x, memory, pack, cross_pack)
        return self.head(self.norm(x)).unflatten(0, (B, N))

    def _place_on_grid(self, tokens: Tensor, visible: Tensor, grid: Grid) -> Tensor:
        x = self.mask_token.float().expand(len(tokens), grid.tokens, -1)
        return x.scatter(1, visible[..., None].expand_as(tokens), tokens)

    def _packs(self, grid: Grid, B: int, N: int, M: int, device: torch.device) -> tuple[Pack, Pack]:
        backend = choose_backend(self.attention, device)
        own, across = Segments.within([N] * B), Segments((N,) * B, (M,) * B)
        if self.positions == "sincos":
            return Pack(own, backend), Pack(across, backend)
        table = rotary_table(grid, self.shape.width // self.shape.heads, device, has_time=self.has_time)
        rotation = table.of(None, B)
        return Pack(own, backend, rotation), Pack(across, backend, rotation, rotation)
