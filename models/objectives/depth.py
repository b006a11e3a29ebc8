"""Monocular depth: each image by itself, learnt from the LiDAR points that fall on it.

    g = log(predicted) - log(true),   loss of an image = mean(g^2) - 1/2 mean(g)^2        (Eigen et al. 2014, equation 4)

A sample is a surround clip; each of its images is encoded by itself, so nothing but one image tells the depth of a place. The truth
is sparse and along the camera's axis: the points of the frame's sweep through `pix_from_lidar`; of several that fall on one
pixel the nearest counts, as the others are likely hidden (LiDAR sits above the cameras). The head's answer is a share of the way
between the logarithms of the nearest and the farthest depth.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from models.batch import Batch
from models.config import DepthConfig, EncoderConfig, Grid
from models.encoder import ClipGroup, VideoEncoder
from models.heads.dense import DenseHead
from models.images import denormalise, normalise, paint_depth, tile_cameras
from models.objectives.base import Encoded
from models.objectives.downstream import DownstreamObjective, mean_of_known
from models.objectives.surround_task import draw_drop_path


@dataclass(frozen=True)
class DepthPreparation:
    """Which pixels of a clip have a LiDAR point, and how far it is."""

    config: DepthConfig
    size_px: tuple[int, int]
    """Width and height."""
    drop_path_blocks: int
    """Blocks that need numbers; 0 without drop-path."""
    needs: frozenset[str] = frozenset({"images", "images_colours", "points_lidar", "first_point", "pix_from_lidar"})
    keeps: frozenset[str] = frozenset({"images", "images_colours"})

    def prepare(self, sample: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """As Preparation has it; K points of an image:

        pixel      T V K      row * W + column of each
        truth      T V K      metres along the camera's axis; NaN fills up
        drop_path  T V L 2    where the encoder has it
        """
        T, V = sample["images"].shape[:2]
        pixel = np.zeros((T, V, self.config.points), dtype=np.int64)
        truth = np.full(pixel.shape, np.nan, dtype=np.float32)
        for frame in range(T):
            first, end = sample["first_point"][frame : frame + 2]
            points = sample["points_lidar"][first:end, :3]
            for camera, pix_from_lidar in enumerate(sample["pix_from_lidar"][frame]):
                seen, depth_m = self._look_up(points, pix_from_lidar)
                chosen = rng.permutation(len(seen))[: self.config.points]
                pixel[frame, camera, : len(chosen)], truth[frame, camera, : len(chosen)] = seen[chosen], depth_m[chosen]
        return {"pixel": pixel, "truth": truth, **draw_drop_path(sample["images"], self.drop_path_blocks, rng)}

    def _look_up(
        self, points: Float32[np.ndarray, "P 3"], pix_from_lidar: Float32[np.ndarray, "3 4"]
    ) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """The pixels on which points within range fall, and the depth of the nearest of each."""
        width, height = self.size_px
        u, v, depth_m = (points @ pix_from_lidar[:, :3].T + pix_from_lidar[:, 3]).T
        in_range = (depth_m >= self.config.near_m) & (depth_m <= self.config.far_m)
        divisor = np.where(in_range, depth_m, 1.0)
        u, v = u / divisor, v / divisor
        shown = in_range & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        pixel = np.floor(v[shown]).astype(np.int64) * width + np.floor(u[shown]).astype(np.int64)
        by_depth = np.argsort(depth_m[shown], kind="stable")
        distinct, nearest = np.unique(pixel[by_depth], return_index=True)
        return distinct, depth_m[shown][by_depth][nearest].astype(np.float32)


class DepthObjective(DownstreamObjective):
    """The head of depth."""

    name = "depth"

    def __init__(self, config: DepthConfig, head: DenseHead, grid: Grid, *, images: int) -> None:
        super().__init__()
        self.config = config
        self.head = head
        self.grid = grid
        """Of one image."""
        self.tokens_per_sample = images * grid.tokens

    def clips(self, batch: Batch) -> list[ClipGroup]:
        """Every image as a clip of its own."""
        images = normalise(batch.shared["images"], batch.shared["images_colours"])
        numbers = batch.prepared[self.name].get("drop_path")
        return [
            ClipGroup(
                rearrange(images, "B T V c H W -> (B T V) 1 1 c H W"),
                drop_path=None if numbers is None else numbers.flatten(0, 2),
            )
        ]

    def answer(self, encoded: Sequence[Encoded], batch: Batch) -> Float[Tensor, "B T V K"]:
        """Metres where the truth has points."""
        pixel = batch.prepared[self.name]["pixel"]
        depth_m = self._map_depth(encoded).flatten(1)  # (B T V, H W)
        return depth_m.gather(1, pixel.flatten(0, 2)).view(pixel.shape)

    def measure(self, predicted: Float[Tensor, "B T V K"], truth: Float[Tensor, "B T V K"]) -> Float[Tensor, " B"]:
        """Mean over the images of a clip of Eigen's loss; an image without points counts as zero."""
        known = truth.isfinite()
        difference = torch.where(known, predicted.log() - truth.log(), 0.0)
        g, points = difference.flatten(0, 2), known.flatten(0, 2)
        loss = mean_of_known(g.square(), points) - 0.5 * mean_of_known(g, points).square()  # (B T V)
        return loss.view(truth.shape[:3]).mean(dim=(1, 2))

    def draw(self, encoder: VideoEncoder, batch: Batch) -> dict[str, Tensor]:
        """Images, the depth that is predicted for them, and the LiDAR points that are true: near is red."""
        (group,) = self.clips(batch)
        depth_m = self._map_depth([Encoded(group, encoder([group])[0])])
        B, T, V = batch.shared["images"].shape[:3]
        shown = denormalise(group.images)[:, 0, 0]
        columns = {
            "image": shown,
            "predicted depth": rearrange(paint_depth(depth_m, self.config.far_m), "b H W c -> b c H W"),
            "true depth, LiDAR": self._paint_truth(shown, batch),
        }
        return {
            title: tile_cameras(images.view(B * T, V, *images.shape[1:])).unflatten(0, (B, T))
            for title, images in columns.items()
        }

    def _map_depth(self, encoded: Sequence[Encoded]) -> Float[Tensor, "b H W"]:
        (images,) = encoded
        share = torch.sigmoid(self.head(images.tokens, (self.grid.h, self.grid.w))[:, 0])
        near, far = math.log(self.config.near_m), math.log(self.config.far_m)
        return torch.exp(near + share * (far - near))

    def _paint_truth(self, images: Float[Tensor, "b 3 H W"], batch: Batch) -> Float[Tensor, "b 3 H W"]:
        pixel, truth = (batch.prepared[self.name][name].flatten(0, 2) for name in ("pixel", "truth"))
        colours = paint_depth(truth, self.config.far_m)
        dimmed = 0.4 * images.flatten(2)  # (b, 3, H W)
        for image, where, colour, depth_m in zip(dimmed, pixel, colours, truth, strict=True):
            known = depth_m.isfinite()
            image[:, where[known]] = colour[known].T
        return dimmed.view_as(images)


def build_depth(
    config: DepthConfig, encoder_config: EncoderConfig, encoder: VideoEncoder, grid: Grid, *, cameras: int
) -> DepthObjective:
    """Depth on `encoder`, of surround clips of `cameras` images with `grid` each."""
    head = DenseHead(encoder_width=encoder.shape.width, width=config.head_width, values=1, patch_px=encoder_config.patch_px)
    return DepthObjective(config, head, grid, images=cameras)
