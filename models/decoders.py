"""Decoders that complete: from what is visible of a clip to the pixels of every token.

Encoded tokens are placed on their grid among copies of one mask token, and blocks attend to the grid (He et al. 2022, MAE). CroCo's
decoder attends to a second view as well, after the grid itself; no block changes it (Weinzaepfel et al. 2022, section 3.2). Both
views have the same grid. Letters beside those of `models`: E width of a decoder.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.attention import Segments, choose_backend, compute_dtype
from models.config import AttentionBackend, Grid, TransformerShape
from models.layers import Block, DecoderBlock, Norm, Pack, build_linear
from models.positions import FixedPositions, PositionTables


class CompletingDecoder(nn.Module):
    """What the decoders share: all but how the blocks are walked through."""

    block: type[nn.Module]

    def __init__(
        self,
        shape: TransformerShape,
        *,
        encoder_width: int,
        values: int,
        positions: FixedPositions,
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
        self.blocks = nn.ModuleList(self.block(shape) for _ in range(shape.depth))
        self.norm = Norm(shape.width)
        self.head = build_linear(shape.width, values)
        nn.init.normal_(self.mask_token, std=0.02)

    def place_on_grid(self, tokens: Float[Tensor, "B n C"], visible: Int[Tensor, "B n"], grid: Grid) -> Float[Tensor, "B N E"]:
        """The visible tokens, as wide as the decoder, at their places and the mask token elsewhere."""
        embedded = self.embed(tokens).float()
        x = self.mask_token.float().expand(len(tokens), grid.tokens, -1)
        return self.add_positions(x.scatter(1, visible[..., None].expand_as(embedded), embedded), grid)

    def add_positions(self, x: Float[Tensor, "B N E"], grid: Grid) -> Float[Tensor, "B N E"]:
        """Where positions are a table that is added; rotations come with the attention."""
        table = self.tables.added(grid, x.device)
        return x if table is None else x + table

    def pack(self, x: Float[Tensor, "n E"], grid: Grid, batch: int) -> Pack:
        """Self-attention within each clip."""
        head_width = self.shape.width // self.shape.heads
        backend = choose_backend(self.attention, x.device, dtype=compute_dtype(x), head_width=head_width)
        table = self.tables.rotation(grid, x.device)
        return Pack(Segments.of([(batch, grid.tokens, grid.tokens)]), backend, table and table.of(None, batch))


class SingleViewDecoder(CompletingDecoder):
    """MAE's: a clip by itself."""

    block = Block

    def forward(self, target: Float[Tensor, "B n C"], visible: Int[Tensor, "B n"], grid: Grid) -> Float[Tensor, "B N values"]:
        """Predictions for all tokens, those that were visible included."""
        x = self.place_on_grid(target, visible, grid)  # (B, N, E)
        B, N = x.shape[:2]
        x = x.flatten(0, 1)  # (B N, E)
        pack = self.pack(x, grid, B)
        for block in self.blocks:
            x = block(x, pack)
        return self.head(self.norm(x)).unflatten(0, (B, N))


class CrossViewDecoder(CompletingDecoder):
    """CroCo's: a clip beside a second view."""

    block = DecoderBlock

    def forward(
        self,
        target: Float[Tensor, "B n C"],
        visible: Int[Tensor, "B n"],
        reference: Float[Tensor, "B N C"],
        grid: Grid,
    ) -> Float[Tensor, "B N values"]:
        """Predictions for all tokens, those that were visible included."""
        x = self.place_on_grid(target, visible, grid)  # (B, N, E)
        memory = self.add_positions(self.embed(reference).float(), grid)
        B, N = x.shape[:2]
        M = memory.shape[1]
        x, memory = x.flatten(0, 1), memory.flatten(0, 1)  # (B N, E)
        pack = self.pack(x, grid, B)
        across = Pack(Segments.of([(B, N, M)]), pack.backend, pack.rotation, pack.rotation)
        for block in self.blocks:
            x = block(x, memory, pack, across)
        return self.head(self.norm(x)).unflatten(0, (B, N))
