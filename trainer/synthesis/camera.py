"""A picture of the world: what each pixel sees, its colour, depth, flow and thing.

One ray through the centre of each pixel, with the third coordinate of its direction in the camera equal to 1, so that the
distance along it is the depth. Each box is cast only against the pixels of the rectangle that it projects into; surfaces
are painted once, after all boxes. The ground is z = 0.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8

from trainer.synthesis.boxes import Boxes
from trainer.synthesis.paint import Light, paint_boxes, paint_ground, paint_sky
from trainer.synthesis.pose import multiply

NEAR_M = 0.2
FAR_M = 150.0
_SKY, _GROUND = -1, -2


@dataclass(frozen=True)
class View:
    """Where a camera is and what it is."""

    pix_from_cam: Float[np.ndarray, "3 3"]
    world_from_cam: Float[np.ndarray, "4 4"]
    size_px: tuple[int, int]
    """Width and height."""

    def project(self, world_m: Float[np.ndarray, "*n 3"]) -> tuple[Float[np.ndarray, "*n 2"], Float[np.ndarray, "*n"]]:
        """Pixels and depths of points; pixels of what is behind the camera mean nothing."""
        cam = multiply(world_m - self.world_from_cam[:3, 3], self.world_from_cam[:3, :3])
        depth = cam[..., 2]
        pixels = multiply(cam, self.pix_from_cam.T)
        return pixels[..., :2] / np.where(np.abs(depth) < 1e-9, 1e-9, depth)[..., None], depth

    def rays(self) -> Float[np.ndarray, "n 3"]:
        """World directions through the pixel centres, row by row, of depth 1."""
        width, height = self.size_px
        u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        pixels = np.stack([u, v, np.ones_like(u)], axis=-1).reshape(-1, 3)
        return multiply(multiply(pixels, np.linalg.inv(self.pix_from_cam).T), self.world_from_cam[:3, :3].T)


@dataclass(frozen=True)
class Seen:
    """What each pixel of a view meets first."""

    view: View
    rays: Float[np.ndarray, "n 3"]
    box: Int[np.ndarray, " n"]
    """Row of the box, or _GROUND, or _SKY."""
    depth_m: Float[np.ndarray, " n"]
    """Infinite in the sky."""
    coverage: dict[int, tuple[int, int]]
    """Thing -> pixels that show it, and pixels that would if nothing stood in front."""

    @property
    def points_m(self) -> Float[np.ndarray, "n 3"]:
        """World points; meaningless in the sky."""
        finite = np.where(np.isfinite(self.depth_m), self.depth_m, 0.0)
        return self.view.world_from_cam[:3, 3] + self.rays * finite[:, None]


def look(view: View, boxes: Boxes, *, count_coverage: bool) -> Seen:
    """Cast every pixel's ray against the ground and the boxes."""
    rays = view.rays()
    origin = view.world_from_cam[:3, 3]
    depth = distance_to_ground(origin, rays)
    depth[depth > FAR_M * 4] = np.inf
    box = np.where(np.isfinite(depth), _GROUND, _SKY)
    outlines: dict[int, list[np.ndarray]] = {}
    for row, nearest, pixels in _rectangles(view, boxes):
        is_outlined = count_coverage and boxes.thing[row] >= 0
        if not is_outlined and depth[pixels].max() < nearest:
            continue  # all of it is behind what is there already
        entered = boxes.cast(row, origin, rays[pixels])
        hit = np.isfinite(entered)
        if is_outlined:
            outlines.setdefault(int(boxes.thing[row]), []).append(pixels[hit])
        nearer = hit & (entered < depth[pixels])
        depth[pixels[nearer]] = entered[nearer]
        box[pixels[nearer]] = row
    return Seen(view, rays, box, depth, _count_coverage(boxes, box, outlines))


def distance_to_ground(origin_m: Float[np.ndarray, "3"], rays: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, " n"]:
    """How far along each ray z is 0, in units of the ray; infinity for rays that do not go down."""
    return np.where(rays[:, 2] < -1e-6, origin_m[2] / np.maximum(-rays[:, 2], 1e-6), np.inf)


