"""Ways to read surround clips into batches, each with its loader: what users write first, what they write next, and ours.

A reader is asked for a number of batches and gives as many, `uint8 (B, T, V, 3, H, W)`, from one worker process on a core of
its own where there is one to spare. All read the same clips, without augmentation.
"""

import io
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from trainer.config.data import SURROUND_CAMERAS
from trainer.data.loader import PlacedSamples, PlaceSampler, read_batches
from trainer.data.nuscenes import open_devkit
from trainer.data.order import Order, Portion, Share
from trainer.data.source import Room, Sample, Source, new_room

BATCH_CLIPS = 2
FRAMES = 2
WIDTH_PX, HEIGHT_PX = 704, 396
_PREFETCH_BATCHES = 4
_READS_IN_FLIGHT = 2
"""Of ours alone; the core is one, whatever waits."""

Pixels = UInt8[np.ndarray, "H W 3"]
Decode = Callable[[bytes], Pixels]
ClipFiles = Sequence[str]
"""The images of a clip, first all cameras of its first instant."""
Batches = Generator[Tensor, None, None]
Reader = Callable[[int], Batches]
"""Gives as many batches as it is asked for; closed before, it ends its worker."""


def decode_with_pillow(data: bytes) -> Pixels:
    """The whole picture, then its resize, which averages over what it shrinks."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image.resize((WIDTH_PX, HEIGHT_PX), Image.Resampling.BILINEAR))


def decode_with_opencv(data: bytes) -> Pixels:
    """What mmdet3d does; it leaves blue in front, for the device to turn."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return cv2.resize(image, (WIDTH_PX, HEIGHT_PX), interpolation=cv2.INTER_LINEAR)


def decode_scaled(data: bytes) -> Pixels:
    """The fastest there is on a CPU: the decoder leaves out what the resize would throw away."""
    image = simplejpeg.decode_jpeg(data, "RGB", fastupsample=True, min_width=WIDTH_PX, min_height=HEIGHT_PX)
    return cv2.resize(image, (WIDTH_PX, HEIGHT_PX), interpolation=cv2.INTER_LINEAR)


def list_devkit_clips(root: Path, version: str) -> dict[str, ClipFiles]:
    """The clips of successive key frames, by their first image, as the devkit's objects tell them."""
    devkit = open_devkit(root, version)
    clips: dict[str, ClipFiles] = {}
    for sample in devkit.sample:
        samples = [sample]
        while len(samples) < FRAMES and samples[-1]["next"]:
            samples.append(devkit.get("sample", samples[-1]["next"]))
        if len(samples) == FRAMES:
            files = [devkit.get_sample_data_path(each["data"][camera]) for each in samples for camera in SURROUND_CAMERAS]
            clips[files[0]] = files
    return clips


class DecodedClips(Dataset[Tensor]):
    """Clips from loose files."""

    def __init__(self, clips: Sequence[ClipFiles], decode: Decode) -> None:
        self.clips = clips
        self.decode = decode

    def __getitem__(self, number: int) -> UInt8[Tensor, "T V 3 H W"]:
        return join_images([self.decode(Path(file).read_bytes()) for file in self.clips[number]])


class DecodedStream(IterableDataset[Tensor]):
    """Clips from a streaming data set whose samples are columns of JPEG bytes."""

    def __init__(self, samples: IterableDataset[Mapping[str, bytes]], columns: Sequence[str], decode: Decode) -> None:
        self.samples = samples
        self.columns = columns
        self.decode = decode

    def __iter__(self) -> Iterator[UInt8[Tensor, "T V 3 H W"]]:
        for sample in self.samples:
            yield join_images([self.decode(sample[column]) for column in self.columns])


def join_images(images: Sequence[Pixels]) -> UInt8[Tensor, "T V 3 H W"]:
    """Colours in front; the copy that it takes is the collation's."""
    clip = torch.from_numpy(np.stack(images)).reshape(FRAMES, -1, HEIGHT_PX, WIDTH_PX, 3)
    return clip.permute(0, 1, 4, 2, 3)


