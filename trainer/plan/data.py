"""What the data of a run asks of the store and of the nodes' cores, for so many GPUs at so long a step.

Requests and bytes come from the index: the very ranges that the run's first samples will fetch, planned by the code that fetches them
and not fetched. CPU seconds are measured on this machine: some of these samples are read, decoded and prepared as a loader worker
does it, on one thread. The rest is multiplication.

S3 serves 5,500 GET a second from each partition of a bucket's names and makes more partitions as load stays
(https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html); shards have names of their own, so they part
well. A node's cache holds what its own ranks have read: each epoch sends other clips to it, so it spares the share of fetches that
it holds of the whole data set, no more.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from models.pretraining import build_preparations
from trainer.config.data import ShardsData
from trainer.config.run import RunConfig
from trainer.data.build import build_source
from trainer.data.index import Index
from trainer.data.joint_source import JointSource
from trainer.data.loader import PlacedSamples, check_needs, needed_fields
from trainer.data.mixed_source import MixedSource, portions_of
from trainer.data.order import Order, Purpose, random_stream
from trainer.data.pair_source import PairSource
from trainer.data.shards.reading import ShardFiles, Span
from trainer.data.source import Source
from trainer.data.surround_source import SurroundSource
from trainer.errors import ConfigError
from trainer.plan.setup import GPUS_PER_NODE

GETS_PER_PREFIX_S = 5_500
"""What S3 promises of one partition; source above."""
_PLANNED_SAMPLES = 512


@dataclass(frozen=True)
class SampleNeeds:
    """What one sample takes, on average."""

    gets: float
    bytes: float
    """Fetched."""
    useful_bytes: float
    """Of files that the sample is made of."""
    images: float
    cpu_s: float
    """To fetch, decode, augment and prepare it, on one core of this machine."""
    cpu_spread_s: float
    """Standard deviation of it between samples."""


@dataclass(frozen=True)
class DataPlan:
    """What the data of `gpus` GPUs asks for, each taking `clips_per_gpu` samples in `step_s` seconds."""

    gpus: int
    clips_per_s: float
    images_per_s: float
    gets_per_s: float
    gb_per_s: float
    gb_per_s_per_node: float
    prefixes: int
    """Partitions of the bucket's names that have to serve it."""
    cores_per_gpu: float
    dataset_gb: float
    """Cache that would spare every fetch after the first epoch; a smaller one spares its share of it."""
    cached_share: float
    """Fetches that the configured cache spares."""
    epoch_hours: float


@dataclass(frozen=True)
class MeasuredData:
    """What the data of a run is like, whatever reads it."""

    needs: SampleNeeds
    samples: int
    bytes: int
    cached_share: float
    """Of the data set, that a node's cache holds."""

    def plan(self, gpus: int, *, step_s: float, clips_per_gpu: float) -> DataPlan:
        """What `gpus` GPUs ask for that each take `clips_per_gpu` samples in `step_s` seconds."""
        clips_per_s = gpus * clips_per_gpu / step_s
        gb_per_s = clips_per_s * self.needs.bytes / 1e9
        return DataPlan(
            gpus=gpus,
            clips_per_s=clips_per_s,
            images_per_s=clips_per_s * self.needs.images,
            gets_per_s=clips_per_s * self.needs.gets,
            gb_per_s=gb_per_s,
            gb_per_s_per_node=gb_per_s * min(1.0, GPUS_PER_NODE / gpus),
            prefixes=math.ceil(clips_per_s * self.needs.gets / GETS_PER_PREFIX_S),
            cores_per_gpu=clips_per_gpu / step_s * self.needs.cpu_s,
            dataset_gb=self.bytes / 1e9,
            cached_share=self.cached_share,
            epoch_hours=self.samples / clips_per_s / 3600,
        )


def plan_data(
    config: RunConfig,
    gpus: Sequence[int],
    *,
    step_s: float,
    clips_per_gpu: int,
    read_clips: int,
    advance: Callable[[], object] = lambda: None,
) -> tuple[SampleNeeds, list[DataPlan]]:
    """What a sample takes, and the plan for each number of GPUs; errors and `advance` as `measure_data` has them."""
    measured = measure_data(config, read_clips=read_clips, advance=advance)
    return measured.needs, [measured.plan(count, step_s=step_s, clips_per_gpu=float(clips_per_gpu)) for count in gpus]


