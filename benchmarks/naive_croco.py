"""CroCo as it is written first: the twin that benchmarks compare our step with.

The same weights and the same loss, to rounding. But all patches are embedded and then picked by a boolean mask, target and reference go
through the encoder one after the other, attention is two products with a softmax between them, and AdamW walks from weight to weight.
"""

import copy

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.batch import Batch
from models.config import Grid
from models.decoders import CrossViewDecoder
from models.encoder import VideoEncoder
from models.images import normalise
from models.layers import Block, CrossAttention, DecoderBlock, Mlp, Norm, SelfAttention
from models.pretraining import PretrainingModel


class NaiveCroco(nn.Module):
    """A copy of a CroCo model of single images with sin-cos positions, computed in the plain way."""

    def __init__(self, model: PretrainingModel, grid: Grid) -> None:
        super().__init__()
        own = copy.deepcopy(model)
        self.encoder: VideoEncoder = own.encoder
        self.decoder: CrossViewDecoder = own.objectives["croco"].decoder  # type: ignore[assignment]
        self.grid = grid

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        target, reference = (
            normalise(batch.shared[f"{name}_images"], batch.shared[f"{name}_colours"])[:, 0, 0]
            for name in ("target", "reference")
        )
        is_visible = torch.zeros(len(target), self.grid.tokens, dtype=torch.bool)
        is_visible.scatter_(1, batch.prepared["croco"]["visible"], True)
        prediction = self.decode(self.encode(target, is_visible), is_visible, self.encode(reference, None))
        side = self.encoder.embed.patch_px
        truth = rearrange(target, "B c (h p) (w q) -> B (h w) (p q c)", p=side, q=side)
        truth = (truth - truth.mean(-1, keepdim=True)) / (truth.var(-1, keepdim=True) + 1e-6).sqrt()
        return (prediction.float()[~is_visible] - truth[~is_visible]).square().mean()

    def encode(self, images: Tensor, is_visible: Tensor | None) -> Tensor:
        """(B, n, C) of the visible patches, or of all."""
        embed = self.encoder.embed
        x = F.conv2d(images, embed.weight.sum(2), embed.bias, stride=embed.patch_px).flatten(2).mT
        x = x.float() + self.encoder.tables.added(self.grid, x.device)
        if is_visible is not None:
            x = x[is_visible].view(len(x), -1, x.shape[-1])
        for block in self.encoder.blocks:
            x = run_block(block, x)  # type: ignore[arg-type]
        return normalise_tokens(self.encoder.norm, x)

    def decode(self, visible: Tensor, is_visible: Tensor, reference: Tensor) -> Tensor:
        """(B, N, values) of all patches."""
        decoder = self.decoder
        positions = decoder.tables.added(self.grid, visible.device)
        x = decoder.mask_token.repeat(len(visible), self.grid.tokens, 1)
        x[is_visible] = decoder.embed(visible).float().flatten(0, 1)
        x, memory = x + positions, decoder.embed(reference).float() + positions
        for block in decoder.blocks:
            x = run_decoder_block(block, x, memory)  # type: ignore[arg-type]
        return decoder.head(normalise_tokens(decoder.norm, x))


def run_block(block: Block, x: Tensor) -> Tensor:
    """One block over a batch of sequences."""
    x = x + attend_to_itself(block.attn, normalise_tokens(block.norm1, x))
    return x + widen(block.mlp, normalise_tokens(block.norm2, x))


def run_decoder_block(block: DecoderBlock, x: Tensor, memory: Tensor) -> Tensor:
    """One block that also looks at `memory`."""
    x = x + attend_to_itself(block.attn, normalise_tokens(block.norm1, x))
    x = x + attend_across(block.cross_attn, normalise_tokens(block.norm2, x), normalise_tokens(block.norm_y, memory))
    return x + widen(block.mlp, normalise_tokens(block.norm3, x))


def normalise_tokens(norm: Norm, x: Tensor) -> Tensor:
    """Over the channels of each token."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def widen(mlp: Mlp, x: Tensor) -> Tensor:
    """Two linear maps with a GELU between them."""
    return mlp.fc2(F.gelu(mlp.fc1(x)))


def attend_to_itself(attention: SelfAttention, x: Tensor) -> Tensor:
    """(B, n, C) to the same."""
    q, k, v = rearrange(attention.qkv(x), "B n (three A D) -> three B A n D", three=3, A=attention.heads)
    return attention.proj(mix(q, k, v))


def attend_across(attention: CrossAttention, x: Tensor, memory: Tensor) -> Tensor:
    """(B, n, C) with (B, m, C) to (B, n, C)."""
    q, k, v = (
        rearrange(projection(tokens), "B n (A D) -> B A n D", A=attention.heads)
        for projection, tokens in ((attention.projq, x), (attention.projk, memory), (attention.projv, memory))
    )
    return attention.proj(mix(q, k, v))


def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with all its weights in memory, heads side by side again."""
    weights = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return rearrange(weights @ v, "B A n D -> B n (A D)")


def build_naive_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW as it was before foreach and fused ones."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False, fused=False)
