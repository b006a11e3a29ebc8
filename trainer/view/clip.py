"""One page of HTML of one surround clip: `odonata view --clip`.

All cameras at all instants in the rig's layout, as they are and with what is known of the street on them: LiDAR points coloured by
depth, annotated boxes where all frames are key frames; points, boxes and lines of the map from above. With a run, what its objectives
draw for this clip, with the weights of its newest checkpoint. Nothing is augmented.

A clip is named as logs and incidents name it, by scene and time of its first image (cameras may follow), or by its number.

Left to whom: the page's own make-up is `page`'s, what an objective draws is the objective's.
"""

import difflib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from models.batch import Batch
from models.geometry import project
from models.images import paint_depth, paint_points
from models.objectives.base import Preparation
from models.pretraining import PretrainingModel, build_preparations
from models.wireframes import draw_boxes, draw_from_above
from trainer.assembly import assemble_model
from trainer.checkpoint.manager import load_into_model
from trainer.checkpoint.tools import CONFIG, read_run_config
from trainer.config.data import DataConfig, DrivesData
from trainer.config.load import as_data_overrides, override_run_config, parse_data_config
from trainer.config.run import RunConfig
from trainer.data.boxes import open_boxes
from trainer.data.build import build_source, open_maps
from trainer.data.loader import PlacedSamples, PlaceSampler, read_batches
from trainer.data.maps import LineReader
from trainer.data.nuscenes_maps import has_maps
from trainer.data.order import Order, Portion, Share
from trainer.data.source import Room, Sample, Source, new_room
from trainer.data.surround_source import CAMERA_FIELDS, SurroundSource
from trainer.errors import CheckpointError, ConfigError
from trainer.observe.pictures import draw_sheet
from trainer.store.base import Store
from trainer.view.page import inline_picture, render

_DATA = {"kind": "nuscenes", "train_split": "all", "clip": {"height_px": 360, "width_px": 640}}
"""What is read where there is no run to say it: any scene, at a size for people."""
_NAMED = 5
_FAR_M = 80.0
_REACH_M = 50.0
_ABOVE_PX = 800
_LINE_POINTS = 2000
_LINE_COLOUR = (0.25, 0.55, 0.45)


@dataclass(frozen=True)
class Shown:
    """An image with its title."""

    title: str
    uri: str


@dataclass(frozen=True)
class Instant:
    """What a frame of the clip shows."""

    title: str
    rigs: Mapping[str, Sequence[Sequence[Shown]]]
    """By what is drawn on them: rows of cameras."""
    above: str
    legend: str


@dataclass(frozen=True)
class OneClip:
    """The source of a single sample of another."""

    source: Source
    index: int

    @property
    def offers(self) -> frozenset[str]:
        """As Source has it."""
        return self.source.offers

    def __len__(self) -> int:
        return 1

    def name(self, index: int) -> str:
        """As Source has it."""
        del index
        return self.source.name(self.index)

    def load(self, index: int, rng: np.random.Generator, room: Room = new_room) -> Sample:
        """As Source has it."""
        del index
        return self.source.load(self.index, rng, room)

    def describe(self) -> dict[str, float | int | str]:
        """As Source has it."""
        return self.source.describe()


def write_clip_page(clip: str, *, run: Store | None = None, data: Sequence[str] = ()) -> str:
    """The page of the clip that `clip` names, in the data of `run` with what its objectives draw, or in data by itself.

    `data` are keys like `root=city`, over those of the run. ConfigError where there is no such clip, with the names of near ones.
    """
    config = _read_config(run, data) if run else None
    source = open_surround(config.data if config else parse_data_config(_DATA, data))
    index = find_clip(source, clip)
    sample = source.load(index, np.random.default_rng(0))
    name = " ".join(source.name(index).split()[:2])
    return render(
        "clip.html",
        name=name,
        head=_head(source, index, sample),
        instants=list(_show_instants(source, index, sample)),
        drawn=draw_objectives(config, run, name) if config and run else {},
        calibration=list(_calibration(source, index)),
    )


