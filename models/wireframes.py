"""3D boxes as people look at them: edges on camera images, and outlines from above.

Edges are drawn as points that are near enough to each other to look like lines, each projected by itself, so that an edge that goes behind
a camera ends where its picture does. A box has the colour of its class; the far ones are drawn first. From above x points up and y
to the left, as the car drives up, and a line leads from the centre of each box to the middle of its front.

Letter: K boxes, whose nine numbers are x, y, z of the centre, length, width, height, yaw, vx, vy; upright in their frame.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.geometry import project

_CLASS_COLOURS = (
    (1.00, 0.62, 0.00),
    (1.00, 0.28, 0.35),
    (0.95, 0.00, 0.85),
    (0.60, 0.30, 1.00),
    (0.85, 0.80, 0.10),
    (0.10, 0.75, 1.00),
    (0.00, 1.00, 0.55),
    (0.75, 1.00, 0.20),
    (1.00, 0.45, 0.75),
    (0.80, 0.80, 0.80),
)
"""Of car, truck, bus, trailer, construction vehicle, pedestrian, motorcycle, bicycle, cone and barrier."""
_ENDS = ((-1, -1), (-1, 1), (1, 1), (1, -1))
"""Corners of a box from above, in halves of its length and width; the last two are its front."""
_POINTS = 200
"""Of one edge."""
_CAR_PX = 3
"""Half a side of the white square that stands for the car itself, seen from above."""
_NEAREST_M = 0.3
"""What is nearer to a camera is not drawn."""


def draw_boxes(
    images: Float[Tensor, "V 3 H W"],
    boxes: Float[Tensor, "K 9"],
    classes: Int[Tensor, " K"],
    pix_from_boxes: Float[Tensor, "V 3 4"],
) -> Float[Tensor, "V 3 H W"]:
    """The images with all boxes on them; `pix_from_boxes` takes the boxes' frame to pixels."""
    boxes, classes = _far_first(boxes, classes)
    edges = torch.cat([_outline(boxes, -1), _outline(boxes, 1), _uprights(boxes), _heading(boxes, -1)], dim=1)  # (K, n, 3)
    H, W = images.shape[-2:]
    drawn, colours = images.clone(), _colours_of(classes, edges.shape[1])
    for image, pix_from_box in zip(drawn, pix_from_boxes, strict=True):
        pixels, depth_m = project(pix_from_box, edges.flatten(0, 1))
        column, row = pixels.floor().clamp(-1, max(H, W)).long().unbind(-1)
        shown = (depth_m > _NEAREST_M) & (column >= 0) & (column < W) & (row >= 0) & (row < H)
        image[:, row[shown], column[shown]] = colours[shown].T
    return drawn


def draw_from_above(
    ground: Float[Tensor, "3 H W"], boxes: Float[Tensor, "K 9"], classes: Int[Tensor, " K"], range_m: float
) -> Float[Tensor, "3 H W"]:
    """Outlines on a square picture that reaches `range_m` to all four sides."""
    boxes, classes = _far_first(boxes, classes)
    edges = torch.cat([_outline(boxes, -1), _heading(boxes, -1)], dim=1)
    size = ground.shape[-1]
    up, left = ((0.5 - along / (2 * range_m)) * size for along in edges.flatten(0, 1)[:, :2].unbind(-1))
    row, column = (along.floor().clamp(-1, size).long() for along in (up, left))
    shown = (row >= 0) & (row < size) & (column >= 0) & (column < size)
    drawn, colours, middle = ground.clone(), _colours_of(classes, edges.shape[1]), size // 2
    drawn[:, middle - _CAR_PX : middle + _CAR_PX, middle - _CAR_PX : middle + _CAR_PX] = 1.0
    drawn[:, row[shown], column[shown]] = colours[shown].T
    return drawn


def _far_first(boxes: Float[Tensor, "K 9"], classes: Int[Tensor, " K"]) -> tuple[Float[Tensor, "K 9"], Int[Tensor, " K"]]:
    order = torch.linalg.vector_norm(boxes[:, :2], dim=-1).argsort(descending=True)
    return boxes[order], classes[order]


def _colours_of(classes: Int[Tensor, " K"], points: int) -> Float[Tensor, "n 3"]:
    """Of every point of every box."""
    return torch.tensor(_CLASS_COLOURS, device=classes.device)[classes].repeat_interleave(points, dim=0)


def _outline(boxes: Float[Tensor, "K 9"], level: int) -> Float[Tensor, "K n 3"]:
    """The four edges at the bottom, -1, or at the top, 1."""
    return torch.cat([_line(boxes, (*_ENDS[i], level), (*_ENDS[(i + 1) % 4], level)) for i in range(4)], dim=1)


def _uprights(boxes: Float[Tensor, "K 9"]) -> Float[Tensor, "K n 3"]:
    return torch.cat([_line(boxes, (*end, -1), (*end, 1)) for end in _ENDS], dim=1)


def _heading(boxes: Float[Tensor, "K 9"], level: int) -> Float[Tensor, "K n 3"]:
    return _line(boxes, (0, 0, level), (1, 0, level))


def _line(boxes: Float[Tensor, "K 9"], start: tuple[int, int, int], end: tuple[int, int, int]) -> Float[Tensor, "K n 3"]:
    """Points between two places of each box, in halves of its sides from its centre."""
    share = torch.linspace(0, 1, _POINTS, device=boxes.device)[:, None]
    first, last = (torch.tensor(place, device=boxes.device, dtype=boxes.dtype) for place in (start, end))
    along, across, up = ((first + share * (last - first)) * boxes[:, None, 3:6] / 2).unbind(-1)  # (K, n)
    cos, sin = torch.cos(boxes[:, 6, None]), torch.sin(boxes[:, 6, None])
    x, y, z = boxes[:, :3, None].unbind(1)
    return torch.stack([x + cos * along - sin * across, y + sin * along + cos * across, z + up], dim=-1)
