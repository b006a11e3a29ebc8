"""SimIPU on a real nuScenes keyframe: how well centres match, how many pairs each camera has, and whether points fall on the things.

The way from a point to its pixel is checked against the devkit's own: what lies in an annotated box must fall within the hull of the
box's corners, which the devkit brings into the camera at the time of the image. `--pictures` draws the six images with the centres,
with all points coloured by depth, and with the boxes that hold points, for a person to look at; nuScenes' licence forbids to
publish them with the code.

    python -m benchmarks.simipu_keyframe --root DATAROOT --pictures /tmp/pictures

JSON keys: sizes -> {match_distance_m -> {median, p75, p99} without a gate, as released, gated_distance_m -> the same of what the
default gate leaves, matched (its share), pairs, pairs_of_cameras}, boxes_seen, points_seen, inside_hull, furthest_outside_px.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from scipy.spatial import ConvexHull  # type: ignore[import-untyped]

from benchmarks.report import Report, build_parser
from benchmarks.simipu import describe_distances
from models.config import POINT_SHAPES, EncoderConfig, Grid, SimipuConfig
from models.images import colourise, paint_points, tile_cameras
from models.pretraining import build_preparations
from trainer.config.data import SURROUND_CAMERAS, ClipConfig, NuscenesData
from trainer.data.build import build_source
from trainer.data.nuscenes import find_version, open_devkit
from trainer.data.source import Sample
from trainer.data.surround_source import CAMERA_FIELDS, LIDAR_FIELDS

WIDTH, HEIGHT, PATCH_PX = 800, 448, 16
DRAWS = 8
IN_FRONT_M = 1.0
FAR_M = 50.0
"""From here on points have the colour of the far end."""
GATE_M = SimipuConfig().match_gate_m


class BoxOnImage(NamedTuple):
    """Points of a sweep that lie in one annotated box, where they fall on one image, and the corners of the box there."""

    camera: int
    pixels: Float[np.ndarray, "K 2"]
    corners: Float[np.ndarray, "8 2"]

    def outside_px(self) -> Float[np.ndarray, " K"]:
        """How far each point falls outside the hull of the corners; negative within."""
        sides = ConvexHull(self.corners).equations  # (sides, 3)
        distances: np.ndarray = (self.pixels @ sides[:, :2].T + sides[:, 2]).max(axis=1)
        return distances


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument(
        "--root", type=Path, required=True, help="a nuScenes dataroot with one keyframe, or more: the first is taken"
    )
    parser.add_argument(
        "--sizes", nargs="+", default=list(POINT_SHAPES), choices=list(POINT_SHAPES), help="sizes of point encoders"
    )
    parser.add_argument("--pictures", type=Path, default=None, help="a folder for pictures; none are drawn by default")
    arguments = parser.parse_args()
    report = Report("simipu_keyframe", arguments)
    sample = read_keyframe(arguments.root)
    sizes = {size: measure_matching(sample, size) for size in arguments.sizes}
    for size, figures in sizes.items():
        report.say(describe(size, figures))
    boxes = list(find_boxes(arguments.root, sample))
    hulls = measure_hulls(boxes)
    report.say(
        f"{hulls['points_seen']} points of {hulls['boxes_seen']} boxes on images: {hulls['inside_hull']:.2%} fall within the hull of "
        f"their box, the furthest outside by {hulls['furthest_outside_px']:.3f} px"
    )
    if arguments.pictures:
        draw_pictures(sample, boxes, arguments.pictures)
    report.finish({"sizes": sizes, **hulls})


def describe(size: str, figures: dict[str, Any]) -> str:
    """Two lines of a size."""
    free, gated = (
        ", ".join(f"{name} {metres:.2f} m" for name, metres in figures[key].items())
        for key in ("match_distance_m", "gated_distance_m")
    )
    pairs = ", ".join(f"{camera.removeprefix('CAM_')} {count:.0f}" for camera, count in figures["pairs_of_cameras"].items())
    return (
        f"{size:9}  matched without a gate at {free}; with one of {GATE_M:g} m {figures['matched']:.0%} are matched, at {gated}\n"
        f"{size:9}  {figures['pairs']:.0f} pairs of image and point: {pairs}"
    )


def read_keyframe(root: Path) -> Sample:
    """All cameras and the sweep of the first clip of a dataroot, as the loader gives them."""
    with tempfile.TemporaryDirectory() as index_folder:
        config = NuscenesData(
            root=root,
            train_split="all",
            val_split=None,
            clip=ClipConfig(height_px=HEIGHT, width_px=WIDTH),
            index_folder=Path(index_folder),
        )
        source = build_source(config, "train", CAMERA_FIELDS | LIDAR_FIELDS, augment=False)
        assert source is not None, "every dataroot has the split `all`"
        return source.load(0, np.random.default_rng(0))


def prepare(sample: Sample, config: SimipuConfig, draw: int) -> dict[str, np.ndarray]:
    """What SimIPU makes of the keyframe."""
    grid = Grid(1, 1, HEIGHT // PATCH_PX, WIDTH // PATCH_PX)
    cameras = sample["images"].shape[1]
    (preparation,) = build_preparations([config], grid, EncoderConfig(patch_px=PATCH_PX), cameras=cameras).values()
    return preparation.prepare(sample, np.random.default_rng(draw))


def measure_matching(sample: Sample, size: str) -> dict[str, Any]:
    """Over a few draws of points and transforms."""
    gated, free = (
        stack([prepare(sample, SimipuConfig.model_validate({"points": size, **gate}), draw) for draw in range(DRAWS)])
        for gate in ({}, {"match_gate_m": None})
    )
    of_cameras = [
        float((gated["pair_valid"] & (gated["camera"] == camera)).sum() / DRAWS) for camera in range(len(SURROUND_CAMERAS))
    ]
    return {
        "match_distance_m": describe_distances(free["match_distance_m"][free["match_valid"]]),
        "gated_distance_m": describe_distances(gated["match_distance_m"][gated["match_valid"]]),
        "matched": float(gated["match_valid"].mean()),
        "pairs": sum(of_cameras),
        "pairs_of_cameras": dict(zip(SURROUND_CAMERAS, of_cameras, strict=True)),
    }


def stack(draws: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Of every array all draws."""
    return {name: np.stack([draw[name] for draw in draws]) for name in draws[0]}


