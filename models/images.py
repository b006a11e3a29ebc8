"""Images as the encoder reads them, and as people look at them.

Pixels are bytes up to here; the encoder reads them less ImageNet's mean and divided by its deviation, channel by channel, after a jitter
of their colours by three factors that the loader drew: brightness b, contrast c towards the mean grey m of the clip, saturation s.

    y = clip(b (c (s x + (1 - s) luma(x)) + (1 - c) m), 0, 255)

No order is drawn, since none matters: luma's weights add up to one, so saturation changes the luma of nothing and leaves m
alone, brightness scales m with everything else, and contrast moves along grey, which saturation keeps. Where torchvision's
ColorJitter, and so CroCo's, clips after each of the three we clip once, and we do not round to bytes again. Contrast pulls towards the mean
grey of the whole clip, all frames and cameras, not of each image, so that colours do not flicker. Hue stays, as in CroCo.

For pictures: values as colours, cameras side by side, marks on images.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_LUMA = (0.299, 0.587, 0.114)
"""Rec. 601, as JPEG and Pillow have it."""

_COLOURS = (
    (0.19, 0.07, 0.23),
    (0.27, 0.44, 0.94),
    (0.10, 0.83, 0.76),
    (0.72, 0.93, 0.23),
    (0.98, 0.53, 0.13),
    (0.60, 0.05, 0.01),
)
"""From low to high, dark blue over green to dark red; lightness grows to the middle, hue tells the ends apart."""
_CAMERAS_A_ROW = 3


class Recolouring(NamedTuple):
    """What the jitter does to a value of each sample: clip(own x + grey luma(x) + offset); factors of 1 leave every bit as it is."""

    own: Float[Tensor, " B"]
    grey: Float[Tensor, " B"]
    offset: Float[Tensor, " B"]


def plan_recolouring(images: UInt8[Tensor, "B T V 3 H W"], colours: Float[Tensor, "B 3"]) -> Recolouring:
    """For clips as they were read and their factors of brightness, contrast and saturation."""
    # Sums of whole numbers are exact where these types hold them, so the mean is the same in any batch, on any device, in any order.
    sums = images.sum(dim=-1, dtype=torch.float32).sum(dim=(1, 2, 4), dtype=torch.float64)  # (B, 3)
    mean_grey = _luma(sums.unbind(-1)) / images[0, :, :, 0].numel()
    brightness, contrast, saturation = colours.unbind(-1)
    scale = brightness * contrast
    return Recolouring(scale * saturation, scale * (1 - saturation), (brightness * (1 - contrast) * mean_grey).float())


def recolour(values: Float[Tensor, "B ..."], plan: Recolouring, *, dim: int) -> Float[Tensor, "B ..."]:
    """Values from 0 to 255, red, green and blue along `dim`, in other colours."""
    own, grey, offset = (part.view(-1, *[1] * (values.ndim - 1)) for part in plan)
    luma = _luma(values.unbind(dim)).unsqueeze(dim)
    return torch.addcmul(luma.mul_(grey).add_(offset), values, own).clamp_(0, 255)


def normalise(images: UInt8[Tensor, "B T V 3 H W"], colours: Float[Tensor, "B 3"]) -> Float[Tensor, "B T V 3 H W"]:
    """Bytes to float32, jittered, with ImageNet's mean and deviation."""
    scaled = recolour(images.float(), plan_recolouring(images, colours), dim=-3).div_(255)
    # Channel by channel, by numbers: a tensor of constants would be copied to the device, which waits for it, in every step.
    for channel, mean, std in zip(scaled.unbind(-3), IMAGENET_MEAN, IMAGENET_STD, strict=True):
        channel.sub_(mean).div_(std)
    return scaled


def _luma(rgb: Sequence[Tensor]) -> Tensor:
    red, green, blue = (channel * weight for channel, weight in zip(rgb, _LUMA, strict=True))
    return red.add_(green).add_(blue)


def denormalise(images: Float[Tensor, "B T V 3 H W"]) -> Float[Tensor, "B T V 3 H W"]:
    """Back to [0, 1]."""
    scaled = images.detach().to(torch.float32, copy=True)
    for channel, mean, std in zip(scaled.unbind(-3), IMAGENET_MEAN, IMAGENET_STD, strict=True):
        channel.mul_(std).add_(mean)
    return scaled.clamp_(0, 1)


def colourise(values: Float[Tensor, "*n"]) -> Float[Tensor, "*n 3"]:
    """Colours of values in [0, 1]; what lies outside has the colour of the nearer end."""
    colours = torch.tensor(_COLOURS, device=values.device)
    place = values.detach().float().nan_to_num().clamp(0, 1) * (len(_COLOURS) - 1)
    below = place.long().clamp(max=len(_COLOURS) - 2)
    share = (place - below)[..., None]
    return colours[below] * (1 - share) + colours[below + 1] * share