def measure_data(config: RunConfig, *, read_clips: int, advance: Callable[[], object] = lambda: None) -> MeasuredData:
    """The data of a run, `read_clips` of it read; `advance` is told of each that is.

    ConfigError where the data is not packed, DataError where it cannot be read.
    """
    data = _shards_of(config)
    source = _training_source(config)
    dataset_bytes = sum(map(_bytes_of, _indices(source)))
    return MeasuredData(
        needs=measure_needs(config, source, read_clips=read_clips, advance=advance),
        samples=sum(portion.length for portion in portions_of(source)),
        bytes=dataset_bytes,
        cached_share=min(1.0, data.cache.size_gb * 1e9 / dataset_bytes) if data.cache else 0.0,
    )


def measure_needs(config: RunConfig, source: Source, *, read_clips: int, advance: Callable[[], object]) -> SampleNeeds:
    """What a sample takes: requests of the run's first ones from the index, CPU seconds of `read_clips` that are read."""
    order = Order(config.seed, portions_of(source), config.global_batch)
    planned = [reads_of(source, *_place(config, order, number)) for number in range(_PLANNED_SAMPLES)]
    seconds = list(_read_some(config, source, order, read_clips, advance))
    return SampleNeeds(
        gets=statistics.fmean(len(reads.requests) for reads in planned),
        bytes=statistics.fmean(sum(span.bytes for span in reads.requests) for reads in planned),
        useful_bytes=statistics.fmean(reads.useful_bytes for reads in planned),
        images=statistics.fmean(reads.images for reads in planned),
        cpu_s=statistics.fmean(seconds),
        cpu_spread_s=statistics.pstdev(seconds),
    )


@dataclass(frozen=True)
class Reads:
    """What one sample fetches."""

    requests: tuple[Span, ...]
    useful_bytes: int
    images: int


def reads_of(source: Source, index: int, rng: np.random.Generator) -> Reads:
    """What `source.load(index, rng)` fetches where nothing is cached; of joined sources, what each fetches with such a stream."""
    if isinstance(source, MixedSource):
        return reads_of(*source.find(index), rng)
    if isinstance(source, JointSource):
        parts = [reads_of(part, index % len(part), rng) for part in source.parts]
        return Reads(
            tuple(span for reads in parts for span in reads.requests),
            sum(reads.useful_bytes for reads in parts),
            sum(reads.images for reads in parts),
        )
    assert isinstance(source, SurroundSource | PairSource)
    files, columns = source.index.files, source.index.columns
    assert isinstance(files, ShardFiles)
    images, sweeps = source.draw_reads(index, rng)
    requests = [*(span for rows in images for span in files.plan_images(rows)), *files.plan_sweeps(sweeps)]
    useful = sum(int(columns["image_bytes"][rows].sum()) for rows in images) + int(columns["sweep_bytes"][sweeps].sum())
    return Reads(tuple(requests), useful, sum(len(rows) for rows in images))


def _read_some(config: RunConfig, source: Source, order: Order, clips: int, advance: Callable[[], object]) -> Iterator[float]:
    """CPU seconds of each of some samples; the first one, which opens connections and maps files, is read and not counted."""
    preparations = build_preparations(config.objectives, config.token_grid, config.encoder, cameras=config.cameras)
    samples = PlacedSamples(source, order, preparations)
    for number in range(clips + 1):
        began = time.process_time()
        samples.read(divmod(number, config.global_batch))
        advance()
        if number:
            yield time.process_time() - began


def _place(config: RunConfig, order: Order, number: int) -> tuple[int, np.random.Generator]:
    step, slot = divmod(number, config.global_batch)
    return order.sample(step, slot), random_stream(config.seed, Purpose.LOAD, step=step, slot=slot)


def _training_source(config: RunConfig) -> Source:
    preparations = build_preparations(config.objectives, config.token_grid, config.encoder, cameras=config.cameras)
    source = build_source(config.data, "train", needed_fields(preparations), augment=True)
    assert source is not None, "every kind of source has a training split"
    check_needs(preparations, source, origin=f"data.kind {config.data.kind}")
    return source


def _indices(source: Source) -> list[Index]:
    """Of all data sets, each once."""
    if isinstance(source, MixedSource):
        return [index for part in source.parts for index in _indices(part)]
    leaf = source.parts[0] if isinstance(source, JointSource) else source
    assert isinstance(leaf, SurroundSource | PairSource)
    return [leaf.index]


def _bytes_of(index: Index) -> int:
    return int(index.columns["image_bytes"].sum(dtype=np.int64) + index.columns["sweep_bytes"].sum(dtype=np.int64))


def _shards_of(config: RunConfig) -> ShardsData:
    if not isinstance(config.data, ShardsData):
        raise ConfigError(
            f"a plan of the data was asked for and data.kind is {config.data.kind}, which is read file by file on one machine; "
            "pack it with `odonata pack` and set data.kind to shards"
        )
    return config.data