@dataclass(frozen=True)
class ChosenClips:
    """Some samples of a source."""

    source: Source
    numbers: Sequence[int]

    @property
    def offers(self) -> frozenset[str]:
        """As Source has it."""
        return self.source.offers

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        """As Source has it."""
        return self.source.name(self.numbers[index])

    def load(self, index: int, rng: np.random.Generator, room: Room = new_room) -> Sample:
        """As Source has it."""
        return self.source.load(self.numbers[index], rng, room)

    def describe(self) -> dict[str, float | int | str]:
        """As Source has it."""
        return self.source.describe()


class ImagesAlone:
    """A preparation that keeps the images and makes nothing of them."""

    needs = keeps = frozenset({"images"})

    def prepare(self, sample: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """As Preparation has it."""
        del sample, rng
        return {}


def order_of(clips: int) -> Order:
    """Shuffled anew in each pass."""
    return Order(seed=0, portions=(Portion(clips),), global_batch=BATCH_CLIPS)


def read_files(clips: Sequence[ClipFiles], decode: Decode, cores: Sequence[int]) -> Reader:
    """Loose files through a DataLoader, in the order of ours."""
    order = order_of(len(clips))

    def read(batches: int) -> Batches:
        drawn = [[order.sample(step, slot) for slot in range(BATCH_CLIPS)] for step in range(batches)]
        yield from _load(DecodedClips(clips, decode), cores, batch_sampler=drawn)

    return read


def write_streaming(clips: Sequence[ClipFiles], folder: Path) -> None:
    """The clips as MosaicML's MDS, a column an image, bytes as they are."""
    from streaming import MDSWriter  # type: ignore[import-not-found]

    columns = _streaming_columns(len(clips[0]))
    with MDSWriter(out=str(folder), columns=dict.fromkeys(columns, "bytes")) as writer:
        for files in clips:
            writer.write({column: Path(file).read_bytes() for column, file in zip(columns, files, strict=True)})


def read_streaming(folder: Path, decode: Decode, cores: Sequence[int]) -> Reader:
    """MosaicML streaming from a local folder, shuffled by itself."""
    from streaming import StreamingDataset

    columns = _streaming_columns(FRAMES * len(SURROUND_CAMERAS))

    def read(batches: int) -> Batches:
        size = batches * BATCH_CLIPS
        samples = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH_CLIPS, epoch_size=size)
        yield from _load(DecodedStream(samples, columns, decode), cores, batch_size=BATCH_CLIPS)

    return read


def read_ours(source: Source, cores: Sequence[int]) -> Reader:
    """The loader that trains, over whatever `source` reads from."""
    samples = PlacedSamples(source, order_of(len(source)), {"images": ImagesAlone()})
    share = Share(rank=0, world_size=1, micro_batch=BATCH_CLIPS, micro_steps=1)

    def read(batches: int) -> Batches:
        arriving = read_batches(
            samples,
            PlaceSampler(share, 0, batches),
            workers=1,
            prefetch_batches=_PREFETCH_BATCHES,
            reads_in_flight=_READS_IN_FLIGHT,
            cores=cores,
        )
        for batch in arriving:
            yield batch.shared["images"]

    return read


def _load(dataset: Dataset[Tensor], cores: Sequence[int], **batches: Any) -> DataLoader[Tensor]:
    return DataLoader(
        dataset,
        num_workers=1,
        prefetch_factor=_PREFETCH_BATCHES,
        worker_init_fn=partial(_take_core, cores=cores),
        **batches,
    )


def _take_core(worker: int, *, cores: Sequence[int]) -> None:
    if cores:
        os.sched_setaffinity(0, {cores[worker]})


def _streaming_columns(images: int) -> list[str]:
    return [f"image_{number:02d}" for number in range(images)]
