"""MIM4D: masked multi-view video, rebuilt in space and rendered (Zou et al. 2024; the rendering is UniPAD's, Yang et al. 2024).

    image cells are hidden -> encoder -> every instant its own volume -> one instant withheld -> rebuilt from the others, moved to
    its ego pose -> rendered to colours and depths along rays -> L1 against pixels and LiDAR; beside it the same for its own volume

    loss = rgb_weight |colour - pixel| + depth_weight |depth - LiDAR| (+ eikonal_weight (|grad f| - 1)^2), means over valid rays of
           both targets, of the rebuilt branch and of the direct branch, added

Three modes of the encoder. `frame`: every image by itself, as published. `surround`: all cameras of one instant attend to each
other. `spacetime`: the whole clip attends to itself, a true video encoder; then the withheld instant's tokens are no part of
the encoder's input, or its neighbours would carry it along, and only the other target has a direct volume. An instant is a
frame, in `spacetime` a tubelet, which stands at its last frame.

The paper's continuous scene flow is what the temporal decoder's sampling offsets learn (`temporal.py`); they are drawn as a picture.

Deviations from the paper and its release, for both presets: ego alignment and voxels in metres at cell centres; frames told apart
by seconds before and after, the nearest two in the short branch; each frame is supervised by the sweep nearest to it, the
release by the key frame's; the frame of a volume is the car's, not the LiDAR's; group norm; an image ViT or video ViT with one
stride; rays that miss are masked; a mean over rays is over those of all ranks. `reference` takes the published mask ratio,
targets and weights; `modern` masks more, rebuilds any instant, the first from later ones too, and asks of the signed distance to be one.
With one instant nothing can be rebuilt, and what is left is UniPAD's loss.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.batch import Batch, Losses
from models.config import VolumeShape
from models.encoder import ClipGroup, VideoEncoder
from models.geometry import VoxelGrid, invert, see_through_pixels
from models.images import denormalise, normalise, paint_depth, paint_flow, plan_recolouring, recolour, tile_cameras
from models.objectives.base import Encoded, Objective, encode
from models.objectives.mim4d_prepare import Instants
from models.peers import Peers, mean_over_all
from models.rendering import Renderer, Rendering, RenderShape
from models.temporal import Rebuilt, TemporalDecoder, TemporalShape
from models.volumes import DepthBins, VolumeConv, VolumeHead, lift, warp

_CAMERAS_OF_A_CELL = 3
"""No rig has cells that more cameras see."""
_PICTURE_WIDTH_PX = 48
"""Rendered images are drawn at most this wide."""


class Branch(NamedTuple):
    """One way to a volume of each of some targets, rendered, beside what is there."""

    rendering: Rendering
    rgb: Float[Tensor, "B M R 3"]
    depth_m: Float[Tensor, "B M R"]
    """Along the ray; 0 where there is no LiDAR."""

    @property
    def has_depth(self) -> Bool[Tensor, "B M R"]:
        return self.hit & (self.depth_m > 0)

    @property
    def hit(self) -> Bool[Tensor, "B M R"]:
        return self.rendering.hit.view_as(self.depth_m)

    @property
    def depth_error_m(self) -> Float[Tensor, "B M R"]:
        return (self.rendering.depth_m.view_as(self.depth_m) - self.depth_m).abs()

    @property
    def rgb_error(self) -> Float[Tensor, "B M R 3"]:
        return self.rendering.rgb.view_as(self.rgb) - self.rgb


class Mim4dObjective(Objective):
    """Lift, temporal decoder and renderer."""

    name = "mim4d"

    def __init__(self, instants: Instants, *, encoder_width: int) -> None:
        super().__init__()
        shape = instants.config.shape
        self.config = instants.config
        self.instants = instants
        self.voxels = build_voxels(shape)
        self.bins = DepthBins(*shape.depth_m, shape.depth_bins)
        self.tokens_per_sample = instants.tokens
        self.head = VolumeHead(encoder_width, shape.lifted, shape.depth_bins)
        self.conv = VolumeConv(shape.lifted, shape.rendered)
        self.renderer = Renderer(shape.rendered, self.voxels, RenderShape(coarse=shape.coarse, fine=shape.fine))
        if instants.rebuilt:
            widths = TemporalShape(short_width=shape.short_width, long_width=shape.long_width)
            self.decoder = TemporalDecoder(shape.rendered, self.voxels, widths)

    def clips(self, batch: Batch) -> list[ClipGroup]:
        """The visible part of every image, cut as the mode has it."""
        patterns = {
            "frame": "B T V c H W -> (B T V) 1 1 c H W",
            "surround": "B T V c H W -> (B T) 1 V c H W",
            "spacetime": "B T V c H W -> B T V c H W",
        }
        prepared = batch.prepared[self.name]
        images = rearrange(normalise(batch.shared["images"], batch.shared["images_colours"]), patterns[self.config.mode])
        numbers = prepared.get("drop_path")
        visible = prepared["visible"].flatten(0, 1)
        return [ClipGroup(images, visible, None if numbers is None else numbers.flatten(0, 1))]

    def forward(self, encoded: Sequence[Encoded], batch: Batch, peers: Peers) -> Losses:
        """As Objective has it."""
        volumes = self.build_volumes(encoded[0], batch)
        parts: dict[str, Tensor] = {}
        total = volumes.new_zeros(())
        for name, branch in self.render_branches(volumes, batch).items():
            of_branch = self._branch_losses(branch, peers)
            scale = self.config.depth_weight * self.voxels.scale
            total = total + self.config.rgb_weight * of_branch["rgb"] + scale * of_branch["depth_m"]
            total = total + self.config.eikonal_weight * of_branch["eikonal"]
            parts |= {f"{name}_{part}": value.detach() for part, value in of_branch.items()}
        return Losses(total, {"loss": total.detach(), **parts})

    def evaluate(self, encoder: VideoEncoder, batch: Batch) -> dict[str, Tensor]:
        """Errors of both branches in colours, and where there is LiDAR in depths, beside what costs nothing."""
        (clips,) = encode(encoder, self.clips(batch))
        volumes = self.build_volumes(clips, batch)
        branches = self.render_branches(volumes, batch)
        figures: dict[str, Tensor] = {}
        loss = torch.zeros(len(batch), device=volumes.device)
        for name, branch in branches.items():
            depth_m = _per_sample(branch.depth_error_m, branch.has_depth)
            rgb = _per_sample(branch.rgb_error.abs().mean(-1), branch.hit)
            loss = loss + self.config.rgb_weight * rgb + self.config.depth_weight * self.voxels.scale * depth_m
            figures |= {f"{name}_rgb": rgb, f"{name}_psnr": self._psnr(branch)}
        if self.config.depth_supervision:
            figures |= self._depth_errors(volumes, branches, batch)
        return {"loss": loss, **figures}

    def _depth_errors(
        self, volumes: Float[Tensor, "B I E Z Y X"], branches: dict[str, Branch], batch: Batch
    ) -> dict[str, Float[Tensor, " B"]]:
        """Of both branches; of what another clip's instants would rebuild; of volumes that the nearest other instant lends.

        Another clip tells what the decoder knows of streets in general. A lent volume is taken as it is, and moved to the target's pose.

        Means over the LiDAR rays of the batch, in metres.
        """
        rendered = dict(branches)
        if self.instants.rebuilt:
            targets = slice(0, self.instants.rebuilt)
            others = {
                "another_clip": self.rebuild(volumes.roll(1, 0), batch, targets).volume.unflatten(0, (len(batch), -1)),
                "nearest_frame": self._nearest_volumes(volumes, batch, is_moved=False),
                "nearest_frame_moved": self._nearest_volumes(volumes, batch, is_moved=True),
            }
            rendered |= {name: self.render(other, batch, targets) for name, other in others.items()}
        errors = {f"{name}_depth_m": _per_sample(branch.depth_error_m, branch.has_depth) for name, branch in rendered.items()}
        first = next(iter(branches.values()))
        constant_m = _per_sample((first.depth_m - _median(first.depth_m, first.has_depth)).abs(), first.has_depth)
        return {**errors, "constant_depth_m": constant_m}

    def draw(self, encoder: VideoEncoder, batch: Batch) -> dict[str, Tensor]:
        """The first target of each clip: its images and LiDAR, what the branches render of whole images, the learned flow.

        A withheld instant that was not encoded has no direct branch; that column then shows the other target.
        """
        (clips,) = encode(encoder, self.clips(batch))
        volumes = self.build_volumes(clips, batch)
        targets, direct = batch.prepared[self.name]["targets"], self.instants.first_direct
        stride = max(1, math.ceil(batch.shared["images"].shape[-1] / _PICTURE_WIDTH_PX))
        images = normalise(batch.shared["images"], batch.shared["images_colours"])
        shown = {
            "image": denormalise(_take(images, self._frames_of(targets[:, :1])))[:, 0, ..., ::stride, ::stride],
            **({"LiDAR depth, near is red": self._paint_lidar(batch, stride)} if self.config.depth_supervision else {}),
        }
        if self.instants.rebuilt:
            rebuilt = self.rebuild(volumes, batch, slice(0, 1))
            shown |= self._draw_volume("rebuilt", rebuilt.volume, batch, targets[:, :1], stride)
        own = _take(volumes, targets[:, direct : direct + 1])[:, 0]
        name = "direct, of another instant" if direct else "direct"
        shown |= self._draw_volume(name, own, batch, targets[:, direct : direct + 1], stride)
        pictures = {title: tile_cameras(cameras) for title, cameras in shown.items()}
        if self.instants.rebuilt:
            pictures["learned flow from above"] = paint_flow(rebuilt.flow_m)
        return {title: picture[:, None].clamp(0, 1) for title, picture in pictures.items()}

    def build_volumes(self, clips: Encoded, batch: Batch) -> Float[Tensor, "B I E Z Y X"]:
        """The volume of every instant in its own ego frame; hidden patches, and withheld instants, lift nothing."""
        instants, visible = self.instants, clips.clips.visible
        assert visible is not None, "some of every image is hidden"
        dense = clips.tokens.new_zeros(len(clips.tokens), instants.group_grid.tokens, clips.tokens.shape[-1])
        dense = dense.scatter(1, visible[..., None].expand_as(clips.tokens), clips.tokens)
        I, V = len(instants.frames), instants.cameras  # noqa: E741
        dense = dense.view(-1, V, instants.grid.h, instants.grid.w, dense.shape[-1])  # (B I, V, h, w, C)
        lifted = self.head(dense)
        pix_from_ego = batch.shared["pix_from_ego"][:, list(instants.frames)].flatten(0, 1)  # (B I, V, 3, 4)
        volume = lift(
            lifted.features,
            lifted.density,
            pix_from_ego,
            torch.ones(pix_from_ego.shape[:2], dtype=torch.bool, device=dense.device),
            grid=self.voxels,
            bins=self.bins,
            size_px=(instants.grid.h * instants.patch_px, instants.grid.w * instants.patch_px),
            kind=self.config.lift,
            overlap=_CAMERAS_OF_A_CELL,
        )
        return self.conv(volume).unflatten(0, (-1, I))

    def rebuild(self, volumes: Float[Tensor, "B I E Z Y X"], batch: Batch, targets: slice) -> Rebuilt:
        """Volumes of some targets (B M, ...) from all instants but themselves."""
        prepared = batch.prepared[self.name]
        which, sources = prepared["targets"][:, targets], prepared["sources"][:, targets]  # (B, M), (B, M, Q)
        B, M, Q = sources.shape
        lent = _take(volumes, sources.flatten(1))  # (B, M Q, E, Z, Y, X)
        first_from_ego = batch.shared["first_from_ego"]
        first_from_target = _take(first_from_ego, self._frames_of(which)).repeat_interleave(Q, dim=1)
        source_from_target = invert(_take(first_from_ego, self._frames_of(sources.flatten(1)))) @ first_from_target
        moved = warp(lent.flatten(0, 1), source_from_target.flatten(0, 1), self.voxels).unflatten(0, (B * M, Q))
        elapsed_s = batch.shared["elapsed_s"]
        seconds = elapsed_s.gather(1, self._frames_of(sources.flatten(1))).view(B, M, Q)
        offsets_s = (seconds - elapsed_s.gather(1, self._frames_of(which))[..., None]).flatten(0, 1)
        return self.decoder(moved, offsets_s, torch.ones_like(offsets_s, dtype=torch.bool))

    def render_branches(self, volumes: Float[Tensor, "B I E Z Y X"], batch: Batch) -> dict[str, Branch]:
        """Both ways to the targets that have them."""
        instants = self.instants
        branches: dict[str, Branch] = {}
        if instants.rebuilt:
            targets = slice(0, instants.rebuilt)
            rebuilt = self.rebuild(volumes, batch, targets).volume.unflatten(0, (-1, instants.rebuilt))
            branches["rebuilt"] = self.render(rebuilt, batch, targets)
        targets = slice(instants.first_direct, instants.targets)
        own = _take(volumes, batch.prepared[self.name]["targets"][:, targets])
        return {**branches, "direct": self.render(own, batch, targets)}

    def render(self, volumes: Float[Tensor, "B M E Z Y X"], batch: Batch, targets: slice) -> Branch:
        """The prepared rays of some targets through one volume for each."""
        prepared = {name: tensor[:, targets] for name, tensor in batch.prepared[self.name].items() if name in _RAY_FIELDS}
        frames = self._frames_of(prepared["targets"])
        rays = see_through_pixels(_take(batch.shared["pix_from_ego"], frames), prepared["ray_pixels"])
        origin = rays.origin.expand_as(rays.reach)
        flat = [part.flatten(0, 1).flatten(1, 2) for part in (origin, rays.direction, prepared["jitter"])]
        jitter = flat[2] if self.training else None
        rendering = self.renderer(volumes.flatten(0, 1), flat[0], flat[1], jitter, recompute=True)
        depth_m = prepared["ray_depth_m"] * rays.reach.norm(dim=-1)
        plan = plan_recolouring(batch.shared["images"], batch.shared["images_colours"])
        rgb = recolour(prepared["ray_rgb"].flatten(2, 3).float(), plan, dim=-1) / 255
        return Branch(rendering, rgb, depth_m.flatten(2, 3))

    def _branch_losses(self, branch: Branch, peers: Peers) -> dict[str, Tensor]:
        hit = branch.hit
        return {
            "rgb": mean_over_all(branch.rgb_error.abs().mean(-1), hit, peers),
            "depth_m": mean_over_all(branch.depth_error_m, branch.has_depth, peers),
            "eikonal": mean_over_all(branch.rendering.eikonal.view_as(branch.depth_m), hit, peers),
            "opacity": mean_over_all(branch.rendering.opacity.view_as(branch.depth_m), hit, peers),
        }

    def _nearest_volumes(
        self, volumes: Float[Tensor, "B I E Z Y X"], batch: Batch, *, is_moved: bool
    ) -> Float[Tensor, "B M E Z Y X"]:
        """For each rebuilt target the volume of the instant nearest in time, the earlier of two."""
        prepared, elapsed_s = batch.prepared[self.name], batch.shared["elapsed_s"]
        targets, sources = prepared["targets"][:, : self.instants.rebuilt], prepared["sources"][:, : self.instants.rebuilt]
        seconds = elapsed_s.gather(1, self._frames_of(sources.flatten(1))).view_as(sources)
        gap_s = (seconds - elapsed_s.gather(1, self._frames_of(targets))[..., None]).abs()
        nearest = sources.gather(2, gap_s.argmin(dim=2, keepdim=True))[..., 0]  # (B, M)
        lent = _take(volumes, nearest)
        if not is_moved:
            return lent
        first_from_ego = batch.shared["first_from_ego"]
        source_from_target = invert(_take(first_from_ego, self._frames_of(nearest))) @ _take(
            first_from_ego, self._frames_of(targets)
        )
        return warp(lent.flatten(0, 1), source_from_target.flatten(0, 1), self.voxels).view_as(lent)

    def _frames_of(self, instants: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """The frame at which each instant stands."""
        step = self.instants.tubelet_frames if self.instants.is_joint else 1
        return instants * step + (step - 1)

    def _psnr(self, branch: Branch) -> Float[Tensor, " B"]:
        """Of colours along rays that hit, in dB."""
        hit = branch.hit.flatten(1)
        squared = (branch.rgb_error.square().mean(-1).flatten(1) * hit).sum(1) / hit.sum(1).clamp(min=1)
        return -10 * squared.clamp(min=1e-10).log10()

    def _draw_volume(
        self, name: str, volume: Float[Tensor, "B E Z Y X"], batch: Batch, target: Int[Tensor, "B 1"], stride: int
    ) -> dict[str, Float[Tensor, "B V 3 h w"]]:
        """Colours and coloured depths of whole images of an instant, every `stride`-th pixel."""
        pix_from_ego = _take(batch.shared["pix_from_ego"], self._frames_of(target))[:, 0]  # (B, V, 3, 4)
        (B, V), (H, W) = pix_from_ego.shape[:2], batch.shared["images"].shape[-2:]
        v, u = (torch.arange(0, size, stride, device=volume.device) + 0.5 for size in (H, W))
        pixels = torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1)  # (h, w, 2)
        rays = see_through_pixels(pix_from_ego, pixels.flatten(0, 1).expand(B, V, -1, -1))
        seen = self.renderer(volume, rays.origin.expand_as(rays.reach).flatten(1, 2), rays.direction.flatten(1, 2))
        axes = {"V": V, "h": len(v), "w": len(u)}
        depth = paint_depth(seen.depth_m, self.bins.far_m)
        return {
            f"{name}: colour": rearrange(seen.rgb, "B (V h w) c -> B V c h w", **axes),
            f"{name}: depth": rearrange(depth, "B (V h w) c -> B V c h w", **axes),
        }

    def _paint_lidar(self, batch: Batch, stride: int) -> Float[Tensor, "B V 3 h w"]:
        """Depths of the LiDAR rays of the first target where they hit, black elsewhere."""
        pixels, depth_m = (batch.prepared[self.name][name][:, 0] for name in ("ray_pixels", "ray_depth_m"))  # (B, V, R, ...)
        H, W = (-(-side // stride) for side in batch.shared["images"].shape[-2:])
        column, row = (pixels / stride).long().unbind(-1)
        place = (row.clamp(0, H - 1) * W + column.clamp(0, W - 1))[..., None].expand(-1, -1, -1, 3)
        colours = paint_depth(depth_m, self.bins.far_m) * (depth_m > 0)[..., None]
        canvas = colours.new_zeros(*depth_m.shape[:2], H * W, 3).scatter_reduce(2, place, colours, "amax")
        return rearrange(canvas, "B V (h w) c -> B V c h w", h=H)


_RAY_FIELDS = ("targets", "ray_pixels", "ray_depth_m", "ray_rgb", "jitter")


def build_voxels(shape: VolumeShape) -> VoxelGrid:
    """The grid around the car, in its own frame."""
    return VoxelGrid(shape.low_m, shape.high_m, shape.cells)


def _take(values: Float[Tensor, "B I *rest"] | Tensor, places: Int[Tensor, "B M"]) -> Tensor:
    """values[b, places[b, m]] for all b and m."""
    index = places.view(*places.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
    return values.gather(1, index)


def _per_sample(values: Float[Tensor, "B M R"], valid: Bool[Tensor, "B M R"]) -> Float[Tensor, " B"]:
    """Sums of each sample, scaled so that their mean is the mean over all valid rays of the batch."""
    return (values * valid).sum(dim=(1, 2)) * len(values) / valid.sum().clamp(min=1)


def _median(values: Float[Tensor, "B M R"], valid: Bool[Tensor, "B M R"]) -> Float[Tensor, ""]:
    """Of the valid ones, without waiting to see how many there are."""
    return torch.where(valid, values, torch.nan).flatten().nanmedian().nan_to_num()
