"""The cross-view decoder of CroCo: from what is visible of a clip, and a second view, to the pixels of every token.

Encoded tokens are placed on their grid among copies of one mask token; each block attends to the grid itself, then to the
reference, which no block changes (Weinzaepfel et al. 2022, section 3.2). Both views have the same grid.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.attention import Segments, choose_backend, compute_dtype
from models.config import AttentionBackend, Grid, TransformerShape
from models.layers import DecoderBlock, Norm, Pack, build_linear
from models.positions import Positions, PositionTables


class CrossViewDecoder(nn.Module):
    """Predicts `values` numbers for every token of the target's grid."""

    def __init__(
        self,
        shape: TransformerShape,
        *,
        encoder_width: int,
        values: int,
        positions: Positions,
        has_time: bool,
        attention: AttentionBackend = "auto",
    ) -> None:
        super().__init__()
        self.shape = shape
        self.positions = positions
        self.has_time = has_time
        self.attention = attention
        self.tables = PositionTables(positions, shape, has_time=has_time)
        self.embed = build_linear(encoder_width, shape.width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, shape.width))
        self.blocks = nn.ModuleList(DecoderBlock(shape) for _ in range(shape.depth))
        self.norm = Norm(shape.width)
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
        table = self.tables.added(grid, x.device)
        if table is not None:
            x, memory = x + table, memory + table
        B, N, M = len(x), grid.tokens, memory.shape[1]
        x, memory = x.flatten(0, 1), memory.flatten(0, 1)  # (B N, C)
        pack, cross_pack = self._packs(x, grid, B, N, M)
        for block in self.blocks:
            x = block(x, memory, pack, cross_pack)
        return self.head(self.norm(x)).unflatten(0, (B, N))

    def _place_on_grid(self, tokens: Tensor, visible: Tensor, grid: Grid) -> Tensor:
        x = self.mask_token.float().expand(len(tokens), grid.tokens, -1)
        return x.scatter(1, visible[..., None].expand_as(tokens), tokens)

    def _packs(self, x: Tensor, grid: Grid, B: int, N: int, M: int) -> tuple[Pack, Pack]:
        head_width = self.shape.width // self.shape.heads
        backend = choose_backend(self.attention, x.device, dtype=compute_dtype(x), head_width=head_width)
        table = self.tables.rotation(grid, x.device)
        rotation = table and table.of(None, B)
        own, across = Segments.within([N] * B), Segments((N,) * B, (M,) * B)
        return Pack(own, backend, rotation), Pack(across, backend, rotation, rotation)