def _read_config(run: Store, settings: Sequence[str]) -> RunConfig:
    config = read_run_config(run)
    if config is None:
        raise CheckpointError(
            f"a clip of the data of {run.uri} was to be shown and there is no {CONFIG}; give a run, or --data alone"
        )
    data = config.data
    if isinstance(data, DrivesData):
        data = data.model_copy(update={"train_split": "all"})
    config = config.model_copy(update={"data": data})
    return override_run_config(config.model_dump(mode="json"), as_data_overrides(settings), origin=f"{run.uri}/{CONFIG}")


def open_surround(data: DataConfig) -> SurroundSource:
    """Surround clips of `data`, with LiDAR where there is some."""
    source = build_source(data, "train", CAMERA_FIELDS, augment=False)
    if not isinstance(source, SurroundSource):
        raise ConfigError(
            "a clip was to be shown and its data is image pairs or several data sets; give the data set that it is in"
        )
    return replace(source, has_lidar=source.index.has_sweeps)


def find_clip(source: Source, clip: str) -> int:
    """The number of the clip that `clip` is, or begins the name of; ConfigError names near ones."""
    if clip.isdecimal() and int(clip) < len(source):
        return int(clip)
    names = list_names(source)
    found = find_name(names, clip)
    if found is None:
        known = [" ".join(name.split()[:2]) for name in names]
        near = difflib.get_close_matches(clip, known, n=_NAMED, cutoff=0.0)
        raise ConfigError(
            f"the clip {clip} was to be shown and there is none of this name or number; numbers are 0 to {len(names) - 1}, "
            f"near names {', '.join(near)}"
        )
    return found


def list_names(source: Source) -> list[str]:
    """Of all samples, in their order."""
    return [source.name(index) for index in range(len(source))]


def find_name(names: Sequence[str], clip: str) -> int | None:
    """The place of the first name that `clip` is, or begins."""
    return next((place for place, name in enumerate(names) if f"{name} ".startswith(f"{clip} ")), None)


def draw_objectives(config: RunConfig, store: Store, clip: str) -> dict[str, str | None]:
    """By objective of a run what it makes of `clip`, with the weights of the newest whole checkpoint; None where it has no such sample.

    Each finds the clip among its own samples: those of pairs are numbered otherwise than surround clips, and are fewer or more.
    """
    model = assemble_model(config)
    record = load_into_model(store, model, parts="model")
    preparations = build_preparations(config.objectives, config.token_grid, config.encoder, cameras=config.cameras)
    drawn: dict[str, str | None] = {}
    for name, preparation in preparations.items():
        batch = read_clip(config, name, preparation, clip)
        drawn[name] = None if batch is None else _draw_sheet(model.eval(), name, batch, step=record.step)
    return drawn


def read_clip(config: RunConfig, name: str, preparation: Preparation, clip: str) -> Batch | None:
    """The sample of an objective that `clip` begins the name of, alone in a batch."""
    source = build_source(config.data, "train", preparation.needs, augment=False)
    assert source is not None, "every kind of source has a training split"
    index = find_name(list_names(source), clip)
    if index is None:
        return None
    samples = PlacedSamples(OneClip(source, index), Order(config.seed, (Portion(1),), 1), {name: preparation})
    (batch,) = read_batches(samples, PlaceSampler(Share(0, 1, 1, 1), 0, 1), workers=0)
    return batch


@torch.no_grad()
def _draw_sheet(model: PretrainingModel, objective: str, batch: Batch, *, step: int) -> str:
    columns = model.draw_one(objective, batch)
    file = io.BytesIO()
    images = {title: column.float().numpy() for title, column in columns.items()}
    draw_sheet(images, caption=f"{objective} after step {step}").save(file, "PNG", optimize=True)
    return inline_picture(file.getvalue())


def _head(source: SurroundSource, index: int, sample: Sample) -> dict[str, str]:
    T, V = sample["images"].shape[:2]
    points = f"{len(sample['points_lidar']):,}" if source.has_lidar else "none"
    return {"number": f"{index}, of {len(source):,} from 0 on", "frames, cameras": f"{T}, {V}", "LiDAR points": points}


