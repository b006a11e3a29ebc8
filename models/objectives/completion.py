"""The part that CroCo and MAE share: what is hidden of a clip is predicted from what is visible, and compared with its pixels.

    loss = mean over masked tokens of mean over their pixels of (prediction - target)^2        (He et al. 2022; Weinzaepfel et al. 2022)

The target of a token is its pixels as the encoder's input has them (ImageNet-normalised and augmented), less their mean and
divided by their deviation: sqrt(unbiased variance + 1e-6), over all three channels, and over the frames of a tubelet, together.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from models.config import Grid
from models.images import denormalise
from models.objectives.base import Encoded

_VARIANCE_EPS = 1e-6
_MASK_GREY = 0.5


@dataclass(frozen=True)
class Completion:
    """What a decoder made of a batch."""

    prediction: Float[Tensor, "B N values"]
    hidden: Float[Tensor, "B N"]
    """1 where the encoder did not see the token."""
    loss: Float[Tensor, " B"]


def measure_completion(
    prediction: Float[Tensor, "B N values"], target: Encoded, grid: Grid, *, normalise_target: bool
) -> Completion:
    """The loss of predictions for all tokens of a target, of which the encoder saw the visible ones; float32 under autocast."""
    visible = target.clips.visible
    assert visible is not None, "a target is masked"
    prediction = prediction.float()
    truth = patchify(target.clips.images, grid)
    if normalise_target:
        mean, deviation = _mean_and_deviation(truth)
        truth = (truth - mean) / deviation
    hidden = torch.ones(truth.shape[:2], device=truth.device).scatter(1, visible, 0.0)
    error = (prediction - truth).square().mean(dim=-1)  # (B, N)
    return Completion(prediction, hidden, (error * hidden).sum(dim=1) / hidden.sum(dim=1))


def draw_completion(done: Completion, target: Encoded, grid: Grid, *, normalise_target: bool) -> dict[str, Tensor]:
    """Masked input, reconstruction and target of the first camera, B T 3 H W by title.

    The reconstruction borrows mean and deviation of each hidden token from the truth, which a normalised prediction
    does not carry, and shows visible tokens as they are.
    """
    truth = patchify(target.clips.images, grid)
    hidden = done.hidden[..., None].bool()
    mean, deviation = _mean_and_deviation(truth)
    predicted = done.prediction * deviation + mean if normalise_target else done.prediction
    frames = target.clips.images.shape[1]
    completed = unpatchify(torch.where(hidden, predicted, truth), grid, frames)
    masks = unpatchify(hidden.expand_as(truth).float(), grid, frames)
    shown = denormalise(target.clips.images)
    return {
        "masked input": first_camera(torch.where(masks.bool(), _MASK_GREY, shown)),
        "reconstruction, patch means given": first_camera(denormalise(completed)),
        "target": first_camera(shown),
    }


def patchify(images: Float[Tensor, "B T V 3 H W"], grid: Grid) -> Float[Tensor, "B N values"]:
    """Pixels of each token, ordered (frame, y, x, channel)."""
    return rearrange(images, "B (t k) V c (h p) (w q) -> B (t V h w) (k p q c)", t=grid.t, h=grid.h, w=grid.w)


def unpatchify(tokens: Float[Tensor, "B N values"], grid: Grid, frames: int) -> Float[Tensor, "B T V 3 H W"]:
    """The inverse of `patchify`; patches are square."""
    k = frames // grid.t
    side = math.isqrt(tokens.shape[-1] // (3 * k))
    axes = {"t": grid.t, "V": grid.v, "h": grid.h, "w": grid.w, "k": k, "p": side, "q": side}
    return rearrange(tokens, "B (t V h w) (k p q c) -> B (t k) V c (h p) (w q)", **axes)


def first_camera(images: Float[Tensor, "B T V 3 H W"]) -> Float[Tensor, "B T 3 H W"]:
    """What a picture has room for."""
    return images[:, :, 0]


def _mean_and_deviation(truth: Float[Tensor, "B N values"]) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(truth, dim=-1, keepdim=True)  # unbiased, as the papers' code has it
    return mean, (variance + _VARIANCE_EPS).sqrt()
