"""Does anything that a training process does grow with the data set? An index of 10^8 images, opened, ordered, resumed.

The columns of 10^8 synthetic images and the table of their clips are written as `odonata train` would find them on a node: 20 s drives of
six cameras at 12 Hz and a LiDAR at 20 Hz, packed eight to a shard. What the measured code reads of them is real, the rest
are zeros that take no room. Then fresh processes, their pages forgotten, open them through `build_source` and go to the first sample's
byte ranges, one at step 0, one at a step far into the run; beside them one that shuffles a list of the clips, which each rank of a
plain distributed sampler would do. Memory is what a process holds itself, at its highest.

Making such an index is done once on a node; it is measured on fewer rows and extrapolated: images through the real tables, clips
of some drives of the large index.

The order is judged by how many different scenes meet in a batch of 64, over what independent draws would give, and by the correlation
of one number with the next; 850 scenes of 38 clips, as nuScenes' key frames have.

    python -m benchmarks.data_scale --save             # some minutes and 6 GB of disk for a while
    python -m benchmarks.data_scale --rows 1000000     # a look

JSON keys: rows, clips, start_s (to the first sample's ranges), start_cpu_s (the part of it that other work cannot stretch), import_s
(no part of it), resume_s, order_us_per_sample,
extra_memory_bytes, shuffled_list_bytes, shuffled_list_s, index_rows_per_s, index_minutes (for all rows), index_extra_bytes,
index_extra_bytes_of_half (of the rows it was measured with), clip_minutes (for all drives), scenes_per_batch_over_ideal,
lag_1_correlation.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from benchmarks.memory import watching_held
from benchmarks.report import Report, build_parser
from tests.runs import ROOT
from trainer.config.data import SURROUND_CAMERAS, ClipConfig, DatasetConfig, ShardsData
from trainer.data.build import build_source
from trainer.data.columns import NewColumns, new_columns
from trainer.data.index import Index
from trainer.data.mixed_source import portions_of
from trainer.data.order import Order, Portion
from trainer.data.shards.indexing import open_packed_index, packed_index_path, write_packed_index
from trainer.data.shards.layout import KINDS, SCHEMAS, TABLES, Pack, StoredObject, Table, Version, commit_version, read_version
from trainer.data.shards.packing import Placed, as_stored, tabulate
from trainer.data.shards.reading import ShardFiles
from trainer.data.shards.recording import NO_SWEEPS, Drive, Images
from trainer.data.shards.tables import write_table
from trainer.data.surround_clips import find_surround_clips, surround_path
from trainer.data.surround_source import CAMERA_FIELDS, SurroundSource
from trainer.store.base import Store
from trainer.store.open import open_store

FRAMES = 240
"""Of a drive: 20 s at 12 Hz."""
SWEEPS = 400
IMAGES = FRAMES * len(SURROUND_CAMERAS)
"""Of a drive."""
DRIVES_PER_SHARD = 8
CLIP = ClipConfig(frames=2, spacing_s=0.5)
FAR_STEP = 10**7
GLOBAL_BATCH = 1024
DRAWN = 10_000
PLANNED = 100
INDEXED_DRIVES = 140
CLIPPED_DRIVES = 20
SCENES, CLIPS_PER_SCENE, BATCH, EPOCHS = 850, 38, 64, 10
_FRAME_US = 1_000_000 // 12
_SWEEP_US = 50_000
_DRIVE_US = 60_000_000
_IMAGE_BYTES = 150_000
_STRIDE_BYTES = 150_528
"""From one image of a tar to the next: header, bytes, padding to blocks of 512."""
_DRIVES_AT_ONCE = 512


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--rows", type=int, default=10**8, help="images in the index")
    arguments = parser.parse_args()
    report = Report("data_scale", arguments)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure_start(report, Path(folder), arguments.rows // IMAGES)
        figures |= measure_indexing(report, Path(folder), figures["rows"])
    report.finish({**figures, **judge_order(report)})


def measure_start(report: Report, folder: Path, drives: int) -> dict[str, Any]:
    """Write the large index; what processes that open it need, and what one needs that shuffles a list."""
    dataset = DatasetConfig(uri=str(folder / "packed"))
    data = ShardsData(datasets=(dataset,), clip=CLIP, index_folder=folder / "index", val_split=None)
    index = write_index(data, drives)
    clips = write_clips(index, data, drives)
    report.say(f"{drives} drives with {drives * IMAGES} images and {clips} clips are written")
    clip_minutes = time_clips(index, data) * drives / 60
    forget_pages(folder)
    start = run_apart("start", data.model_dump_json(), 0)
    forget_pages(folder)
    resume = run_apart("start", data.model_dump_json(), FAR_STEP)
    shuffled = run_apart("shuffle", clips)
    for where, figures in (("at step 0", start), (f"at step {FAR_STEP}", resume)):
        report.say(
            f"from opening to the first sample's ranges {where}: {figures['seconds']:.2f} s, {figures['cpu_s']:.2f} s of it computing; "
            f"{figures['extra_bytes'] / 1e6:.1f} MB; imports before that {figures['import_s']:.1f} s"
        )
    report.say(f"a place of the order: {resume['order_us']:.1f} us")
    report.say(
        f"a shuffled list: {shuffled['list_bytes'] / 1e6:.1f} MB and {shuffled['seconds']:.2f} s, on each rank, each epoch"
    )
    report.say(f"to find the clips of all drives, once on a node: {clip_minutes:.1f} minutes")
    return {
        "rows": drives * IMAGES,
        "clips": clips,
        "start_s": start["seconds"],
        "start_cpu_s": start["cpu_s"],
        "import_s": start["import_s"],
        "resume_s": resume["seconds"],
        "resume_step": FAR_STEP,
        "order_us_per_sample": resume["order_us"],
        "extra_memory_bytes": max(start["extra_bytes"], resume["extra_bytes"]),
        "shuffled_list_bytes": shuffled["list_bytes"],
        "shuffled_list_s": shuffled["seconds"],
        "clip_minutes": clip_minutes,
    }


# The large index


def write_index(data: ShardsData, drives: int) -> Index:
    """A version of a packed data set without its shards and tables, and the columns that its tables would give."""
    store = open_store(data.datasets[0].uri)
    version = describe_version(drives)
    commit_version(store, version)
    assert data.index_folder is not None, "the benchmark gives one"
    path = packed_index_path(store, version, data.index_folder)
    names = name_drives(drives)
    header = {"root": store.uri, "version": "version 1", "splits": {"train": names, "all": names}}
    shards = [shard.key for shard in version.packs[0].shards]
    with new_columns(path, header) as new:
        for column, texts in (("scene_name", names), ("camera_name", sorted(SURROUND_CAMERAS)), ("shard_key", shards)):
            fill(new, column, np.array(texts, dtype=np.bytes_))
        fill(new, "first_image", np.arange(drives * len(SURROUND_CAMERAS) + 1) * FRAMES)
        fill(new, "mount_pix_from_cam", np.eye(3)[None])
        fill(new, "mount_ego_from_cam", np.eye(4)[None])
        fill_images(new, drives)
        fill_sweeps(new, drives)
    return open_packed_index(path, data.store, None)


def describe_version(drives: int) -> Version:
    """With as many shards as that many drives have."""
    groups = range(-(-drives // DRIVES_PER_SHARD))
    shards = tuple(describe_object(name_shard(group, kind)) for group in groups for kind in KINDS)
    tables = {table: describe_object(f"packs/000001/{table}.parquet") for table in TABLES}
    return build_version(drives, tables, shards, sweeps=drives * SWEEPS)


def describe_object(key: str) -> StoredObject:
    """Of an object that is not there."""
    return StoredObject(key=key, bytes=0, checksum="crc32:00000000")


def build_version(drives: int, tables: Mapping[Table, StoredObject], shards: tuple[StoredObject, ...], *, sweeps: int) -> Version:
    counts = {"drives": drives, "images": drives * IMAGES, "sweeps": sweeps}
    pack = Pack(name="000001", source="the benchmark", **counts, tables=dict(tables), shards=shards)
    return Version(version=1, created=datetime.now(UTC), packs=(pack,))


def name_drives(drives: int) -> list[str]:
    return [f"drive-{drive:07d}" for drive in range(drives)]


def name_shard(group: int, kind: str) -> str:
    return f"shards/000001-{group:05d}.{kind}.tar"


def fill(new: NewColumns, name: str, array: np.ndarray) -> None:
    new.create(name, array.dtype, array.shape)[...] = array


def fill_images(new: NewColumns, drives: int) -> None:
    """What names a sample and finds its bytes; poses, sizes and checksums stay zero."""
    create_zeros(new, "image", drives * IMAGES, mount=np.int32, is_key_frame=np.bool_, crc32=np.uint32)
    new.create("image_world_from_ego", np.dtype(np.float64), (drives * IMAGES, 4, 4))
    new.create("image_size_px", np.dtype(np.int32), (drives * IMAGES, 2))
    types = {
        "timestamp_us": np.int64,
        "scene": np.int32,
        "camera": np.int16,
        "shard": np.int32,
        "offset": np.int64,
        "bytes": np.int32,
    }
    columns = create_zeros(new, "image", drives * IMAGES, **types)
    cameras = len(SURROUND_CAMERAS)
    camera, frame = (axis.reshape(-1) for axis in np.indices((cameras, FRAMES)))
    for some in pieces_of(drives):
        rows = slice(some.start * IMAGES, some.stop * IMAGES)
        drive = np.arange(some.start, some.stop)[:, None]
        place = (drive % DRIVES_PER_SHARD) * IMAGES + frame * cameras + camera
        columns["timestamp_us"][rows] = (drive * _DRIVE_US + frame * _FRAME_US).reshape(-1)
        columns["scene"][rows] = np.repeat(drive, IMAGES)
        columns["camera"][rows] = np.tile(camera, len(drive))
        columns["shard"][rows] = np.repeat(drive // DRIVES_PER_SHARD * len(KINDS), IMAGES)
        columns["offset"][rows] = place.reshape(-1) * _STRIDE_BYTES
        columns["bytes"][rows] = _IMAGE_BYTES


def fill_sweeps(new: NewColumns, drives: int) -> None:
    """When they were taken; where they lie stays zero."""
    create_zeros(
        new, "sweep", drives * SWEEPS, is_key_frame=np.bool_, shard=np.int32, offset=np.int64, bytes=np.int32, crc32=np.uint32
    )
    for pose in ("sweep_ego_from_lidar", "sweep_world_from_ego"):
        new.create(pose, np.dtype(np.float64), (drives * SWEEPS, 4, 4))
    columns = create_zeros(new, "sweep", drives * SWEEPS, timestamp_us=np.int64, scene=np.int32)
    for some in pieces_of(drives):
        rows = slice(some.start * SWEEPS, some.stop * SWEEPS)
        drive = np.arange(some.start, some.stop)[:, None]
        columns["timestamp_us"][rows] = (drive * _DRIVE_US + np.arange(SWEEPS) * _SWEEP_US).reshape(-1)
        columns["scene"][rows] = np.repeat(drive, SWEEPS)


def create_zeros(new: NewColumns, kind: str, rows: int, **types: type) -> dict[str, np.ndarray]:
    return {name: new.create(f"{kind}_{name}", np.dtype(dtype), (rows,)) for name, dtype in types.items()}


def pieces_of(drives: int) -> Iterator[range]:
    for first in range(0, drives, _DRIVES_AT_ONCE):
        yield range(first, min(first + _DRIVES_AT_ONCE, drives))


def write_clips(index: Index, data: ShardsData, drives: int) -> int:
    """The clips that begin at every frame, as `find_surround_clips` has them; how many there are."""
    stride = round(CLIP.spacing_s * 12)
    firsts = FRAMES - stride * (CLIP.frames - 1)
    cameras = [sorted(SURROUND_CAMERAS).index(camera) for camera in SURROUND_CAMERAS]
    frame = np.arange(firsts)[:, None, None] + stride * np.arange(CLIP.frames)[:, None]
    of_drive = np.array(cameras) * FRAMES + frame
    path = surround_path(index, data, range(drives), needs_lidar=False)
    with new_columns(path, {"figures": {"scenes": drives, "clips": drives * firsts}}) as new:
        images = new.create("clip_images", np.dtype(np.int32), (drives * firsts, *of_drive.shape[1:]))
        new.create("clip_sweeps", np.dtype(np.int32), (drives * firsts, CLIP.frames))
        for some in pieces_of(drives):
            drive = np.arange(some.start, some.stop)[:, None, None, None]
            images[some.start * firsts : some.stop * firsts] = (drive * IMAGES + of_drive).reshape(-1, *of_drive.shape[1:])
    return drives * firsts


def time_clips(index: Index, data: ShardsData) -> float:
    """Seconds that it takes to find the clips of a drive."""
    began = time.monotonic()
    find_surround_clips(index, data, range(CLIPPED_DRIVES), needs_lidar=False, split="train")
    return (time.monotonic() - began) / CLIPPED_DRIVES


def forget_pages(folder: Path) -> None:
    """Have what is read next come from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# Processes of their own