def _show_instants(source: SurroundSource, index: int, sample: Sample) -> Iterator[Instant]:
    rows = source.clips["clip_images"][index]
    cameras = [source.index.cameras[camera] for camera in source.index.columns["image_camera"][rows[0]]]
    order = arrange_rig(source.index.ego_from_cam(rows[0]))
    boxes, lines = read_boxes(source, rows), read_lines(source, rows)
    for frame, elapsed_s in enumerate(sample["elapsed_s"].tolist()):
        images = torch.from_numpy(sample["images"][frame].copy()).float() / 255
        points, pix_from_lidar, ego_from_lidar = read_points(source, sample, frame)
        of_frame, classes = boxes[frame]
        marked = draw_boxes(
            paint_lidar(images, points, pix_from_lidar), of_frame, classes, torch.from_numpy(sample["pix_from_ego"][frame])
        )
        ground = draw_lines_above(draw_points_above(points, ego_from_lidar), lines[frame])
        above = draw_from_above(ground, of_frame, classes, _REACH_M)
        rigs = {"As the cameras saw it": images, "LiDAR near in red, far in blue; annotated boxes": marked}
        yield Instant(
            f"Frame {frame + 1}, {elapsed_s:.2f} s",
            {title: [[_show(cameras[v], of_rig[v]) for v in row] for row in order] for title, of_rig in rigs.items()},
            _show("above", above).uri,
            f"{2 * _REACH_M:.0f} m wide, ahead is up: {len(points):,} points by height, {len(of_frame)} boxes, "
            f"{len(lines[frame])} lines of the map",
        )


def arrange_rig(ego_from_cam: Float[np.ndarray, "V 4 4"]) -> list[list[int]]:
    """Cameras that look ahead in a first row and others in a second, each from the car's left to its right."""
    x, y = ego_from_cam[:, :2, 2].T
    looks_deg = np.degrees(np.arctan2(y, x))
    ahead = sorted(np.flatnonzero(np.abs(looks_deg) <= 90).tolist(), key=lambda v: -looks_deg[v])
    back = sorted(np.flatnonzero(np.abs(looks_deg) > 90).tolist(), key=lambda v: looks_deg[v] % 360)
    return [row for row in (ahead, back) if row]


def read_boxes(source: SurroundSource, rows: Int[np.ndarray, "T V"]) -> list[tuple[Float[Tensor, "_ 9"], Int[Tensor, " _"]]]:
    """Boxes of the detection classes in the ego frame of each instant, and their classes; none where frames are not annotated."""
    if not (source.index.has_boxes and source.index.is_key_frame(rows).all()):
        return [(torch.empty(0, 9), torch.empty(0, dtype=torch.int64)) for _ in rows]
    found = open_boxes(source.index).read(rows, source.index.world_from_ego(rows)[:, 0])
    boxes, classes = torch.from_numpy(found["boxes_ego"]), torch.from_numpy(found["box_class"])
    frames = [slice(first, end) for first, end in pairwise(found["first_box"].tolist())]
    return [(boxes[of_frame][classes[of_frame] >= 0], classes[of_frame][classes[of_frame] >= 0]) for of_frame in frames]


def read_lines(source: SurroundSource, rows: Int[np.ndarray, "T V"]) -> list[list[Float[Tensor, "_ 2"]]]:
    """Lines of the map around the car at each instant; none where there is no map."""
    if not has_maps(source.index):
        return [[] for _ in rows]
    reader = LineReader(source.index, open_maps(source.index, source.config))
    found = reader.read(rows, source.index.world_from_ego(rows)[:, 0])
    points = torch.from_numpy(found["line_points"])
    lines = [points[first:end] for first, end in pairwise(found["first_line_point"].tolist())]
    return [lines[first:end] for first, end in pairwise(found["first_line"].tolist())]


def read_points(
    source: SurroundSource, sample: Sample, frame: int
) -> tuple[Float[Tensor, "P 3"], Float[Tensor, "V 3 4"], Float[Tensor, "4 4"]]:
    """LiDAR points of a frame in its own frame, and the ways to pixels and to the car; none where there is no sweep."""
    if not source.has_lidar:
        return torch.empty(0, 3), torch.zeros(sample["images"].shape[1], 3, 4), torch.eye(4)
    first, end = sample["first_point"][frame : frame + 2].tolist()
    points = torch.from_numpy(sample["points_lidar"][first:end, :3].copy())
    return points, torch.from_numpy(sample["pix_from_lidar"][frame]), torch.from_numpy(sample["ego_from_lidar"][frame])


