"""The video ViT: (B T V 3 H W) -> tokens.

A token is a tubelet: `tubelet_frames` frames of one camera by patch_px x patch_px pixels, embedded by one linear map. Only
tokens that stay visible are embedded, and all groups of clips (CroCo's masked target and its whole reference) go through
each block in one packed call, so FSDP2 gathers every block once a step and no kernel waits for a small one.

A clip is one attention segment: space and time attend jointly (Arnab et al. 2021, model 1). Where the bounds of the segments
lie is decided in `_pack` alone. A single frame is embedded by the kernel summed over time, as if it stood still.

Registers (Darcet et al. 2023) are learned tokens without a place that stand in every clip's segment and are not handed out; a ViT's class
token is one. With one frame, one camera and tubelet_frames 1 this is CroCo's encoder, or with registers a plain ViT's
(`models.layouts` takes their weights in and out).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.attention import Segments, choose_backend, compute_dtype
from models.config import AttentionBackend, EncoderConfig, Grid, TransformerShape
from models.layers import Block, Norm, Pack, branch_scales
from models.positions import FixedPositions, LearnedTable, Positions, PositionTables, Rotation, take_tokens


@dataclass(frozen=True)
class ClipGroup:
    """B clips of one shape that are encoded with others in one pack."""

    images: Float[Tensor, "B T V 3 H W"]
    """Normalised as ImageNet's are."""
    visible: Int[Tensor, "B N"] | None = None
    """Ascending indices of the tokens to encode; none encodes all."""
    drop_path: Float[Tensor, "B L 2"] | None = None
    """Uniform numbers in [0, 1) for each block's two branches; none drops nothing."""


