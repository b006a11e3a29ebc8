"""From (step, slot) to batches: torch's DataLoader over a data set whose index is a place in the run.

Worker processes read, augment and prepare; because a sample depends on its place alone, their number, the world size
and a restart change nothing. A clip that cannot be read is replaced by another one, chosen by the same place, and the
batch says so; `trainer.loop` counts.

Left to others: which sample stands at a place (`order.py`), how it is read (the sources), what objectives need of it.
"""

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from models.batch import Batch
from models.objectives.base import Preparation
from trainer.data.order import Order, Purpose, Share, random_stream
from trainer.data.source import Sample, Source
from trainer.errors import ClipError, DataError

Place = tuple[int, int]
"""Step and slot."""

_MAX_ATTEMPTS = 16


@dataclass(frozen=True)
class PlacedSample:
    """What the objectives keep of one sample, and what each prepared from it."""

    clip: str
    shared: Sample
    prepared: Mapping[str, Mapping[str, np.ndarray]]
    replaced: tuple[str, ...]


class PlacedSamples(Dataset):  # its items are PlacedSample; torch's types would have the loader give those, not batches
    """The samples of a run, addressed by their place in it."""

    def __init__(self, source: Source, order: Order, preparations: Mapping[str, Preparation]) -> None:
        self.source = source
        self.order = order
        self.preparations = preparations
        self.kept = frozenset[str]().union(*(preparation.keeps for preparation in preparations.values()))

    def __getitem__(self, place: Place) -> PlacedSample:
        step, slot = place
        index, sample, replaced = self._read(step, slot)
        prepared = {
            name: preparation.prepare(sample, random_stream(self.order.seed, Purpose.PREPARE, step=step, slot=slot))
            for name, preparation in self.preparations.items()
        }
        kept = {field: sample[field] for field in sorted(self.kept)}
        return PlacedSample(self.source.name(index), kept, prepared, replaced)

    def _read(self, step: int, slot: int) -> tuple[int, Sample, tuple[str, ...]]:
        replaced: list[str] = []
        index = self.order.sample(step, slot)
        while True:
            attempt = len(replaced)
            stream = random_stream(self.order.seed, Purpose.LOAD, step=step, slot=slot, attempt=attempt)
            try:
                return index, self.source.load(index, stream), tuple(replaced)
            except ClipError as error:
                replaced.append(str(error))
            if len(replaced) == _MAX_ATTEMPTS:
                listing = "\n  ".join(replaced)
                raise DataError(
                    f"step {step} wanted a clip and {_MAX_ATTEMPTS} in a row could not be read; the data is damaged or gone, "
                    f"bring it back and start again:\n  {listing}"
                )
            index = self.order.replacement(step, slot, attempt + 1)


class PlaceSampler(Sampler[list[Place]]):
    """The places of one rank's micro-batches from `first_step` up to `last_step`, exclusive."""

    def __init__(self, share: Share, first_step: int, last_step: int) -> None:
        self.share = share
        self.steps = range(first_step, last_step)

    def __len__(self) -> int:
        return len(self.steps) * self.share.micro_steps

    def __iter__(self) -> Iterator[list[Place]]:
        for step in self.steps:
            for micro_step in range(self.share.micro_steps):
                yield [(step, slot) for slot in self.share.slots(micro_step)]


def build_loader(
    samples: PlacedSamples,
    sampler: PlaceSampler,
    *,
    workers: int,
    prefetch_batches: int,
    pin_memory: bool,
) -> DataLoader[Batch]:
    """Batches in the order of `sampler`; `workers` and `prefetch_batches` change only the speed."""
    return DataLoader(
        samples,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=prefetch_batches if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
    )


def needed_fields(preparations: Mapping[str, Preparation]) -> frozenset[str]:
    """What all objectives together read of a sample."""
    return frozenset[str]().union(*(preparation.needs for preparation in preparations.values()))


def check_needs(preparations: Mapping[str, Preparation], source: Source, *, origin: str) -> None:
    """DataError unless the source offers every field that an objective needs."""
    for name, preparation in preparations.items():
        missing = preparation.needs - source.offers
        if missing:
            raise DataError(
                f"objective {name} needs {sorted(preparation.needs)}, but {origin} offers {sorted(source.offers)} "
                f"(missing: {sorted(missing)}); take another data.kind or leave {name} out"
            )


def collate(samples: Sequence[PlacedSample]) -> Batch:
    """Stack samples of equal shapes."""
    objectives = samples[0].prepared
    return Batch(
        shared=_stack([sample.shared for sample in samples]),
        prepared={name: _stack([sample.prepared[name] for sample in samples]) for name in objectives},
        clips=tuple(sample.clip for sample in samples),
        replaced=tuple(reason for sample in samples for reason in sample.replaced),
    )


def _stack(arrays: Sequence[Mapping[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.stack([fields[name] for fields in arrays])) for name in arrays[0]}


def _start_worker(worker: int) -> None:
    """A preempted pod signals every process: workers must live until the trainer has saved and ends them."""
    del worker
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
