"""Images as the encoder reads them, and as people look at them.

Pixels are bytes up to here; the encoder reads them less ImageNet's mean and divided by its deviation, channel by channel.
For pictures: values as colours, cameras side by side, marks on images.
"""

import math

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

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


def normalise(images: UInt8[Tensor, "B T V 3 H W"]) -> Float[Tensor, "B T V 3 H W"]:
    """Bytes to float32 with ImageNet's mean and deviation."""
    scaled = images.float() / 255
    # Channel by channel, by numbers: a tensor of constants would be copied to the device, which waits for it, in every step.
    for channel, mean, std in zip(scaled.unbind(-3), IMAGENET_MEAN, IMAGENET_STD, strict=True):
        channel.sub_(mean).div_(std)
    return scaled


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
    x, y = flow_m[:, 0].unbind(-1)
    length = torch.hypot(x, y)
    strength = (length / length.amax(dim=(1, 2), keepdim=True).clamp(min=1e-6))[..., None]
    angle = torch.atan2(y, x)[..., None]
    thirds = torch.arange(3, device=flow_m.device) * (2 * math.pi / 3)
    hue = 0.5 + 0.5 * torch.cos(angle - thirds)
    colours = 1 - strength * (1 - hue)  # (B, Y, X, 3)
    return colours.permute(0, 3, 2, 1).flip(2, 3)
