"""The sections of a run config that describe the encoder and the objectives. Imports no torch.

Sizes follow the ViT literature: tiny and small from DeiT (Touvron et al. 2021), base to huge from Dosovitskiy et al.
2021, giant and gigantic from Zhai et al. 2022.
"""

from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A part of a run config: unknown keys are errors, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TransformerShape(NamedTuple):
    """Width, depth, heads and hidden width of the MLP of a stack of blocks."""

    width: int
    depth: int
    heads: int
    hidden: int


class Grid(NamedTuple):
    """Tokens of a clip along time, cameras, height and width; they lie in this order."""

    t: int
    v: int
    h: int
    w: int

    @property
    def tokens(self) -> int:
        return self.t * self.v * self.h * self.w


ENCODER_SHAPES = {
    "tiny": TransformerShape(192, 12, 3, 768),
    "small": TransformerShape(384, 12, 6, 1536),
    "base": TransformerShape(768, 12, 12, 3072),
    "large": TransformerShape(1024, 24, 16, 4096),
    "huge": TransformerShape(1280, 32, 16, 5120),
    "giant": TransformerShape(1408, 40, 16, 6144),
    "gigantic": TransformerShape(1664, 48, 16, 8192),
}

DECODER_SHAPES = {
    "tiny": TransformerShape(128, 4, 4, 512),
    "small": TransformerShape(512, 8, 16, 2048),
    "base": TransformerShape(768, 12, 12, 3072),
}

EncoderSize = Literal["tiny", "small", "base", "large", "huge", "giant", "gigantic"]
AttentionBackend = Literal["auto", "xformers", "sdpa"]


class EncoderConfig(Section):
    """The video ViT that all objectives share."""

    size: EncoderSize = "base"
    """Width, depth and heads, by the names of the literature."""
    patch_px: int = Field(16, ge=4)
    """Side of a square patch in pixels; halving it makes four times the tokens."""
    tubelet_frames: int = Field(1, ge=1, le=8)
    """Frames that one token spans; 1 for images, 2 for video."""
    positions: Literal["sincos", "rope"] = "rope"
    """Absolute sin-cos tables, or rotary angles over (y, x), and over (t, y, x) when a clip has more than one tubelet."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Probability with which the last block is skipped for a sample; earlier blocks less, linearly."""
    attention: AttentionBackend = "auto"
    """Which kernel runs attention; auto takes xFormers on CUDA where it can run, SDPA elsewhere."""

    @property
    def shape(self) -> TransformerShape:
        return ENCODER_SHAPES[self.size]


class MaskConfig(Section):
    """Which tokens of the target clip are hidden from the encoder."""

    kind: Literal["random", "tube"] = "random"
    """Every tubelet on its own, or the same places in every frame (Tong et al. 2022, VideoMAE)."""
    ratio: float = Field(0.9, gt=0, lt=1)
    """Share of the tokens that is hidden."""


class CrocoConfig(Section):
    """Cross-view completion (Weinzaepfel et al. 2022, 2023)."""

    kind: Literal["croco"] = "croco"
    weight: float = Field(1.0, gt=0)
    """Factor on this objective's loss in the sum over objectives."""
    decoder: Literal["tiny", "small", "base"] = "small"
    """Size of the decoder: small is CroCo's 512 x 8, base is CroCo v2's 768 x 12."""
    mask: MaskConfig = MaskConfig()
    normalise_target: bool = True
    """Regress each patch after subtracting its mean and dividing by its deviation."""


ObjectiveConfig = Annotated[CrocoConfig, Field(discriminator="kind")]
