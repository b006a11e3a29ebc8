"""SimIPU: contrast a LiDAR sweep with its transformed copy, and with the images around it (Li et al. 2022, AAAI).

    intra   point encoder(sweep) against point encoder(rotated, scaled, mirrored sweep): centres of both, un-transformed, are
            matched one to one by distance (Hungarian), and InfoNCE pulls matched ones together; it alone trains the point encoder
    inter   features of the images where the centres fall on them against the centres' point features, gradient stopped there:
            it alone trains the video encoder, which is the product; the point encoder is thrown away

All geometry is a function of coordinates alone, so it is done in the loader's workers: farthest points, neighbours, matching, and on
which camera, between which four tokens, a centre falls. The device gathers, multiplies and compares.

The preset `reference` is the method as released: points without coordinates, a frozen random head on the points, no gate on
matches, negatives of one rank, batch norm. Deviations that hold for both presets:
    - a video ViT instead of ResNet-50, sampled at its patches' stride; a clip is encoded camera by camera, and the tubelet that
      holds the sweep's frame is sampled; bilinear weights are those of align_corners=False, exact where the release is half a
      cell off; the window's border extends where the release pads with zeros
    - all cameras of a rig: a centre pairs with the one camera in which it lies furthest from the border
    - the second view is encoded without gradients from the start, which gives the same gradients (its head's output was detached)
    - `points.py` and `clouds.py` say what differs there: no feature-space sampling, nearest neighbours, no running statistics
    - one AdamW with the run's schedule for all parts
    - no labels anywhere: the release reads one frame's boxes to steer its augmentation
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor, nn
from torch.nn import functional as F

from models.batch import Batch, Losses
from models.clouds import Cloud, describe_cloud, draw_similarity, match_centres, transform_points
from models.config import Grid, SimipuConfig
from models.contrast import Retrieval, retrieve
from models.encoder import ClipGroup, VideoEncoder
from models.images import colourise, denormalise, normalise, paint_points, tile_cameras
from models.objectives.base import Encoded, Objective, encode
from models.peers import ALONE, Peers
from models.points import PointEncoder, PointLayer, PointNorm

_MAX_YAW_RAD = np.pi / 2
_IN_FRONT_M = 1.0
_NEAREST_M = 1.5
"""Points nearer to the LiDAR are returns of the car itself."""


@dataclass(frozen=True)
class SimipuPreparation:
    """Both views of one sweep as the point encoder reads them, and which centres are pairs."""

    config: SimipuConfig
    grid: Grid
    """Of a clip of one camera."""
    patch_px: int
    tubelet_frames: int
    cameras: int
    drop_path_blocks: int
    """Blocks that need numbers; 0 without drop-path."""
    needs: frozenset[str] = frozenset({"images", "images_colours", "points_lidar", "first_point", "pix_from_lidar"})
    keeps: frozenset[str] = frozenset({"images", "images_colours"})

    def prepare(self, sample: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """As Preparation has it; M centres, P points:

        points_a, points_b      P 4        of the sweep and of its transformed copy, each in its own order
        neighbours_a_i_j, .._b  . k        of level i and ring j
        match                   M          centre of b that belongs to each of a
        match_distance_m        M          between them, transformation undone
        match_valid             M          whether they are a pair
        pixels                  M 2        (u, v) of each centre of a in camera
        camera                  M          in which it is seen, best
        pair_valid              M          whether it is seen and kept
        corners, corner_weights M 4        tokens of the sample around it, and their bilinear weights
        frame                              of the clip, whose sweep it is
        drop_path               V L 2      where the encoder has it
        """
        frame, points = self._draw_points(sample, rng)
        similarity = draw_similarity(rng, max_yaw_rad=_MAX_YAW_RAD, min_scale=0.75, max_scale=1.25, flip_share=0.5)
        first = describe_cloud(points, self.config.shape)
        transformed = points[rng.permutation(len(points))]
        transformed[:, :3] = transform_points(similarity.matrix, transformed[:, :3])
        second = describe_cloud(transformed, self.config.shape)
        has_points = len(sample["points_lidar"]) > 0 and bool(np.any(points))
        seen = self._project(first, sample["pix_from_lidar"][frame])
        is_distinct = np.arange(self.config.shape.centres) < (first.distinct if has_points else 0)
        prepared = {
            **_cloud_arrays(first, "a"),
            **_cloud_arrays(second, "b"),
            **self._match(first, second, np.linalg.inv(similarity.matrix), is_distinct),
            **self._pair(seen, frame, is_distinct),
            "frame": np.array(frame, dtype=np.int64),
        }
        if self.drop_path_blocks:
            prepared["drop_path"] = rng.random((self.cameras, self.drop_path_blocks, 2), dtype=np.float32)
        return prepared

    def _draw_points(self, sample: Mapping[str, np.ndarray], rng: np.random.Generator) -> tuple[int, Float32[np.ndarray, "P 4"]]:
        """The points of one frame's sweep that are in range, as many as the encoder takes: some twice where there are fewer."""
        counts = np.diff(sample["first_point"])
        frame = int(rng.choice(np.flatnonzero(counts))) if counts.any() else 0
        points = sample["points_lidar"][sample["first_point"][frame] : sample["first_point"][frame + 1]]
        distance_m = np.linalg.norm(points[:, :3], axis=-1)
        points = points[(distance_m > _NEAREST_M) & (distance_m < self.config.max_range_m)]
        count = self.config.shape.points
        if not len(points):
            return frame, np.zeros((count, 4), dtype=np.float32)
        return frame, points[rng.choice(len(points), count, replace=len(points) < count)]

    def _match(self, first: Cloud, second: Cloud, undo: np.ndarray, is_distinct: Bool[np.ndarray, " M"]) -> dict[str, np.ndarray]:
        M, gate_m = self.config.shape.centres, self.config.match_gate_m
        centres = transform_points(undo, second.points[:M, :3])
        match, distance_m = match_centres(first.points[:M, :3], centres, gate_m=gate_m)
        is_pair = is_distinct & (match < second.distinct)
        if gate_m is not None:
            is_pair &= distance_m <= gate_m
        return {"match": match, "match_distance_m": distance_m, "match_valid": is_pair}

    def _project(self, cloud: Cloud, pix_from_lidar: Float32[np.ndarray, "V 3 4"]) -> "_Seen":
        """Where each centre is seen: of several cameras the one in which it lies furthest from the border."""
        centres = cloud.points[: self.config.shape.centres, :3].astype(np.float64)
        projected = np.einsum("vij,mj->vmi", pix_from_lidar[..., :3].astype(np.float64), centres) + pix_from_lidar[:, None, :, 3]
        depth_m = projected[..., 2]
        pixels = projected[..., :2] / np.where(depth_m > _IN_FRONT_M, depth_m, np.inf)[..., None]  # (V, M, 2)
        size_px = self.patch_px * np.array([self.grid.w, self.grid.h])
        inside_px = np.minimum(pixels, size_px - pixels).min(-1)
        inside_px = np.where(depth_m > _IN_FRONT_M, inside_px, -1.0)
        camera = inside_px.argmax(0)
        chosen = camera, np.arange(len(centres))
        return _Seen(camera, pixels[chosen], depth_m[chosen], inside_px[chosen] > 0)

    def _pair(self, seen: "_Seen", frame: int, is_distinct: Bool[np.ndarray, " M"]) -> dict[str, np.ndarray]:
        is_pair = seen.is_inside & is_distinct
        size_px = self.patch_px * np.array([self.grid.w, self.grid.h])
        pixels = np.clip(seen.pixels, 0, size_px - 1e-3)
        tubelet = min(frame // self.tubelet_frames, self.grid.t - 1)
        first_token = (seen.camera * self.grid.t + tubelet) * self.grid.h * self.grid.w
        if self.config.one_pair_per_patch:
            column, row = (pixels // self.patch_px).astype(np.int64).T
            is_pair = keep_nearest(first_token + row * self.grid.w + column, seen.depth_m, is_pair)
        corners, weights = bilinear_corners(pixels / self.patch_px, self.grid)
        return {
            "pixels": pixels.astype(np.float32),
            "camera": seen.camera.astype(np.int64),
            "pair_valid": is_pair,
            "corners": first_token[:, None] + corners,
            "corner_weights": weights,
        }


class _Seen(NamedTuple):
    camera: Int[np.ndarray, " M"]
    pixels: Float[np.ndarray, "M 2"]
    depth_m: Float[np.ndarray, " M"]
    is_inside: Bool[np.ndarray, " M"]


class ProjectionHead(nn.Module):
    """Three linear maps, a norm after each and ReLU between them, to unit vectors."""

    def __init__(self, width: int, out: int, norm: PointNorm) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PointLayer(width, size, norm) for size in (width, width, out))

    def forward(self, x: Float[Tensor, "*n C"]) -> Float[Tensor, "*n E"]:
        first, second, last = self.layers
        flat = last(F.relu(second(F.relu(first(x.flatten(0, -2))))))
        return F.normalize(flat.float(), dim=-1).unflatten(0, x.shape[:-1])


class Compared(NamedTuple):
    """Unit vectors of every centre, one to one."""

    view: Float[Tensor, "B M E"]
    """Of the sweep, for its contrast with the transformed copy."""
    other_view: Float[Tensor, "B M E"]
    image: Float[Tensor, "B M E"]
    point: Float[Tensor, "B M E"]


class SimipuObjective(Objective):
    """Point encoder and heads, and both contrasts."""

    name = "simipu"

    def __init__(self, config: SimipuConfig, points: PointEncoder, *, encoder_width: int, grid: Grid, cameras: int) -> None:
        super().__init__()
        self.config = config
        self.grid = grid
        self.cameras = cameras
        self.tokens_per_sample = cameras * grid.tokens
        self.points = points
        self.view_head = ProjectionHead(config.shape.width, config.embedding, config.norm)
        self.image_head = ProjectionHead(encoder_width, config.embedding, config.norm)
        self.point_head = ProjectionHead(config.shape.width, config.embedding, config.norm)
        if config.stop_gradient == "head":
            self.point_head.requires_grad_(False)

    def clips(self, batch: Batch) -> list[ClipGroup]:
        """The clip of each camera by itself."""
        images = rearrange(_normalised(batch), "B T V c H W -> (B V) T 1 c H W")
        numbers = batch.prepared[self.name].get("drop_path")
        return [ClipGroup(images, None, None if numbers is None else numbers.flatten(0, 1))]

    def forward(self, encoded: Sequence[Encoded], batch: Batch, peers: Peers) -> Losses:
        """As Objective has it."""
        (clips,) = encoded
        prepared = batch.prepared[self.name]
        intra, inter = self._contrast(self.compare(clips.tokens, prepared), prepared, peers)
        total = self.config.intra_weight * intra.mean(intra.loss) + self.config.inter_weight * inter.mean(inter.loss)
        parts = {
            "loss": total,
            "intra_loss": intra.mean(intra.loss),
            "intra_top1": intra.top(1),
            "image_to_point_loss": inter.mean(inter.loss),
            "image_to_point_top1": inter.top(1),
            "image_to_point_top5": inter.top(5),
            "image_to_point_chance": 1 / inter.candidates.clamp(min=1),
            "match_distance_m": intra.mean(prepared["match_distance_m"].flatten()),
            "pairs_per_image": prepared["pair_valid"].float().sum(dim=1).mean() / self.cameras,
        }
        return Losses(total, {name: value.detach() for name, value in parts.items()})

    def evaluate(self, encoder: VideoEncoder, batch: Batch) -> dict[str, Tensor]:
        """Losses and retrieval among the pairs of this batch alone, whatever the preset; chance is 1 / number of its pairs."""
        (clips,) = encode(encoder, self.clips(batch))
        prepared = batch.prepared[self.name]
        B = len(batch)
        intra, inter = self._contrast(self.compare(clips.tokens, prepared), prepared, ALONE)
        intra_loss, image_loss = _per_sample(intra, intra.loss, B), _per_sample(inter, inter.loss, B)
        return {
            "loss": self.config.intra_weight * intra_loss + self.config.inter_weight * image_loss,
            "intra_loss": intra_loss,
            "intra_top1": _per_sample(intra, (intra.better < 1).float(), B),
            "image_to_point_loss": image_loss,
            "image_to_point_top1": _per_sample(inter, (inter.better < 1).float(), B),
            "image_to_point_top5": _per_sample(inter, (inter.better < 5).float(), B),
            "image_to_point_chance": (1 / inter.candidates.clamp(min=1)).expand(B),
            "match_distance_m": _per_sample(intra, prepared["match_distance_m"].flatten(), B),
            "pairs_per_image": prepared["pair_valid"].float().sum(dim=1) / self.cameras,
        }

    def draw(self, encoder: VideoEncoder, batch: Batch) -> dict[str, Tensor]:
        """The centres on the images, by how like their pixels they are; and how like one of them every pixel is."""
        (clips,) = encode(encoder, self.clips(batch))
        prepared = batch.prepared[self.name]
        compared = self.compare(clips.tokens, prepared)
        similarity = (compared.image * compared.point).sum(-1)  # (B, M)
        pictures = denormalise(_normalised(batch))
        shown, maps = [], []
        for sample in range(len(batch)):
            frame = int(prepared["frame"][sample])
            images = pictures[sample, frame]  # (V, 3, H, W)
            valid = prepared["pair_valid"][sample]
            places = (prepared["camera"][sample], prepared["pixels"][sample])
            shown.append(paint_points(0.6 * images, *places, colourise(similarity[sample]), valid))
            marked = _most_typical(similarity[sample], valid)
            field = self._similarity_map(
                clips.tokens, sample, frame // self._tubelet_frames(batch), compared.point[sample, marked]
            )
            grown = F.interpolate(field[:, None], images.shape[-2:], mode="nearest")[:, 0]
            blended = 0.35 * images.mean(1, keepdim=True) + 0.65 * colourise(grown).movedim(-1, 1)
            white = torch.ones(len(valid), 3, device=images.device)
            is_marked = valid & (torch.arange(len(valid), device=valid.device) == marked)
            maps.append(paint_points(blended, *places, white, is_marked, radius_px=2))
        return {
            "LiDAR centres, from blue to red: like their pixel": tile_cameras(torch.stack(shown))[:, None],
            "from blue to red: like the centre marked white": tile_cameras(torch.stack(maps))[:, None],
        }

    def compare(self, tokens: Float[Tensor, "BV N C"], prepared: Mapping[str, Tensor]) -> Compared:
        """Everything as unit vectors of one space; centres without a pair have some, too."""
        own = self._encode_points(prepared, "a")  # (B, M, C)
        with torch.no_grad():
            match = prepared["match"][..., None].expand_as(own)
            other_view = self.view_head(self._encode_points(prepared, "b").gather(1, match))
        match self.config.stop_gradient:
            case "feature":
                point = self.point_head(own.detach())
            case "head":
                point = self.point_head(own).detach()
            case "none":
                point = self.point_head(own)
        image = self.image_head(sample_tokens(tokens, prepared["corners"], prepared["corner_weights"]))
        return Compared(self.view_head(own), other_view, image, point)

    def _contrast(self, compared: Compared, prepared: Mapping[str, Tensor], peers: Peers) -> tuple[Retrieval, Retrieval]:
        """Of the two views, and of images with points."""
        peers = peers if self.config.gather_negatives else ALONE
        temperature = self.config.temperature
        view, other_view, image, point = (vectors.flatten(0, 1) for vectors in compared)
        intra = retrieve(view, other_view, prepared["match_valid"].flatten(), temperature=temperature, peers=peers)
        return intra, retrieve(image, point, prepared["pair_valid"].flatten(), temperature=temperature, peers=peers)

    def _encode_points(self, prepared: Mapping[str, Tensor], view: str) -> Float[Tensor, "B M C"]:
        points = prepared[f"points_{view}"]
        neighbours = [
            [prepared[f"neighbours_{view}_{level}_{ring}"] for ring in range(len(shape.radii_m))]
            for level, shape in enumerate(self.config.shape.levels)
        ]
        return self.points(points[..., :3], points[..., 3:], neighbours)

    def _similarity_map(
        self, tokens: Float[Tensor, "BV N C"], sample: int, tubelet: int, point: Float[Tensor, " E"]
    ) -> Float[Tensor, "V h w"]:
        own = tokens.unflatten(0, (-1, self.cameras))[sample].unflatten(1, (self.grid.t, self.grid.h, self.grid.w))
        return self.image_head(own[:, tubelet]) @ point

    def _tubelet_frames(self, batch: Batch) -> int:
        return batch.shared["images"].shape[1] // self.grid.t


def build_simipu(config: SimipuConfig, encoder: VideoEncoder, grid: Grid, *, cameras: int) -> SimipuObjective:
    """SimIPU on `encoder`, for rigs of so many cameras."""
    points = PointEncoder(config.shape, features=1, use_xyz=config.use_xyz, norm=config.norm)
    return SimipuObjective(config, points, encoder_width=encoder.shape.width, grid=grid, cameras=cameras)


def keep_nearest(
    place: Int[np.ndarray, " M"], depth_m: Float[np.ndarray, " M"], is_kept: Bool[np.ndarray, " M"]
) -> Bool[np.ndarray, " M"]:
    """Of those kept that share a `place` only the nearest: what lies behind it is most likely hidden by it."""
    order = np.lexsort((depth_m, place, ~is_kept))
    ordered, kept = place[order], is_kept[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    nearest = np.zeros(len(order), dtype=bool)
    nearest[order] = is_first & kept
    return nearest


def bilinear_corners(patches: Float[np.ndarray, "M 2"], grid: Grid) -> tuple[Int[np.ndarray, "M 4"], Float32[np.ndarray, "M 4"]]:
    """Tokens of one image around places (x, y) counted in patches from its corner, and their weights.

    A token lies in the middle of its patch, as grid_sample(align_corners=False, padding_mode="border") has it.
    """
    size = np.array([grid.w, grid.h])
    place = np.clip(patches - 0.5, 0, size - 1)
    low = np.minimum(np.floor(place).astype(np.int64), np.maximum(size - 2, 0))
    high = np.minimum(low + 1, size - 1)
    share = place - low
    corners = [y * grid.w + x for y in (low[:, 1], high[:, 1]) for x in (low[:, 0], high[:, 0])]
    weights = [y * x for y in (1 - share[:, 1], share[:, 1]) for x in (1 - share[:, 0], share[:, 0])]
    return np.stack(corners, axis=-1), np.stack(weights, axis=-1).astype(np.float32)


def sample_tokens(
    tokens: Float[Tensor, "BV N C"], corners: Int[Tensor, "B M 4"], weights: Float[Tensor, "B M 4"]
) -> Float[Tensor, "B M C"]:
    """Weighted sums of four tokens of each sample, all its cameras counted through."""
    B, M, _ = corners.shape
    of_sample = tokens.reshape(B, -1, tokens.shape[-1])  # (B, V N, C)
    around = of_sample.gather(1, corners.reshape(B, -1, 1).expand(-1, -1, tokens.shape[-1]))
    return (around.unflatten(1, (M, 4)) * weights[..., None]).sum(dim=2)


def _normalised(batch: Batch) -> Float[Tensor, "B T V 3 H W"]:
    return normalise(batch.shared["images"], batch.shared["images_colours"])


def _cloud_arrays(cloud: Cloud, view: str) -> dict[str, np.ndarray]:
    neighbours = {
        f"neighbours_{view}_{level}_{ring}": indices
        for level, rings in enumerate(cloud.neighbours)
        for ring, indices in enumerate(rings)
    }
    return {f"points_{view}": cloud.points, **neighbours}


def _per_sample(retrieval: Retrieval, values: Float[Tensor, " n"], samples: int) -> Float[Tensor, " B"]:
    """Sums of each sample, scaled so that their mean is the mean over all valid pairs."""
    return (values * retrieval.valid).unflatten(0, (samples, -1)).sum(dim=1) * samples * retrieval.share


def _most_typical(similarity: Float[Tensor, " M"], valid: Bool[Tensor, " M"]) -> int:
    """The pair of median similarity: neither the luckiest nor the worst."""
    places = torch.nonzero(valid)[:, 0]
    if not len(places):
        return 0
    order = similarity[places].argsort()
    return int(places[order[len(order) // 2]])
