"""What MIM4D's loader workers do: which instants of a clip are rendered, what the encoder sees of it, and which rays are cast.

Instants, masks and rays have fixed shapes for every clip; where a frame has too few LiDAR points, rays of colour alone fill up.
numpy only.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from models.config import Grid, Mim4dConfig

_SKY_SHARE = 0.4
"""Rays that LiDAR does not fill look below this share of the image: above is mostly sky."""
_NEAREST_M = 3.0
"""Points nearer to the car's axis are returns of the car itself."""


@dataclass(frozen=True)
class Instants:
    """Which frames of a clip have a volume, and how the encoder's input is cut, by mode."""

    config: Mim4dConfig
    grid: Grid
    """Of a clip of one camera."""
    patch_px: int
    tubelet_frames: int
    cameras: int

    @property
    def is_joint(self) -> bool:
        """Whether instants attend to each other, so that a withheld one must not be in the input."""
        return self.config.mode == "spacetime"

    @property
    def frames(self) -> tuple[int, ...]:
        """The frame of each instant."""
        step = self.tubelet_frames if self.is_joint else 1
        return tuple(range(step - 1, self.grid.t * self.tubelet_frames, step))

    @property
    def targets(self) -> int:
        """Instants that are rendered: one in a clip that has no other."""
        return min(2, len(self.frames))

    @property
    def sources(self) -> int:
        """Instants that a withheld one is rebuilt from."""
        return len(self.frames) - 1

    @property
    def rebuilt(self) -> int:
        """Targets with a rebuilt branch, the first ones."""
        if not self.sources:
            return 0
        return 1 if self.is_joint else self.targets

    @property
    def first_direct(self) -> int:
        """From which target on there is a direct branch: a withheld instant has none where it was not encoded."""
        return self.rebuilt if self.is_joint else 0

    @property
    def group_grid(self) -> Grid:
        """Tokens of one clip as the encoder is given it."""
        v = 1 if self.config.mode == "frame" else self.cameras
        return Grid(len(self.frames) if self.is_joint else 1, v, self.grid.h, self.grid.w)

    @property
    def visible_cells(self) -> int:
        """Of one image, at least one."""
        return max(1, round((1 - self.config.mask_ratio) * math.prod(self.cell_grid)))

    @property
    def cell_grid(self) -> tuple[int, int]:
        """Rows and columns of cells in an image."""
        side = self.config.mask_cell_px // self.patch_px
        return self.grid.h // side, self.grid.w // side

    @property
    def tokens(self) -> int:
        """Of a sample, that the encoder sees."""
        encoded = self.sources if self.is_joint else len(self.frames)
        return encoded * self.cameras * self.visible_cells * (self.config.mask_cell_px // self.patch_px) ** 2


@dataclass(frozen=True)
class Mim4dPreparation:
    """Masks, targets and rays of a clip."""

    instants: Instants
    drop_path_blocks: int
    """Blocks that need numbers; 0 without drop-path."""

    @property
    def config(self) -> Mim4dConfig:
        return self.instants.config

    @property
    def keeps(self) -> frozenset[str]:
        """As Preparation has it."""
        return frozenset({"images", "images_colours", "pix_from_ego", "first_from_ego", "elapsed_s"})

    @property
    def needs(self) -> frozenset[str]:
        """As Preparation has it; LiDAR where it is learnt from."""
        lidar = frozenset({"points_lidar", "first_point", "ego_from_lidar"})
        return self.keeps | lidar if self.config.depth_supervision else self.keeps

    def prepare(self, sample: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """As Preparation has it; M targets, I instants, G groups of the encoder, R rays of a camera:

        targets       M          instants that are rendered; the first ones are rebuilt
        sources       M I-1      the instants that each is rebuilt from
        visible       G n        tokens of each group that the encoder sees
        ray_pixels    M V R 2    (u, v) in the crop
        ray_depth_m   M V R      LiDAR's, along the camera's axis; 0 where there is none
        ray_rgb       M V R 3    bytes as read; the colours of the clip change on the device, these with them
        jitter        M V R 2    where on a ray samples lie
        drop_path     G L 2      where the encoder has it
        """
        instants = self.instants
        targets = self._draw_targets(rng)
        others = [[instant for instant in range(len(instants.frames)) if instant != target] for target in targets]
        visible = self._draw_visible(targets, rng)
        rays = [self._draw_rays(sample, instants.frames[target], rng) for target in targets]
        prepared = {
            "targets": targets,
            "sources": np.array(others, dtype=np.int64).reshape(len(targets), instants.sources),
            "visible": visible,
            "ray_pixels": np.stack([pixels for pixels, _, _ in rays]),
            "ray_depth_m": np.stack([depth_m for _, depth_m, _ in rays]),
            "ray_rgb": np.stack([rgb for _, _, rgb in rays]),
            "jitter": rng.random((len(targets), instants.cameras, self.config.rays, 2), dtype=np.float32),
        }
        if self.drop_path_blocks:
            prepared["drop_path"] = rng.random((len(visible), self.drop_path_blocks, 2), dtype=np.float32)
        return prepared

    def _draw_targets(self, rng: np.random.Generator) -> Int64[np.ndarray, " M"]:
        count, instants = self.instants.targets, len(self.instants.frames)
        if self.config.targets == "any":
            return rng.permutation(instants)[:count].astype(np.int64)
        past = rng.integers(instants - 1, size=count - 1) if count > 1 else np.zeros(0)
        return np.concatenate([[instants - 1], past]).astype(np.int64)

    def _draw_visible(self, targets: Int64[np.ndarray, " M"], rng: np.random.Generator) -> Int64[np.ndarray, "G n"]:
        """Cells are drawn for each image by itself."""
        instants = self.instants
        grid, (rows, columns) = instants.grid, instants.cell_grid
        side = instants.config.mask_cell_px // instants.patch_px
        images = len(instants.frames) * instants.cameras
        shown = np.argsort(rng.random((images, rows * columns)), axis=1)[:, : instants.visible_cells]
        is_shown = np.zeros((images, rows * columns), dtype=bool)
        np.put_along_axis(is_shown, shown, True, axis=1)
        tokens = is_shown.reshape(images, rows, columns).repeat(side, axis=1).repeat(side, axis=2)
        tokens = tokens.reshape(len(instants.frames), instants.cameras, grid.h * grid.w)
        if instants.is_joint:
            tokens[targets[: instants.rebuilt]] = False
        groups = tokens.reshape(-1, instants.group_grid.tokens)
        return np.nonzero(groups)[1].reshape(len(groups), -1).astype(np.int64)

    def _draw_rays(
        self, sample: Mapping[str, np.ndarray], frame: int, rng: np.random.Generator
    ) -> tuple[Float32[np.ndarray, "V R 2"], Float32[np.ndarray, "V R"], np.ndarray]:
        """Rays of all cameras of a frame: through LiDAR points as far as there are some, the rest below the sky."""
        images, count = sample["images"][frame], self.config.rays
        height, width = images.shape[-2:]
        pixels = rng.random((len(images), count, 2), dtype=np.float32)
        pixels = pixels * np.array([width, (1 - _SKY_SHARE) * height], dtype=np.float32) + np.array(
            [0, _SKY_SHARE * height], dtype=np.float32
        )
        depth_m = np.zeros((len(images), count), dtype=np.float32)
        if self.config.depth_supervision:
            points = self._points_in_box(sample, frame)
            for camera, pix_from_ego in enumerate(sample["pix_from_ego"][frame]):
                seen, at_m = project_into(points, pix_from_ego, (width, height))
                chosen = rng.permutation(len(seen))[:count]
                pixels[camera, : len(chosen)], depth_m[camera, : len(chosen)] = seen[chosen], at_m[chosen]
        column, row = np.minimum(pixels, np.array([width - 1, height - 1])).astype(np.int64).transpose(2, 0, 1)
        rgb = images[np.arange(len(images))[:, None], :, row, column]
        return pixels, depth_m, rgb

    def _points_in_box(self, sample: Mapping[str, np.ndarray], frame: int) -> Float32[np.ndarray, "P 3"]:
        """The frame's sweep in the frame of the car, where there is a volume to render it from."""
        first, end = sample["first_point"][frame : frame + 2]
        ego_from_lidar = sample["ego_from_lidar"][frame]
        points = sample["points_lidar"][first:end, :3] @ ego_from_lidar[:3, :3].T + ego_from_lidar[:3, 3]
        is_inside = ((points > self.config.shape.low_m) & (points < self.config.shape.high_m)).all(-1)
        return points[is_inside & (np.linalg.norm(points[:, :2], axis=-1) > _NEAREST_M)]


def project_into(
    points: Float32[np.ndarray, "P 3"], pix_from_ego: Float32[np.ndarray, "3 4"], size_px: tuple[int, int]
) -> tuple[Float32[np.ndarray, "n 2"], Float32[np.ndarray, " n"]]:
    """Pixels, and depths along the axis, of the points that lie in an image of `size_px` (width, height)."""
    projected = points @ pix_from_ego[:, :3].T + pix_from_ego[:, 3]
    projected = projected[projected[:, 2] > 0.5]
    pixels = projected[:, :2] / projected[:, 2:]
    is_inside = ((pixels >= 0) & (pixels < np.array(size_px))).all(-1)
    return pixels[is_inside].astype(np.float32), projected[is_inside, 2].astype(np.float32)