def project(sample: Sample, camera: int) -> tuple[Float[np.ndarray, "P 2"], Float[np.ndarray, " P"]]:
    """Pixels of all points in a camera, and their depths; pixels mean something in front of the camera alone."""
    points = sample["points_lidar"][:, :3].astype(np.float64)
    matrix = sample["pix_from_lidar"][0, camera].astype(np.float64)
    projected = points @ matrix[:, :3].T + matrix[:, 3]
    depth_m = projected[:, 2]
    return projected[:, :2] / np.where(depth_m > IN_FRONT_M, depth_m, np.inf)[:, None], depth_m


def is_on_image(pixels: Float[np.ndarray, "P 2"], depth_m: Float[np.ndarray, " P"]) -> Bool[np.ndarray, " P"]:
    """In front of the camera and within its image."""
    inside: np.ndarray = (depth_m > IN_FRONT_M) & (pixels > 0).all(-1) & (pixels < [WIDTH, HEIGHT]).all(-1)
    return inside


def find_boxes(root: Path, sample: Sample) -> Iterator[BoxOnImage]:
    """Every annotated box on every image on which points of it fall, the way of the box being the devkit's."""
    from nuscenes.utils.geometry_utils import points_in_box, view_points

    devkit = open_devkit(root, find_version(root, None))
    data = devkit.sample[0]["data"]
    _, of_lidar, _ = devkit.get_sample_data(data["LIDAR_TOP"])
    points = sample["points_lidar"][:, :3].T.astype(np.float64)
    inside = {box.token: points_in_box(box, points) for box in of_lidar}
    for number, camera in enumerate(SURROUND_CAMERAS):
        pixels, depth_m = project(sample, number)
        shown = is_on_image(pixels, depth_m)
        _, of_camera, pix_from_cam = devkit.get_sample_data(data[camera])
        for box in of_camera:
            corners = box.corners()  # (3, 8)
            is_seen = shown & inside.get(box.token, False)
            if is_seen.any() and (corners[2] > 0).all():
                yield BoxOnImage(number, pixels[is_seen], to_window(view_points(corners, pix_from_cam, normalize=True)[:2].T))


def to_window(pixels: Float[np.ndarray, "K 2"]) -> Float[np.ndarray, "K 2"]:
    """From nuScenes' full images to the largest centred window of our aspect ratio."""
    full = np.array([1600.0, 900.0])
    scale = max(WIDTH / full[0], HEIGHT / full[1])
    return pixels * scale - (full * scale - [WIDTH, HEIGHT]) / 2


def measure_hulls(boxes: list[BoxOnImage]) -> dict[str, Any]:
    """How many points fall within the hulls of their boxes."""
    outside_px = np.concatenate([box.outside_px() for box in boxes])
    return {
        "boxes_seen": len(boxes),
        "points_seen": len(outside_px),
        "inside_hull": float((outside_px <= 0).mean()),
        "furthest_outside_px": float(outside_px.max()),
    }


def draw_pictures(sample: Sample, boxes: list[BoxOnImage], folder: Path) -> None:
    """Centres, all points, and the points in boxes with the boxes' corners."""
    folder.mkdir(parents=True, exist_ok=True)
    images = torch.from_numpy(sample["images"][0]) / 255  # (V, 3, H, W)
    prepared = {name: torch.from_numpy(value) for name, value in prepare(sample, SimipuConfig(), 0).items()}
    frame = prepared["camera"], prepared["pixels"]
    depth_m = torch.linalg.vector_norm(prepared["points_a"][: len(frame[0]), :3], dim=-1)
    centres = paint_points(images, *frame, colourise(depth_m / FAR_M), prepared["pair_valid"], radius_px=3)
    every = boxed = images
    for camera in range(len(images)):
        pixels, depth = project(sample, camera)
        every = paint(every, camera, pixels[is_on_image(pixels, depth)], depth[is_on_image(pixels, depth)] / FAR_M, radius_px=1)
    for box in boxes:
        boxed = paint(boxed, box.camera, box.pixels, np.full(len(box.pixels), 0.9), radius_px=1)
        boxed = paint(boxed, box.camera, box.corners, np.full(8, 0.4), radius_px=2)
    for name, drawn in (("centres", centres), ("points", every), ("boxes", boxed)):
        tiled = tile_cameras(drawn[None])[0].movedim(0, -1)
        Image.fromarray((255 * tiled.clamp(0, 1)).byte().numpy()).save(folder / f"{name}.png")


def paint(
    images: torch.Tensor, camera: int, pixels: Float[np.ndarray, "K 2"], values: Float[np.ndarray, " K"], *, radius_px: int
) -> torch.Tensor:
    """Marks on one camera's image; those of low values lie on top."""
    order = np.argsort(-values, kind="stable")
    marks = torch.from_numpy(pixels[order]).float()
    shown = torch.ones(len(marks), dtype=torch.bool)
    return paint_points(
        images,
        torch.full((len(marks),), camera),
        marks,
        colourise(torch.from_numpy(values[order])),
        shown & (marks >= 0).all(-1) & (marks < torch.tensor([WIDTH, HEIGHT])).all(-1),
        radius_px=radius_px,
    )


if __name__ == "__main__":
    main()
