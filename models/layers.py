"""Transformer blocks over packed tokens.

Pre-norm blocks as CroCo has them (Weinzaepfel et al. 2022): LayerNorm with eps 1e-6, fused qkv with bias, exact GELU, no
LayerScale, no dropout. Linear layers start Xavier-uniform with zero bias. Drop-path (Huang et al. 2016) takes its random
numbers from outside, so a block is a pure function and may be recomputed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.attention import Backend, Segments, attend
from models.config import TransformerShape
from models.positions import Rotation, rotate

NORM_EPS = 1e-6


@dataclass(frozen=True)
class Pack:
    """How packed tokens belong together: who attends to whom, and where each token is."""

    segments: Segments
    backend: Backend
    rotation: Rotation | None = None
    key_rotation: Rotation | None = None
    """Positions of the keys where they are other tokens than the queries; none of both for sin-cos positions."""


class Norm(nn.LayerNorm):
    """LayerNorm computed in float32: FSDP2 may gather its weights in bf16, which torch refuses to mix with float32 tokens on CPU."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class SelfAttention(nn.Module):
    """Multi-head attention of packed tokens to their own sequence."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = build_linear(width, 3 * width)
        self.proj = build_linear(width, width)

    def forward(self, x: Float[Tensor, "N C"], pack: Pack) -> Float[Tensor, "N C"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # (N, A, D) each
        if pack.rotation:
            q, k = rotate(q, pack.rotation), rotate(k, pack.rotation)
        return self.proj(attend(q, k, v, pack.segments, pack.backend).flatten(1))


class CrossAttention(nn.Module):
    """Multi-head attention of packed tokens to the sequence of another view."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projq = build_linear(width, width)
        self.projk = build_linear(width, width)
        self.projv = build_linear(width, width)
        self.proj = build_linear(width, width)

    def forward(self, x: Float[Tensor, "Nq C"], memory: Float[Tensor, "Nk C"], pack: Pack) -> Float[Tensor, "Nq C"]:
        q, k, v = (
            projection(tokens).unflatten(-1, (self.heads, -1))
            for projection, tokens in ((self.projq, x), (self.projk, memory), (self.projv, memory))
        )
        if pack.rotation and pack.key_rotation:
            q, k = rotate(q, pack.rotation), rotate(k, pack.key_rotation)
        return self.proj(attend(q, k, v, pack.segments, pack.backend).flatten(1))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = build_linear(width, hidden)
        self.fc2 = build_linear(hidden, width)

    def forward(self, x: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.norm1 = Norm(shape.width)
        self.attn = SelfAttention(shape.width, shape.heads)
        self.norm2 = Norm(shape.width)
        self.mlp = Mlp(shape.width, shape.hidden)

    def forward(
        self, x: Float[Tensor, "N C"], pack: Pack, branch_scale: Float[Tensor, "2 N 1"] | None = None
    ) -> Float[Tensor, "N C"]:
        """`branch_scale` multiplies what each of the two branches adds to a token: drop-path's 0 or 1 / keep."""
        attended = self.attn(self.norm1(x), pack)
        x = x + (attended if branch_scale is None else attended * branch_scale[0])
        added = self.mlp(self.norm2(x))
        return x + (added if branch_scale is None else added * branch_scale[1])


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention to a memory that stays as it is, MLP; each block normalises the memory itself."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.norm1 = Norm(shape.width)
        self.attn = SelfAttention(shape.width, shape.heads)
        self.norm2 = Norm(shape.width)
        self.norm_y = Norm(shape.width)
        self.cross_attn = CrossAttention(shape.width, shape.heads)
        self.norm3 = Norm(shape.width)
        self.mlp = Mlp(shape.width, shape.hidden)

    def forward(
        self, x: Float[Tensor, "Nq C"], memory: Float[Tensor, "Nk C"], pack: Pack, cross_pack: Pack
    ) -> Float[Tensor, "Nq C"]:
        x = x + self.attn(self.norm1(x), pack)
        x = x + self.cross_attn(self.norm2(x), self.norm_y(memory), cross_pack)
        return x + self.mlp(self.norm3(x))


def build_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with Xavier-uniform weights and zero bias."""
    linear = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def branch_scales(uniforms: Float[Tensor, "B 2"], rate: float, tokens: int) -> Float[Tensor, "2 n 1"]:
    """Drop-path factors of B clips with `tokens` tokens each: a branch of a clip is kept where its number is >= rate."""
    kept = (uniforms >= rate).to(torch.float32) / (1 - rate)
    return kept.T.repeat_interleave(tokens, dim=1)[..., None]