def paint_lidar(
    images: Float[Tensor, "V 3 H W"], points_lidar: Float[Tensor, "P 3"], pix_from_lidar: Float[Tensor, "V 3 4"]
) -> Float[Tensor, "V 3 H W"]:
    """The images with every point on them that they show, near ones over far ones."""
    V, _, H, W = images.shape
    pixels, depth_m = project(pix_from_lidar, points_lidar.expand(V, -1, -1))
    camera = torch.arange(V)[:, None].expand_as(depth_m)
    inside = (pixels >= 0).all(-1) & (pixels[..., 0] < W) & (pixels[..., 1] < H) & (depth_m > 1)
    far_first = depth_m[inside].argsort(descending=True)
    camera, pixels, depth_m = (values[inside][far_first] for values in (camera, pixels, depth_m))
    shown = torch.ones(len(camera), dtype=torch.bool)
    return paint_points(images, camera, pixels, paint_depth(depth_m, _FAR_M), shown)


def draw_points_above(points_lidar: Float[Tensor, "P 3"], ego_from_lidar: Float[Tensor, "4 4"]) -> Float[Tensor, "3 X Y"]:
    """Points on a dark square around the car, ahead as up, brighter the higher they are."""
    ground = torch.full((3, _ABOVE_PX, _ABOVE_PX), 0.08)
    points = points_lidar @ ego_from_lidar[:3, :3].mT + ego_from_lidar[:3, 3]
    row, column, inside = _place_above(points[:, :2])
    height = ((points[:, 2] + 0.5) / 4).clamp(0, 1)[inside]
    ground[:, row, column] = 0.3 + 0.5 * height
    return ground


def draw_lines_above(ground: Float[Tensor, "3 X Y"], lines_ego: Sequence[Float[Tensor, "_ 2"]]) -> Float[Tensor, "3 X Y"]:
    """The ground with lines of the map on it."""
    drawn = ground.clone()
    for line in lines_ego:
        dense = F.interpolate(line.mT[None], size=_LINE_POINTS, mode="linear", align_corners=True)[0].mT
        row, column, _ = _place_above(dense)
        drawn[:, row, column] = torch.tensor(_LINE_COLOUR)[:, None]
    return drawn


def _place_above(points_ego: Float[Tensor, "n 2"]) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"], Bool[Tensor, " n"]]:
    """Rows and columns of the points that the square shows, and which these are."""
    row, column = (((0.5 - along / (2 * _REACH_M)) * _ABOVE_PX).floor().long() for along in points_ego.unbind(-1))
    inside = (row >= 0) & (row < _ABOVE_PX) & (column >= 0) & (column < _ABOVE_PX)
    return row[inside], column[inside], inside


def _calibration(source: SurroundSource, index: int) -> Iterator[tuple[str, ...]]:
    """A row for each image: the calibration of the image as it was recorded."""
    rows = source.clips["clip_images"][index]
    known = source.index
    times_us, cameras = known.timestamp_us(rows), known.columns["image_camera"][rows]
    intrinsics, mounts = known.pix_from_cam(rows), known.ego_from_cam(rows)
    for frame, view in np.ndindex(rows.shape):
        pix_from_cam, ego_from_cam = intrinsics[frame, view], mounts[frame, view]
        looks_deg = np.degrees(np.arctan2(ego_from_cam[1, 2], ego_from_cam[0, 2]))
        yield (
            str(frame + 1),
            known.cameras[cameras[frame, view]],
            f"{(times_us[frame, view] - times_us[0, 0]) / 1e3:+.1f} ms",
            f"{pix_from_cam[0, 0]:.1f}, {pix_from_cam[1, 1]:.1f}",
            f"{pix_from_cam[0, 2]:.1f}, {pix_from_cam[1, 2]:.1f}",
            f"{looks_deg:+.1f}",
            ", ".join(f"{metres:+.2f}" for metres in ego_from_cam[:3, 3]),
        )


def _show(title: str, image: Float[Tensor, "3 H W"]) -> Shown:
    file = io.BytesIO()
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=88)
    return Shown(title, inline_picture(file.getvalue(), "jpeg"))