def tile_cameras(images: Float[Tensor, "B V 3 H W"]) -> Float[Tensor, "B 3 rows columns"]:
    """All cameras of an instant in one image, three in a row; the rest of the last row is white."""
    B, V, _, H, W = images.shape
    columns = min(V, _CAMERAS_A_ROW)
    rows = -(-V // columns)
    tiled = images.new_ones(B, rows * columns, 3, H, W)
    tiled[:, :V] = images
    return tiled.unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5).reshape(B, 3, rows * H, columns * W)


def paint_points(
    images: Float[Tensor, "V 3 H W"],
    camera: Int[Tensor, " K"],
    pixels: Float[Tensor, "K 2"],
    colours: Float[Tensor, "K 3"],
    shown: Bool[Tensor, " K"],
    *,
    radius_px: int = 1,
) -> Float[Tensor, "V 3 H W"]:
    """The images with a small square at every point that is `shown`; later points lie over earlier ones."""
    painted = images.clone()
    H, W = images.shape[-2:]
    for place in torch.nonzero(shown)[:, 0].tolist():
        u, v = (int(value) for value in pixels[place].tolist())
        rows = slice(max(v - radius_px, 0), min(v + radius_px + 1, H))
        columns = slice(max(u - radius_px, 0), min(u + radius_px + 1, W))
        painted[int(camera[place]), :, rows, columns] = colours[place][:, None, None]
    return painted


def paint_depth(depth_m: Float[Tensor, "*n"], far_m: float) -> Float[Tensor, "*n 3"]:
    """Near is red, far is blue, even in the logarithm."""
    near_m = 1.0
    share = torch.log(depth_m.clamp(min=near_m) / near_m) / math.log(far_m / near_m)
    return colourise(1 - share)


def paint_flow(flow_m: Float[Tensor, "B Q Y X 2"]) -> Float[Tensor, "B 3 Y X"]:
    """Of the first source: direction as hue, length as how strong the colour is; x up and y left, as the car drives up."""
    first = flow_m[:, 0]
    longest = torch.linalg.vector_norm(first, dim=-1).amax(dim=(1, 2))
    return turn_up(paint_flow_px(first, longest))


def turn_up(maps: Float[Tensor, "B c Y X"]) -> Float[Tensor, "B c X Y"]:
    """A map with rows along y and columns along x as a picture: x points up and y left, so that the car drives up."""
    return maps.transpose(2, 3).flip(2, 3)


def paint_layers(
    shares: Float[Tensor, "B layers Y X"], colours: Sequence[tuple[float, float, float]]
) -> Float[Tensor, "B 3 X Y"]:
    """Layers of a map, each as strong as its share from 0 to 1, the first on top of the others; a dot is the car."""
    B, layers, Y, X = shares.shape
    painted = shares.new_ones(B, 3, Y, X)
    for layer in reversed(range(layers)):
        colour = torch.tensor(colours[layer], device=shares.device)[:, None, None]
        share = shares[:, layer, None].detach().float()
        painted = painted * (1 - share) + colour * share
    painted[:, :, Y // 2 - 1 : Y // 2 + 1, X // 2 - 1 : X // 2 + 1] = 0.0
    return turn_up(painted)


def paint_lines(
    lines_m: Float[Tensor, "K P 2"], colours: Float[Tensor, "K 3"], half_m: tuple[float, float], *, px_per_m: int = 5
) -> Float[Tensor, "3 rows columns"]:
    """Lines (x, y) around the car on white, later ones over earlier ones; x points up, `half_m` are the reaches along x and y."""
    rows, columns = (round(2 * half * px_per_m) for half in half_m)
    painted = lines_m.new_ones(3, rows, columns)
    steps = 2 * (rows + columns)
    if len(lines_m):
        dense = F.interpolate(lines_m.detach().mT, size=steps, mode="linear", align_corners=True)  # (K, 2, steps)
        row, column = (((half - at) * px_per_m).long() for half, at in zip(half_m, dense.unbind(1), strict=True))
        for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
            places = (row + down).clamp(0, rows - 1), (column + right).clamp(0, columns - 1)
            for line, colour in enumerate(colours):
                painted[:, places[0][line], places[1][line]] = colour[:, None]
    painted[:, rows // 2 - 3 : rows // 2 + 3, columns // 2 - 2 : columns // 2 + 2] = 0.0
    return painted


def paint_flow_px(flow: Float[Tensor, "B H W 2"], longest: Float[Tensor, " B"]) -> Float[Tensor, "B 3 H W"]:
    """Direction as hue, and length as how strong the colour is: fullest at `longest`."""
    x, y = flow.unbind(-1)
    length = torch.hypot(x, y)
    strength = (length / longest[:, None, None].clamp(min=1e-6)).clamp(max=1)[..., None]
    angle = torch.atan2(y, x)[..., None]
    thirds = torch.arange(3, device=flow.device) * (2 * math.pi / 3)
    hue = 0.5 + 0.5 * torch.cos(angle - thirds)
    colours = 1 - strength * (1 - hue)  # (B, H, W, 3)
    return colours.permute(0, 3, 1, 2)
