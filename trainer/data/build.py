"""From a data config to sources: the index, pairs and surround clips are made if needed, once on each node, then mapped.

Which sources there are follows from the fields that the objectives need: pairs, surround clips, consecutive images, or some joined.

Making them is guarded by a lock file, so every rank may call `build_source` and one works while the others wait. The
tables are read in a process of its own: the several GB that the devkit takes go back when it ends, and loader workers,
forked or spawned, never carry it.
"""

import contextlib
import fcntl
import functools
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

from trainer.config.data import AugmentConfig, DataConfig, DatasetConfig, DrivesData, ImagePairsData, NuscenesData, ShardsData
from trainer.config.store import StoreConfig
from trainer.data.boxes import BOX_FIELDS, open_boxes
from trainer.data.columns import HEADER, Columns, is_whole
from trainer.data.flow_source import FLOW_FIELDS, FlowSource, find_consecutive
from trainer.data.image_pairs import read_image_pairs
from trainer.data.index import Index
from trainer.data.joint_source import JointSource
from trainer.data.level_boxes import LEVEL_FIELDS, open_level_boxes
from trainer.data.maps import DRIVABLE_FIELDS, LINE_FIELDS, DrivableReader, LineReader
from trainer.data.mixed_source import MixedSource
from trainer.data.nuscenes import build_index, index_folder, index_path, open_index, temporary_folder
from trainer.data.nuscenes_maps import build_maps, list_locations, maps_path
from trainer.data.pair_source import PAIR_FIELDS, PairSource
from trainer.data.pairs import mine_pairs, pairs_path
from trainer.data.shards.indexing import open_packed_index, packed_index_path, write_packed_index
from trainer.data.shards.layout import Version, choose_version, read_version
from trainer.data.shards.recording import NuscenesRecording
from trainer.data.source import Source
from trainer.data.surround_clips import find_surround_clips, surround_path
from trainer.data.surround_source import CAMERA_FIELDS, LIDAR_FIELDS, Annotations, SurroundSource
from trainer.errors import DataError
from trainer.store.open import open_store

log = logging.getLogger(__name__)

_KEPT_S = 30 * 86_400
"""Longer than any index is left unused by whoever still wants it."""

Split = Literal["train", "val"]

_SURROUND_FIELDS = CAMERA_FIELDS | LIDAR_FIELDS | BOX_FIELDS | LEVEL_FIELDS | DRIVABLE_FIELDS | LINE_FIELDS


def build_source(config: DataConfig, split: Split, needs: frozenset[str], *, augment: bool) -> Source | None:
    """The samples of a split with the fields `needs`, as far as there are such; None where the config names no such split.

    Prepares what is not there yet.
    """
    augmentation = config.augment if augment else None
    if isinstance(config, ImagePairsData):
        list_name = config.train_list if split == "train" else config.val_list
        return None if list_name is None else read_image_pairs(config, list_name, augmentation)
    name = config.train_split if split == "train" else config.val_split
    if name is None:
        return None
    if isinstance(config, NuscenesData):
        return _build_drives_source(open_nuscenes_index(config), config, split, name, needs, augmentation)
    parts = [
        _build_drives_source(open_dataset_index(config, dataset), _config_of(config, dataset), split, name, needs, augmentation)
        for dataset in config.datasets
    ]
    return MixedSource(tuple(parts), tuple(dataset.weight for dataset in config.datasets)) if len(parts) > 1 else parts[0]


def open_nuscenes_index(config: NuscenesData) -> Index:
    """The index of a dataroot, made where it is not there yet."""
    path = index_path(config)
    _make_once(path, lambda: _build_in_own_process(config, path))
    return open_index(path)


def open_dataset_index(config: ShardsData, dataset: DatasetConfig) -> Index:
    """The index of a packed data set, made where it is not there yet."""
    store = open_store(dataset.uri, config.store)
    version = _read_version(dataset.uri, config.store, choose_dataset_version(config, dataset))
    path = packed_index_path(store, version, index_folder(config))
    _make_once(path, lambda: write_packed_index(store, version, path))
    patience_s = config.timeout_s / 2  # so that what the store says is heard before the loader gives up
    return open_packed_index(path, config.store, config.cache, patience_s=patience_s)


def open_recording(root: Path, version: str | None = None, *, prefix: str = "") -> NuscenesRecording:
    """A dataroot to pack, its scenes named with `prefix` before."""
    return NuscenesRecording(open_nuscenes_index(NuscenesData(root=root, version=version)), prefix)


def choose_dataset_version(config: ShardsData, dataset: DatasetConfig) -> int:
    """The version that `dataset` names, or the newest; DataError where there is none such."""
    return choose_version(open_store(dataset.uri, config.store), dataset.version)


@functools.lru_cache(maxsize=8)
def _read_version(uri: str, store: StoreConfig, number: int) -> Version:
    """A version, which never changes; that of a fleet is long, and a start asks for it several times."""
    return read_version(open_store(uri, store), number)


def _config_of(config: ShardsData, dataset: DatasetConfig) -> ShardsData:
    """What holds for one of the data sets."""
    return config.model_copy(update={"cameras": dataset.cameras}) if dataset.cameras else config


def _build_drives_source(
    index: Index, config: DrivesData, split: Split, name: str, needs: frozenset[str], augmentation: AugmentConfig | None
) -> Source:
    _check_cameras(index, config)
    scenes = find_scenes(index, split, name)
    parts: list[Source] = []
    if needs & _SURROUND_FIELDS:
        needs_lidar = bool(needs & LIDAR_FIELDS)
        annotations = _open_annotations(index, config, needs)
        clips = _open_surround_clips(
            index, config, scenes, split=name, needs_lidar=needs_lidar, needs_boxes=bool(needs & (BOX_FIELDS | LEVEL_FIELDS))
        )
        parts.append(SurroundSource(index, clips, config, augmentation, has_lidar=needs_lidar, annotations=annotations))
    if needs & FLOW_FIELDS:
        parts.append(FlowSource(index, find_consecutive(index, config, scenes, split=name), config, augmentation))
    if needs & PAIR_FIELDS or not parts:
        parts.append(PairSource(index, _open_pairs(index, config, scenes, split=name), config, augmentation))
    return parts[0] if len(parts) == 1 else JointSource(tuple(parts))


