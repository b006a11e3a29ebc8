"""The process of `benchmarks.soak` that reads, and how a sample is told from all others.

A preparation of its own hands every field of a sample over, so that what is looked at has gone the whole way: out of the store,
through decoding and the workers' shared memory, into the batch. A sample's stamp is drawn from the stream of its place; its digest
covers all fields.
"""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import NamedTuple

import numpy as np
import psutil

from benchmarks.memory import held_bytes
from models.batch import Batch
from tests.runs import ROOT
from trainer.config.data import NuscenesData, ShardsData
from trainer.data.build import build_source
from trainer.data.loader import PlacedSamples, PlaceSampler, read_batches
from trainer.data.mixed_source import portions_of
from trainer.data.order import Order, Purpose, Share, random_stream
from trainer.data.source import Source
from trainer.data.surround_source import CAMERA_FIELDS, LIDAR_FIELDS
from trainer.errors import OdonataError
from trainer.synthesis.rig import NUSCENES_LIDAR

BATCH = 4
STEP_S = 0.25
"""What a step of training would take."""
_FIELDS = CAMERA_FIELDS | LIDAR_FIELDS
_MOST_POINTS = NUSCENES_LIDAR.beams * NUSCENES_LIDAR.columns


class Sighting(NamedTuple):
    """What tells a sample from all others."""

    stamp: int
    digest: str


class Arrived(NamedTuple):
    """A step as the reader got it."""

    samples: tuple[Sighting, ...]
    replaced: tuple[str, ...]
    waited_s: float


class Reader:
    """A process that reads from one step on, until it is killed."""

    def __init__(self, data: ShardsData, seed: int, first_step: int) -> None:
        self._began = time.monotonic()
        self._inbox, outbox = Pipe(duplex=False)
        # Not through multiprocessing, whose children start their own, here the loader's, in another way than a run does.
        command = [sys.executable, "-c", "from benchmarks.soak_reader import main; main()"]
        self._process = subprocess.Popen(
            [*command, str(outbox.fileno()), data.model_dump_json(), str(seed), str(first_step)],
            cwd=ROOT,
            pass_fds=[outbox.fileno()],
            start_new_session=True,
        )
        outbox.close()  # so that the end of the process is the end of the pipe

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._began

    def wait(self) -> None:
        """Return when there is something to receive, or the process has ended."""
        self._inbox.poll(None)

    def receive(self, timeout_s: float) -> Arrived | str | None:
        """The next step, or why there will be none, or none yet; EOFError where the process has ended."""
        if not self._inbox.poll(timeout_s):
            return None
        try:
            return self._inbox.recv()
        except OSError as error:  # killed in the middle of a word
            raise EOFError from error

    def measure_memory(self) -> int:
        """Bytes that it and its workers hold."""
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            return held_bytes(process.pid for process in [root, *root.children(recursive=True)])
        return 0

    def kill(self) -> None:
        """kill -9 for it and its workers at once."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End it, if it has not ended."""
        self.kill()
        self._process.wait()
        self._inbox.close()


def main() -> None:
    """What the reading process does."""
    outbox, data, seed, first_step = sys.argv[1:]
    read_steps(ShardsData.model_validate_json(data), int(seed), int(first_step), Connection(int(outbox), readable=False))


def read_steps(data: ShardsData, seed: int, first_step: int, outbox: Connection) -> None:
    """A step, a pause in place of training, the next step."""
    try:
        batches = iterate_batches(data, seed, first_step)
        while True:
            began = time.monotonic()
            batch = next(batches)
            waited_s = time.monotonic() - began
            outbox.send(Arrived(see(batch), batch.replaced, waited_s))
            time.sleep(max(0.0, began + waited_s + STEP_S - time.monotonic()))
    except OdonataError as error:
        outbox.send(str(error))


def iterate_batches(data: ShardsData, seed: int, first_step: int) -> Iterator[Batch]:
    """As a run of one rank reads them."""
    source = open_source(data)
    samples = PlacedSamples(source, build_order(source, seed), {"witness": Witness(data.clip.frames)})
    return read_batches(
        samples,
        PlaceSampler(Share(0, 1, BATCH, 1), first_step, sys.maxsize),
        workers=data.workers,
        prefetch_batches=data.prefetch_batches,
        reads_in_flight=data.reads_in_flight,
        timeout_s=data.timeout_s,
    )


@dataclass(frozen=True)
class Witness:
    """A preparation that keeps every field, the points padded to one number, and draws the stamp."""

    frames: int

    needs = _FIELDS
    keeps = _FIELDS - {"points_lidar"}

    def prepare(self, sample: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """As Preparation has it."""
        points = np.zeros((self.frames * _MOST_POINTS, 4), dtype=np.float32)
        points[: len(sample["points_lidar"])] = sample["points_lidar"]
        return {"points_lidar": points, "stamp": np.array(draw_stamp(rng))}


class Reference:
    """What a dataroot gives, without the loader and without shards."""

    def __init__(self, data: NuscenesData, seed: int) -> None:
        self._source = open_source(data)
        self._order = build_order(self._source, seed)

    def see(self, step: int) -> list[Sighting]:
        """The samples of a step."""
        return [self._see(step, slot) for slot in range(BATCH)]

    def _see(self, step: int, slot: int) -> Sighting:
        def stream(purpose: Purpose) -> np.random.Generator:
            return random_stream(self._order.seed, purpose, step=step, slot=slot)

        sample = self._source.load(self._order.sample(step, slot), stream(Purpose.LOAD))
        return Sighting(draw_stamp(stream(Purpose.PREPARE)), digest(sample))


def open_source(data: NuscenesData | ShardsData) -> Source:
    """Surround clips with LiDAR."""
    source = build_source(data, "train", _FIELDS, augment=True)
    assert source is not None, "drives have a training split"
    return source


def build_order(source: Source, seed: int) -> Order:
    return Order(seed, portions_of(source), BATCH)


def see(batch: Batch) -> tuple[Sighting, ...]:
    """The samples of a batch, by what has arrived of them."""
    prepared = {name: values.numpy() for name, values in batch.prepared["witness"].items()}
    fields = {name: values.numpy() for name, values in batch.shared.items()} | {"points_lidar": prepared["points_lidar"]}
    return tuple(
        Sighting(int(stamp), digest({name: values[slot] for name, values in fields.items()}))
        for slot, stamp in enumerate(prepared["stamp"])
    )


def draw_stamp(rng: np.random.Generator) -> int:
    return int(rng.integers(1 << 62))


def digest(sample: Mapping[str, np.ndarray]) -> str:
    """Of the names, types, shapes and bytes of all fields; of the points without what they were padded with."""
    points = sample["points_lidar"][: sample["first_point"][-1]]
    found = hashlib.sha256()
    for name, array in sorted({**sample, "points_lidar": points}.items()):
        found.update(repr((name, array.dtype.str, array.shape)).encode())
        found.update(np.ascontiguousarray(array))
    return found.hexdigest()