def paint(seen: Seen, boxes: Boxes, light: Light, *, seed: int) -> UInt8[np.ndarray, "H W 3"]:
    """The colours of what is seen."""
    width, height = seen.view.size_px
    colour = np.empty((len(seen.rays), 3))
    is_sky, is_ground, is_box = seen.box == _SKY, seen.box == _GROUND, seen.box >= 0
    points = seen.points_m
    footprint = np.where(np.isfinite(seen.depth_m), seen.depth_m, 0) / seen.view.pix_from_cam[0, 0]
    colour[is_sky] = paint_sky(seen.rays[is_sky], light)
    # The ground is seen at a slant: along the ray a pixel covers more of it, by the sine of that angle.
    slant = np.clip(np.abs(seen.rays[is_ground, 2]) / np.linalg.norm(seen.rays[is_ground], axis=1), 0.02, 1)
    spread = footprint[is_ground] / np.sqrt(slant)
    colour[is_ground] = paint_ground(points[is_ground, 0], points[is_ground, 1], spread, light, seed=seed)
    rows = seen.box[is_box]
    colour[is_box] = paint_boxes(boxes, rows, boxes.to_local(points[is_box], rows), footprint[is_box], light)
    haze = np.where(np.isfinite(seen.depth_m), 1 - np.exp(-np.nan_to_num(seen.depth_m, posinf=0) / 260.0), 0.0)[:, None]
    colour = colour * (1 - haze) + np.array([0.8, 0.82, 0.85]) * haze
    gamma = np.clip(colour, 0, 1) ** (1 / 1.6)
    return np.round(gamma * 255).astype(np.uint8).reshape(height, width, 3)


def flow_to(seen: Seen, boxes: Boxes, other: View, other_boxes: Boxes) -> Float[np.ndarray, "H W 2"]:
    """Pixels by which what each pixel shows moves until another picture of the same camera, later or before; the sky turns only."""
    width, height = seen.view.size_px
    points = seen.points_m
    is_box = seen.box >= 0
    rows = seen.box[is_box]
    points[is_box] = other_boxes.to_world(boxes.to_local(points[is_box], rows), rows)
    is_sky = seen.box == _SKY
    points[is_sky] = other.world_from_cam[:3, 3] + seen.rays[is_sky] * 1e6
    pixels, depth = other.project(points)
    here = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)
    flow = pixels.reshape(height, width, 2) - here
    flow[(depth < NEAR_M).reshape(height, width)] = np.nan
    return flow


def things_of(seen: Seen, boxes: Boxes) -> Int[np.ndarray, "H W"]:
    """Number of the thing in each pixel, -1 where there is none."""
    width, height = seen.view.size_px
    things = np.where(seen.box >= 0, boxes.thing[np.clip(seen.box, 0, None)], -1)
    return things.reshape(height, width)


def _rectangles(view: View, boxes: Boxes) -> list[tuple[int, float, Int[np.ndarray, " m"]]]:
    """For each box that may be seen: its row, its least depth and the pixels that it may cover; near ones first."""
    width, height = view.size_px
    outline = _outline(view, boxes)  # (K, n, 3) pixels and depth, not finite where there is no point
    ahead = np.isfinite(outline[..., 2])
    low = np.floor(np.where(ahead[..., None], outline[..., :2], np.inf).min(axis=1))
    high = np.ceil(np.where(ahead[..., None], outline[..., :2], -np.inf).max(axis=1))
    nearest = np.where(ahead, outline[..., 2], np.inf).min(axis=1)
    low, high = np.clip(low, 0, (width, height)).astype(int), np.clip(high, 0, (width, height)).astype(int)
    rows = np.flatnonzero(np.all(high > low, axis=1) & (nearest < FAR_M))
    rows = rows[np.argsort(nearest[rows])]
    flat = np.arange(width * height).reshape(height, width)
    return [
        (int(row), float(nearest[row]), flat[low[row, 1] : high[row, 1], low[row, 0] : high[row, 0]].reshape(-1)) for row in rows
    ]


def _outline(view: View, boxes: Boxes) -> Float[np.ndarray, "K 20 3"]:
    """Pixels and depth of the corners of each box and of where its edges cross the near plane; NaN behind it."""
    corners = boxes.corners_m()  # (K, 8, 3)
    depth = view.project(corners)[1]
    first, second = _EDGES.T
    rise = depth[:, second] - depth[:, first]
    share = (NEAR_M - depth[:, first]) / np.where(np.abs(rise) < 1e-9, 1e-9, rise)
    crosses = (share > 0) & (share < 1)
    cuts = corners[:, first] + np.clip(share, 0, 1)[..., None] * (corners[:, second] - corners[:, first])
    points = np.concatenate([corners, cuts], axis=1)
    pixels, depths = view.project(points)
    is_there = np.concatenate([depth >= NEAR_M, crosses], axis=1)
    return np.where(is_there[..., None], np.concatenate([pixels, depths[..., None]], axis=-1), np.nan)


_EDGES = np.array([(a, b) for a in range(8) for b in range(a + 1, 8) if (a ^ b).bit_count() == 1])
"""Corners that differ in one coordinate; corner numbers are those of Boxes.corners_m."""


def _count_coverage(
    boxes: Boxes, box: Int[np.ndarray, " n"], outlines: dict[int, list[np.ndarray]]
) -> dict[int, tuple[int, int]]:
    shown = np.bincount(boxes.thing[box[box >= 0]] + 1)
    counts = {}
    for thing, pixels in outlines.items():
        whole = len(np.unique(np.concatenate(pixels)))
        if whole:
            counts[thing] = (int(shown[thing + 1]) if thing + 1 < len(shown) else 0, whole)
    return counts