def run_apart(what: str, *arguments: object) -> dict[str, float]:
    """What `probe` says of itself in a fresh process."""
    command = [sys.executable, "-c", "from benchmarks.data_scale import probe; probe()", what, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE).stdout)


def probe() -> None:
    """Do what the command line says, and print what it took."""
    import_s = time.time() - psutil.Process().create_time()
    what, *arguments = sys.argv[1:]
    with watching_held() as peak:
        figures = PROBES[what](*arguments)
    print(json.dumps({**figures, "import_s": import_s, "extra_bytes": peak.extra_bytes}))


def probe_start(data: str, step: str) -> dict[str, float]:
    """Open the data, find the first sample's byte ranges, then the places of many samples and the ranges of some."""
    began, cpu_began = time.monotonic(), time.process_time()
    source = build_source(ShardsData.model_validate_json(data), "train", CAMERA_FIELDS, augment=True)
    assert isinstance(source, SurroundSource), "one data set, no pairs"
    order = Order(0, portions_of(source), GLOBAL_BATCH)
    plan_sample(source, order.sample(int(step), 0))
    seconds, cpu_s = time.monotonic() - began, time.process_time() - cpu_began
    began = time.monotonic()
    samples = [order.sample(int(step) + number // GLOBAL_BATCH, number % GLOBAL_BATCH) for number in range(DRAWN)]
    order_us = (time.monotonic() - began) / DRAWN * 1e6
    for sample in samples[:PLANNED]:
        plan_sample(source, sample)
    return {"seconds": seconds, "cpu_s": cpu_s, "order_us": order_us}


def plan_sample(source: SurroundSource, sample: int) -> None:
    """Its name, and one request an instant: the images of an instant are neighbours."""
    assert isinstance(source.index.files, ShardFiles), "the data is packed"
    (rows,), _ = source.draw_reads(sample, np.random.default_rng(0))
    spans = source.index.files.plan_images(rows)
    assert source.name(sample).startswith("drive-") and len(spans) == CLIP.frames, spans


def probe_shuffle(clips: str) -> dict[str, float]:
    """What a rank does without a keyed permutation."""
    began = time.monotonic()
    order = np.random.default_rng(0).permutation(int(clips))
    return {"seconds": time.monotonic() - began, "list_bytes": order.nbytes}


def probe_indexing(folder: str) -> dict[str, float]:
    """Copy the tables of a packed data set into columns."""
    store = open_store(Path(folder, "packed"))
    version = read_version(store)
    began = time.monotonic()
    write_packed_index(store, version, Path(folder, "index"))
    return {"seconds": time.monotonic() - began}


PROBES: dict[str, Callable[..., dict[str, float]]] = {"start": probe_start, "shuffle": probe_shuffle, "index": probe_indexing}


# Making an index


def measure_indexing(report: Report, folder: Path, rows: int) -> dict[str, float]:
    """The index of some drives from real tables, and of half as many: memory must not follow."""
    half, whole = (time_indexing(folder / f"drives-{drives}", drives) for drives in (INDEXED_DRIVES // 2, INDEXED_DRIVES))
    rows_per_s = INDEXED_DRIVES * IMAGES / whole["seconds"]
    report.say(f"index from tables: {rows_per_s:.0f} rows/s, {rows / rows_per_s / 60:.1f} minutes for {rows}")
    report.say(f"its memory: {half['extra_bytes'] / 1e6:.1f} MB, {whole['extra_bytes'] / 1e6:.1f} MB for twice the rows")
    return {
        "index_rows_per_s": rows_per_s,
        "index_minutes": rows / rows_per_s / 60,
        "index_extra_bytes": whole["extra_bytes"],
        "index_extra_bytes_of_half": half["extra_bytes"],
    }


def time_indexing(folder: Path, drives: int) -> dict[str, float]:
    """What the index of that many drives takes."""
    store_tables(open_store(folder / "packed"), drives)
    return run_apart("index", folder)


def store_tables(store: Store, drives: int) -> None:
    """A version of that many drives whose shards are empty."""
    groups = [range(first, min(first + DRIVES_PER_SHARD, drives)) for first in range(0, drives, DRIVES_PER_SHARD)]
    shards = tuple(as_stored(store.put(name_shard(place, KINDS[0]), b"")) for place in range(len(groups)))
    tabulated = [tabulate_group(place, group) for place, group in enumerate(groups)]
    tables = {
        name: as_stored(
            write_table(store, f"packs/000001/{name}.parquet", (tables[name] for tables in tabulated), SCHEMAS[name])[0]
        )
        for name in TABLES
    }
    commit_version(store, build_version(drives, tables, shards, sweeps=0))


def tabulate_group(group: int, drives: range) -> dict[str, pa.Table]:
    """The rows of drives that share a shard, each with a calibration of its own."""
    described = [describe_drive(drive) for drive in drives]
    files = [file for drive in described for file in drive.images.file]
    shard = name_shard(group, KINDS[0])
    return tabulate(described, {file: Placed(shard, place * _STRIDE_BYTES, _IMAGE_BYTES, 0) for place, file in enumerate(files)})


def describe_drive(drive: int) -> Drive:
    """A drive with poses and calibrations of chance."""
    rng = np.random.default_rng(drive)
    camera, frame = (axis.reshape(-1) for axis in np.indices((len(SURROUND_CAMERAS), FRAMES)))
    images = Images(
        sensor=tuple(SURROUND_CAMERAS[place] for place in camera),
        file=tuple(f"{drive}/{place}.jpg" for place in range(IMAGES)),
        timestamp_us=drive * _DRIVE_US + frame * _FRAME_US,
        is_key_frame=np.zeros(IMAGES, dtype=bool),
        ego_from_sensor=rng.normal(size=(len(SURROUND_CAMERAS), 4, 4))[camera],
        world_from_ego=rng.normal(size=(IMAGES, 4, 4)),
        pix_from_cam=rng.normal(size=(len(SURROUND_CAMERAS), 3, 3))[camera],
        size_px=np.tile((1600, 900), (IMAGES, 1)),
    )
    return Drive(f"drive-{drive:07d}", ("train",), images, NO_SWEEPS)


# The order


def judge_order(report: Report) -> dict[str, float]:
    """How evenly batches draw on scenes, and whether a number tells something of the next one."""
    length = SCENES * CLIPS_PER_SCENE
    order = Order(0, (Portion(length),), BATCH)
    steps = EPOCHS * length // BATCH
    samples = np.array([[order.sample(step, slot) for slot in range(BATCH)] for step in range(steps)])
    found = np.mean([len(np.unique(batch)) for batch in samples // CLIPS_PER_SCENE])
    ideal = SCENES * (1 - (1 - 1 / SCENES) ** BATCH)
    walk = samples.reshape(-1)
    correlation = np.corrcoef(walk[:-1], walk[1:])[0, 1]
    report.say(f"scenes in a batch of {BATCH}: {found:.2f}, {found / ideal:.4f} of what independent draws give")
    report.say(f"correlation of a number with the next: {correlation:+.4f}")
    return {"scenes_per_batch_over_ideal": float(found / ideal), "lag_1_correlation": float(correlation)}


if __name__ == "__main__":
    main()