class TubeletEmbed(nn.Module):
    """One linear map from the pixels of a tubelet to a token."""

    def __init__(self, width: int, patch_px: int, tubelet_frames: int) -> None:
        super().__init__()
        self.patch_px = patch_px
        self.tubelet_frames = tubelet_frames
        self.weight = nn.Parameter(torch.empty(width, 3, tubelet_frames, patch_px, patch_px))
        self.bias = nn.Parameter(torch.empty(width))
        nn.init.xavier_uniform_(self.weight.view(width, -1))
        bound = self.weight[0].numel() ** -0.5  # what a convolution of torch starts with; CroCo leaves it so
        nn.init.uniform_(self.bias, -bound, bound)

    def grid(self, images: Float[Tensor, "B T V 3 H W"]) -> Grid:
        """Tokens of clips of this shape."""
        _, T, V, _, H, W = images.shape
        assert H % self.patch_px == 0 and W % self.patch_px == 0, f"{self.patch_px} px patches do not tile {H} x {W}"
        assert T == 1 or T % self.tubelet_frames == 0, f"tubelets of {self.tubelet_frames} do not tile {T} frames"
        return Grid(max(1, T // self.tubelet_frames), V, H // self.patch_px, W // self.patch_px)

    def forward(self, images: Float[Tensor, "B T V 3 H W"], visible: Int[Tensor, "B n"] | None) -> Float[Tensor, "B n C"]:
        grid, p, still = self.grid(images), self.patch_px, images.shape[1] == 1
        pixels = rearrange(images, "B (t k) V c (h p) (w q) -> B (t V h w) (c k p q)", t=grid.t, p=p, q=p)
        if visible is not None:
            pixels = pixels.gather(1, visible[..., None].expand(-1, -1, pixels.shape[-1]))
        weight = self.weight.sum(dim=2, keepdim=True) if still else self.weight
        return nn.functional.linear(pixels, weight.flatten(1), self.bias)


class VideoEncoder(nn.Module):
    """Blocks over the packed tokens of any number of groups of clips."""

    def __init__(
        self,
        shape: TransformerShape,
        *,
        patch_px: int,
        tubelet_frames: int,
        positions: FixedPositions | LearnedTable,
        has_time: bool,
        registers: int = 0,
        drop_path: float = 0.0,
        attention: AttentionBackend = "auto",
    ) -> None:
        super().__init__()
        self.shape = shape
        self.has_time = has_time
        self.attention = attention
        self.table = positions if isinstance(positions, LearnedTable) else None
        self.tables = PositionTables(None if isinstance(positions, LearnedTable) else positions, shape, has_time=has_time)
        self.registers = nn.Parameter(0.02 * torch.randn(registers, shape.width)) if registers else None
        self.drop_rates = [drop_path * place / max(1, shape.depth - 1) for place in range(shape.depth)]
        self.embed = TubeletEmbed(shape.width, patch_px, tubelet_frames)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = Norm(shape.width)

    def forward(self, groups: Sequence[ClipGroup]) -> list[Float[Tensor, "B n C"]]:
        """Tokens of each group, normalised, in the order of its visible indices."""
        embedded = [self._put_registers(self._embed(group)) for group in groups]  # (B, R + n, C) each
        sizes = [tokens.shape[:2] for tokens in embedded]
        x = torch.cat([tokens.flatten(0, 1) for tokens in embedded])  # (N, C)
        pack = self._pack(groups, embedded)
        for place, block in enumerate(self.blocks):
            x = block(x, pack, self._branch_scale(groups, embedded, place))
        parts = self.norm(x).split([batch * tokens for batch, tokens in sizes])
        return [part.unflatten(0, size)[:, self.register_count :] for part, size in zip(parts, sizes, strict=True)]

    @property
    def positions(self) -> Positions:
        """Of what kind they are."""
        return self.tables.kind or "learned"

    @property
    def fixed_positions(self) -> FixedPositions:
        """Positions of the same kind for the decoders of other clips; sin-cos where the encoder's are learned."""
        return self.tables.kind or "sincos"

    @property
    def register_count(self) -> int:
        return 0 if self.registers is None else len(self.registers)

    def _embed(self, group: ClipGroup) -> Float[Tensor, "B n C"]:
        tokens = self.embed(group.images, group.visible).float()  # the residual stream is float32 under autocast
        grid = self.embed.grid(group.images)
        table = self.tables.added(grid, tokens.device) if self.table is None else self.table(grid)
        return tokens if table is None else tokens + take_tokens(table, group.visible, tokens.shape[0])

    def _put_registers(self, tokens: Float[Tensor, "B n C"]) -> Float[Tensor, "B m C"]:
        if self.registers is None:
            return tokens
        return torch.cat([self.registers.float().expand(tokens.shape[0], -1, -1), tokens], dim=1)

    def _pack(self, groups: Sequence[ClipGroup], embedded: Sequence[Tensor]) -> Pack:
        backend = choose_backend(
            self.attention,
            embedded[0].device,
            dtype=compute_dtype(embedded[0]),
            head_width=self.shape.width // self.shape.heads,
        )
        rotations = [self._rotation(group) for group in groups]
        rotation = Rotation.join([turn for turn in rotations if turn])
        segments = Segments.of((tokens.shape[0], tokens.shape[1], tokens.shape[1]) for tokens in embedded)
        return Pack(segments, backend, rotation)

    def _rotation(self, group: ClipGroup) -> Rotation | None:
        table = self.tables.rotation(self.embed.grid(group.images), group.images.device)
        B = group.images.shape[0]  # not len, which would fix the batch of a traced encoder
        return table and table.of(group.visible, B).after(self.register_count, B)

    def _branch_scale(self, groups: Sequence[ClipGroup], embedded: Sequence[Tensor], place: int) -> Float[Tensor, "2 N 1"] | None:
        rate = self.drop_rates[place]
        if not self.training or rate == 0:
            return None
        scales = []
        for group, tokens in zip(groups, embedded, strict=True):
            assert group.drop_path is not None, "an encoder with drop-path needs numbers for every group"
            scales.append(branch_scales(group.drop_path[:, place], rate, tokens.shape[1]))
        return torch.cat(scales, dim=1)


def build_encoder(config: EncoderConfig, grid: Grid) -> VideoEncoder:
    """The encoder of a run whose clips have `grid`; positions know time as soon as there is some, or as the config says."""
    return VideoEncoder(
        config.shape,
        patch_px=config.patch_px,
        tubelet_frames=config.tubelet_frames,
        positions=LearnedTable(config.table_grid(grid), config.shape.width)
        if config.positions == "learned"
        else config.positions,
        has_time=config.knows_time(grid),
        registers=config.registers,
        drop_path=config.drop_path,
        attention=config.attention,
    )
