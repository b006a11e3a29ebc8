"""A plain ViT as others publish it, and how its weights become those of an encoder of ours.

A plain ViT (Dosovitskiy et al. 2021) has pre-norm blocks like ours, a table of positions that is added, and often tokens without a place:
a class token, registers (Darcet et al. 2023). What differs is brought over so that features of a still image stay what they were:

    kernel       spread over the frames of a tubelet, each with an equal part (Carreira and Zisserman 2017), or summed over them
    positions    resampled to the run's grid (models.positions), and repeated in time where they know none
    class token  a register of ours, with its row of the table added; nobody reads it, everybody attends to it
    pixels       another mean and deviation than ImageNet's is a scale and an offset of each channel, which kernel and bias take in

What cannot be brought over is refused with what to change: sizes, patches and positions are the run's to say, not the file's.

Left to whom: names are `timm`'s and its neighbours', files `trainer.importing`'s.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from models.config import ENCODER_SHAPES, EncoderConfig, Grid
from models.images import IMAGENET_MEAN, IMAGENET_STD
from models.positions import resample_table, sincos_table

Pixels = Literal["imagenet", "half"]

_MEAN_AND_STD: dict[Pixels, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "half": ((0.5,) * 3, (0.5,) * 3),
}


@dataclass(frozen=True)
class PlainVit:
    """Weights of a published ViT, apart by what they are."""

    blocks: Mapping[str, Tensor]
    """blocks.* and norm.* under our names."""
    kernel: Float[Tensor, "C 3 k p q"]
    bias: Float[Tensor, " C"]
    table: Float[Tensor, "t h w C"] | None
    """What is added to tokens; none where queries and keys are turned instead."""
    registers: Float[Tensor, "R C"] | None = None
    pixels: Pixels = "imagenet"
    """How images are normalised for it."""
    turns_by_time: bool = False
    """Whether a part of every head turns by time: rotary positions of video, which no published ViT has."""
    changes: Sequence[str] = field(default_factory=list)
    """What was done to the weights on the way here, for people."""

    @property
    def depth(self) -> int:
        return len({name.split(".")[1] for name in self.blocks if name.startswith("blocks.")})

    @property
    def settings(self) -> dict[str, str | int]:
        """What a run must say of its encoder to take this one; `?` for a size that is none of ours."""
        width, hidden = len(self.bias), len(self.blocks["blocks.0.mlp.fc1.bias"])
        sizes = {(shape.width, shape.depth, shape.hidden): name for name, shape in ENCODER_SHAPES.items()}
        return {
            "size": sizes.get((width, self.depth, hidden), "?"),
            "patch_px": self.kernel.shape[-1],
            "registers": 0 if self.registers is None else len(self.registers),
        }


@dataclass(frozen=True)
class FittedEncoder:
    """The weights of a run's encoder, and what was done to get them."""

    weights: dict[str, Tensor]
    changes: list[str]
    turned_by_time: bool
    """As the ViT has it that it was made of."""


def fit_encoder(vit: PlainVit, config: EncoderConfig, grid: Grid) -> FittedEncoder:
    """`vit` as the encoder `config` of clips with `grid`; ValueError says what the run must say to take it."""
    _check_settings(vit, config)
    changes = list(vit.changes)
    kernel, bias = take_in_pixels(vit.kernel, vit.bias, vit.pixels)
    weights = {
        **vit.blocks,
        "embed.weight": spread_kernel(kernel, config.tubelet_frames),
        "embed.bias": bias,
    }
    if vit.pixels != "imagenet":
        changes.append("kernel and bias take images as ImageNet normalises them, where they took (x - 0.5) / 0.5")
    if kernel.shape[2] != config.tubelet_frames:
        changes.append(f"kernel of {_count(kernel.shape[2], 'frame')} made one of {config.tubelet_frames}")
    if vit.registers is not None:
        weights["registers"] = vit.registers
        changes.append(f"{_count(len(vit.registers), 'token')} without a place (class token, registers) kept as registers")
    if config.positions == "learned":
        assert vit.table is not None, "settings were checked"
        wanted = config.table_grid(grid)
        weights["table.weight"] = resample_table(vit.table, wanted).contiguous()
        if vit.table.shape[:3] != (wanted.t, wanted.h, wanted.w):
            changes.append(f"positions of {_say(vit.table.shape[:3])} resampled to {_say((wanted.t, wanted.h, wanted.w))}")
    plain = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    return FittedEncoder(plain, changes, turned_by_time=vit.turns_by_time)


def spread_kernel(kernel: Float[Tensor, "C 3 k p q"], frames: int) -> Float[Tensor, "C 3 n p q"]:
    """A kernel over `frames` that embeds a clip that stands still as `kernel` does; ValueError where neither has one frame."""
    k = kernel.shape[2]
    if k == frames:
        return kernel
    if 1 not in (k, frames):
        raise ValueError(f"its kernel spans {k} frames and encoder.tubelet_frames is {frames}; set it to {k}, or to 1 for images")
    return kernel.sum(dim=2, keepdim=True) if frames == 1 else (kernel / frames).expand(-1, -1, frames, -1, -1)


def take_in_pixels(
    kernel: Float[Tensor, "C 3 k p q"], bias: Float[Tensor, " C"], pixels: Pixels
) -> tuple[Float[Tensor, "C 3 k p q"], Float[Tensor, " C"]]:
    """Kernel and bias for images that are normalised as ImageNet's, from those for `pixels`."""
    if pixels == "imagenet":
        return kernel, bias
    ours, theirs = (torch.tensor(_MEAN_AND_STD[kind], dtype=torch.float64) for kind in ("imagenet", pixels))
    scale, offset = ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]  # theirs = scale * ours + offset
    wide = kernel.double()
    return (wide * scale[:, None, None, None]).float(), (bias.double() + wide.sum(dim=(2, 3, 4)) @ offset).float()


def _check_settings(vit: PlainVit, config: EncoderConfig) -> None:
    settings = vit.settings
    if settings["size"] == "?":
        hidden = len(vit.blocks["blocks.0.mlp.fc1.bias"])
        raise ValueError(
            f"its ViT has {vit.depth} blocks of width {len(vit.bias)} with {hidden} hidden, and no encoder.size has; "
            f"there are {', '.join(f'{name} ({s.depth} of {s.width}, {s.hidden})' for name, s in ENCODER_SHAPES.items())}"
        )
    wrong = [f"encoder.{name}={value}" for name, value in settings.items() if getattr(config, name) != value]
    wrong += [f"encoder.positions={kind}" for kind in _wanted_positions(vit, config)]
    if wrong:
        found = ", ".join(f"{name} {getattr(config, name)}" for name in (*settings, "positions"))
        raise ValueError(f"its encoder is not that of the run, which has {found}; set {' '.join(wrong)}")


def _wanted_positions(vit: PlainVit, config: EncoderConfig) -> Iterator[str]:
    """The kind of positions that the run must have instead of its own, if so."""
    if vit.table is None:
        if config.positions != "rope":
            yield "rope"
    elif config.positions == "rope" or (config.positions == "sincos" and not _is_sincos(vit.table)):
        yield "sincos" if _is_sincos(vit.table) else "learned"


def _is_sincos(table: Float[Tensor, "t h w C"]) -> bool:
    """Whether a table is the fixed one of an image, which then needs no resampling: it is computed for any grid."""
    t, h, w, width = table.shape
    return t == 1 and torch.allclose(
        table.flatten(0, 2).float(), sincos_table(Grid(1, 1, h, w), width, torch.device("cpu")), atol=1e-5
    )


def _say(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