def _open_pairs(index: Index, config: DrivesData, scenes: list[int], *, split: str) -> Columns:
    path = pairs_path(index, config, scenes)
    _make_once(path, lambda: mine_pairs(index, config, scenes, split=split))
    return Columns(path)


def _open_annotations(index: Index, config: DrivesData, needs: frozenset[str]) -> tuple[Annotations, ...]:
    """What reads the fields that people annotated, of those that are needed."""
    readers: list[Annotations] = []
    if needs & BOX_FIELDS:
        readers.append(open_boxes(index))
    if needs & LEVEL_FIELDS:
        readers.append(open_level_boxes(index))
    if needs & DRIVABLE_FIELDS:
        readers.append(DrivableReader(index, open_maps(index, config)))
    if needs & LINE_FIELDS:
        readers.append(LineReader(index, open_maps(index, config)))
    return tuple(readers)


def open_maps(index: Index, config: DrivesData) -> Columns:
    """The maps of the cities of `index`, made where they are not there yet; DataError where a dataroot has none."""
    path = maps_path(index, index_folder(config))
    _make_once(path, lambda: _run_in_own_process(build_maps, Path(index.root), list_locations(index), path))
    return Columns(path)


def _open_surround_clips(
    index: Index, config: DrivesData, scenes: list[int], *, split: str, needs_lidar: bool, needs_boxes: bool
) -> Columns:
    if needs_lidar and not index.has_sweeps:
        raise DataError(
            f"an objective needs LiDAR and {index.root} {index.version} has no LiDAR sweep; take data that has some, "
            "leave SimIPU out, or let MIM4D do without (depth_supervision: false)"
        )
    path = surround_path(index, config, scenes, needs_lidar=needs_lidar, needs_boxes=needs_boxes)
    find = functools.partial(find_surround_clips, index, config, scenes, needs_lidar=needs_lidar, needs_boxes=needs_boxes)
    _make_once(path, lambda: find(split=split))
    return Columns(path)


def find_scenes(index: Index, split: Split, name: str) -> list[int]:
    """Rows of the scenes of split `name`; DataError where it is unknown or empty here."""
    asked = f"split {name} was asked for by data.{split}_split"
    optional = ", or to null to train with nothing held out" if split == "val" else ""
    known = ", ".join(f"{known} ({len(scenes)} scenes)" for known, scenes in index.splits.items())
    if name not in index.splits:
        raise DataError(f"{asked} and {index.root} knows {known}; set data.{split}_split to one of them{optional}")
    if not index.splits[name]:
        raise DataError(
            f"{asked} and none of its scenes is among the {len(index.scenes)} of {index.root} {index.version}, which has "
            f"{known}; set data.{split}_split to one that has scenes{optional}"
        )
    row_of = {scene: row for row, scene in enumerate(index.scenes)}
    return [row_of[scene] for scene in index.splits[name]]


def _check_cameras(index: Index, config: DrivesData) -> None:
    unknown = [camera for camera in config.cameras if camera not in index.cameras]
    if unknown or not config.cameras:
        raise DataError(
            f"data.cameras asks for {', '.join(unknown) or 'no camera'} and {index.root} {index.version} has "
            f"{', '.join(index.cameras)}; set data.cameras to some of these"
        )


def _make_once(path: Path, make: Callable[[], object]) -> None:
    if is_whole(path):
        _note_use(path)
        return
    try:
        with _locked(path.with_name(f"{path.name}.lock")):
            if not is_whole(path):
                make()
        if path.parent == temporary_folder():
            _remove_unused(path.parent)
    except OSError as error:
        raise DataError(
            f"the index of a dataroot was to be written to {path} and cannot be: {error}; "
            "set data.index_folder to a folder of this node that can be written and has room"
        ) from error


def _note_use(path: Path) -> None:
    with contextlib.suppress(OSError):  # somebody else's, or read-only
        os.utime(path / HEADER)


def _remove_unused(folder: Path) -> None:
    """Remove indexes that were not opened for long; asked of the system's temporary folder alone, any other is somebody's own."""
    for header in folder.glob(f"*/{HEADER}"):
        if time.time() - header.stat().st_mtime > _KEPT_S:
            log.info("removing the index %s, which was not opened for %d days", header.parent, _KEPT_S // 86_400)
            shutil.rmtree(header.parent, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for every other process of this node that holds `path`; a killed holder lets go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build_in_own_process(config: NuscenesData, path: Path) -> None:
    began = time.monotonic()
    log.info("reading the nuScenes tables of %s, once: the index will stand at %s", config.root, path)
    _run_in_own_process(build_index, config)
    index = open_index(path)
    images = len(index.columns["image_scene"])
    log.info("indexed %d images of %d scenes in %.1f s", images, len(index.scenes), time.monotonic() - began)


def _run_in_own_process(work: Callable[..., object], *arguments: object) -> None:
    """For what imports the devkit."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(work, *arguments).result()
    except BrokenProcessPool as error:
        raise DataError(
            f"tables or maps for {work.__name__} were to be read by a process of its own and it was killed, most likely for memory; "
            "the full nuScenes takes 8 GB once: give this node that much, or bring the index in data.index_folder"
        ) from error
