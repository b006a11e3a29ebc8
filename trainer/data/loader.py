"""From (step, slot) to batches: torch's DataLoader over worker processes, each of which reads samples ahead in threads.

Worker w of W makes the micro-batches w, w + W, w + 2 W, ... of this rank, and the DataLoader takes them in turn; because a
sample depends on its place alone, the number of workers, how far they read ahead, the world size and a restart change
nothing. Batches cross over in shared memory. A clip that cannot be read is replaced by another one, chosen by the same place,
and the batch says so; `trainer.loop` counts.

Left to others: which sample stands at a place (`order.py`), how it is read (the sources), what objectives need of it, threads
(`read_ahead.py`), processes (`workers.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import active_children
from multiprocessing.process import BaseProcess

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from models.batch import Batch
from models.objectives.base import Preparation
from trainer.data.order import Order, Purpose, Share, random_stream
from trainer.data.read_ahead import read_ahead
from trainer.data.shared_ring import SharedRing
from trainer.data.source import Sample, Source
from trainer.data.workers import end_workers, losses_are_retried, start_worker
from trainer.errors import ClipError, DataError, OdonataError

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


class PlacedSamples:
    """The samples of a run, addressed by their place in it."""

    def __init__(self, source: Source, order: Order, preparations: Mapping[str, Preparation]) -> None:
        self.source = source
        self.order = order
        self.preparations = preparations
        self.kept = frozenset[str]().union(*(preparation.keeps for preparation in preparations.values()))

    def __getitem__(self, place: Place) -> PlacedSample:
        """Pure and safe in several threads, as sources are."""
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


class PlaceSampler:
    """The places of one rank's micro-batches from `first_step` up to `last_step`, exclusive."""

    def __init__(self, share: Share, first_step: int, last_step: int) -> None:
        self.share = share
        self.steps = range(first_step, last_step)

    def __iter__(self) -> Iterator[list[Place]]:
        for step in self.steps:
            for micro_step in range(self.share.micro_steps):
                yield [(step, slot) for slot in self.share.slots(micro_step)]


class BatchStream(IterableDataset[Batch | OdonataError]):
    """The batches that fall to the process it is iterated in; an error of ours comes as the last item.

    torch would raise it again with a traceback for a message, and a class with arguments of its own not at all.
    """

    def __init__(
        self, samples: PlacedSamples, sampler: PlaceSampler, *, prefetch_batches: int, reads_in_flight: int, timeout_s: float
    ) -> None:
        self.samples = samples
        self.sampler = sampler
        self.prefetch_batches = prefetch_batches
        self.read_ahead = partial(read_ahead, depth=reads_in_flight, timeout_s=timeout_s)

    def __iter__(self) -> Iterator[Batch | OdonataError]:
        places = (place for batch in self._own_batches() for place in batch)
        samples = self.read_ahead(self.samples.__getitem__, places)
        ring = SharedRing(self.prefetch_batches) if get_worker_info() else None
        try:
            for batch in self._own_batches():
                yield collate(list(islice(samples, len(batch))), ring)
        except OdonataError as error:
            yield error

    def _own_batches(self) -> Iterator[list[Place]]:
        worker = get_worker_info()
        return islice(self.sampler, worker.id, None, worker.num_workers) if worker else iter(self.sampler)


def read_batches(
    samples: PlacedSamples,
    sampler: PlaceSampler,
    *,
    workers: int,
    prefetch_batches: int = 1,
    reads_in_flight: int = 1,
    timeout_s: float = 300.0,
    pin_memory: bool = False,
    cores: Sequence[int] = (),
) -> Iterator[Batch]:
    """Batches in the order of `sampler`; nothing else here changes more than speed and memory. Workers begin at once.

    A batch from a worker is good until the next one is taken: its memory is used again. Copy what is to be kept.
    RetryError where a batch does not come in `timeout_s` or a worker is lost; what else a worker raises is raised here.
    """
    others = active_children()
    loader = DataLoader(
        BatchStream(samples, sampler, prefetch_batches=prefetch_batches, reads_in_flight=reads_in_flight, timeout_s=timeout_s),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch_batches if workers else None,
        pin_memory=pin_memory,
        timeout=timeout_s if workers else 0,
        worker_init_fn=partial(start_worker, cores=cores),
    )
    arriving = iter(loader)
    return _receive(arriving, [process for process in active_children() if process not in others], timeout_s)


def _receive(arriving: Iterator[Batch | OdonataError], processes: Sequence[BaseProcess], timeout_s: float) -> Iterator[Batch]:
    try:
        with losses_are_retried(timeout_s):
            for item in arriving:
                if isinstance(item, OdonataError):
                    raise item
                yield item
    finally:
        end_workers(processes)


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


def collate(samples: Sequence[PlacedSample], ring: SharedRing | None = None) -> Batch:
    """Stack samples of equal shapes, in the memory of `ring` if there is one."""
    objectives = samples[0].prepared
    if ring:
        ring.next_batch()
    return Batch(
        shared=_stack([sample.shared for sample in samples], ring, ""),
        prepared={name: _stack([sample.prepared[name] for sample in samples], ring, f"{name}/") for name in objectives},
        clips=tuple(sample.clip for sample in samples),
        replaced=tuple(reason for sample in samples for reason in sample.replaced),
    )


def _stack(samples: Sequence[Mapping[str, np.ndarray]], ring: SharedRing | None, group: str) -> dict[str, torch.Tensor]:
    arrays = {name: [fields[name] for fields in samples] for name in samples[0]}
    if ring is None:
        return {name: torch.from_numpy(np.stack(of_name)) for name, of_name in arrays.items()}
    return {name: ring.stack(f"{group}{name}", of_name) for name, of_name in arrays.items()}
