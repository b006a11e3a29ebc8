"""From (step, slot) to batches, made by worker processes, each of which reads samples ahead in threads.

Worker w of W makes the micro-batches w, w + W, w + 2 W, ... of this rank, and they are taken in turn; because a sample depends on
its place in the run alone, the number of workers, how far they read ahead, the world size and a restart change nothing. Pixels
are decoded where the batch will have them, in memory that both processes map. A clip that cannot be read is replaced by
another one, chosen by the same place, and the batch says so; `trainer.loop` counts.

Left to others: which sample stands at a place (`order.py`), how it is read (the sources), what objectives need of it, threads
(`read_ahead.py`), processes (`workers.py`), memory (`shared_ring.py`).
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle, islice

import numpy as np
import torch
from jaxtyping import UInt8

from models.batch import Batch
from models.objectives.base import Preparation
from trainer.data.counting import counting, sum_counts
from trainer.data.order import Order, Purpose, Share, random_stream
from trainer.data.read_ahead import read_ahead
from trainer.data.shared_ring import Memory, shared_memories
from trainer.data.source import Room, Sample, Source, new_room
from trainer.data.workers import Made, Worker, end_workers, start_workers
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
    reading: Mapping[str, float]
    """As `counting` counts."""


class PlacedSamples:
    """The samples of a run, addressed by their place in it."""

    def __init__(self, source: Source, order: Order, preparations: Mapping[str, Preparation]) -> None:
        self.source = source
        self.order = order
        self.preparations = preparations
        self.kept = frozenset[str]().union(*(preparation.keeps for preparation in preparations.values()))

    def read(self, place: Place, room: Room = new_room) -> PlacedSample:
        """Pure and safe in several threads, as sources are."""
        step, slot = place
        with counting() as reading:
            index, sample, replaced = self._read(step, slot, room)
            prepared = {
                name: preparation.prepare(sample, random_stream(self.order.seed, Purpose.PREPARE, step=step, slot=slot))
                for name, preparation in self.preparations.items()
            }
        kept = {field: sample[field] for field in sorted(self.kept)}
        return PlacedSample(self.source.name(index), kept, prepared, replaced, reading)

    def _read(self, step: int, slot: int, room: Room) -> tuple[int, Sample, tuple[str, ...]]:
        replaced: list[str] = []
        index = self.order.sample(step, slot)
        while True:
            attempt = len(replaced)
            stream = random_stream(self.order.seed, Purpose.LOAD, step=step, slot=slot, attempt=attempt)
            try:
                return index, self.source.load(index, stream, room), tuple(replaced)
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

    def __len__(self) -> int:
        return len(self.steps) * self.share.micro_steps

    def __iter__(self) -> Iterator[list[Place]]:
        for step in self.steps:
            for micro_step in range(self.share.micro_steps):
                yield [(step, slot) for slot in self.share.slots(micro_step)]


@dataclass(frozen=True)
class BatchMaker:
    """Makes batches of the samples of a run, and reads `reads_in_flight` of them at once."""

    samples: PlacedSamples
    reads_in_flight: int
    timeout_s: float

    def make(self, batches: Iterable[Sequence[Place]], memories: Iterator[Memory]) -> Iterator[Made]:
        """A batch of each list of places, in the next memory."""
        under_way: deque[tuple[int, Memory]] = deque()

        def lay_out() -> Iterator[tuple[Place, Room]]:
            for places, memory in zip(batches, memories, strict=False):
                memory.clear()
                under_way.append((len(places), memory))
                for position, place in enumerate(places):
                    yield place, partial(make_room, memory, position, len(places))

        read = read_ahead(self._read, lay_out(), depth=self.reads_in_flight, timeout_s=self.timeout_s)
        for first in read:
            length, memory = under_way.popleft()
            yield stack([first, *islice(read, length - 1)], memory)

    def _read(self, wanted: tuple[Place, Room]) -> PlacedSample:
        return self.samples.read(*wanted)


def make_room(memory: Memory, position: int, length: int, field: str, shape: tuple[int, ...]) -> UInt8[np.ndarray, "..."]:
    """Where the pixels of one sample lie among those of a batch."""
    return memory.array(field, (length, *shape), np.dtype(np.uint8))[position]


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
    maker = BatchMaker(samples, reads_in_flight, timeout_s)
    if not workers:
        made = maker.make(sampler, (Memory() for _ in count()))
        return (as_batch(each) for each in made)

    def make(worker: int, memories: Iterator[Memory]) -> Iterator[Made]:
        return maker.make(islice(sampler, worker, None, workers), memories)

    batches_ahead = -(-reads_in_flight // sampler.share.micro_batch)
    rings = [shared_memories(prefetch_batches, batches_ahead=batches_ahead) for _ in range(workers)]
    crew = start_workers(make, rings, cores)
    for worker in crew:
        for _ in range(prefetch_batches):
            worker.ask()
    batches = take_in_turn(crew, len(sampler), timeout_s)
    return _and_end(pin_ahead(batches, len(sampler), timeout_s) if pin_memory else batches, crew)


def take_in_turn(crew: Sequence[Worker], batches: int, timeout_s: float) -> Iterator[Batch]:
    """A batch of each worker after the other."""
    for worker in islice(cycle(crew), batches):
        made = worker.take(timeout_s)
        worker.ask()
        yield as_batch(made)


def _and_end(batches: Iterator[Batch], crew: Sequence[Worker]) -> Iterator[Batch]:
    try:
        yield from batches
    finally:
        end_workers(crew)


def pin_ahead(batches: Iterator[Batch], count: int, timeout_s: float) -> Iterator[Batch]:
    """The same, copied in a thread to memory that a GPU copies from while others work."""
    device = torch.cuda.current_device()  # of this thread; another one would open the first GPU

    def pin(batch: int) -> Batch:
        torch.cuda.set_device(device)
        return next(batches).pin_memory()

    return read_ahead(pin, range(count), depth=1, timeout_s=2 * timeout_s)  # whose own error is to come first


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
    """A batch of samples of equal shapes."""
    return as_batch(stack(samples, Memory()))


def stack(samples: Sequence[PlacedSample], memory: Memory) -> Made:
    """The arrays of samples of equal shapes on end; those of objective `name` are called `name/array`."""
    arrays = {name: [sample.shared[name] for sample in samples] for name in samples[0].shared}
    for objective, prepared in samples[0].prepared.items():
        arrays |= {f"{objective}/{name}": [sample.prepared[objective][name] for sample in samples] for name in prepared}
    rest = (
        tuple(samples[0].prepared),
        tuple(sample.clip for sample in samples),
        tuple(reason for sample in samples for reason in sample.replaced),
        sum_counts(sample.reading for sample in samples),
    )
    return Made({name: memory.stack(name, of_name) for name, of_name in arrays.items()}, rest)


def as_batch(made: Made) -> Batch:
    """What `stack` made, as tensors."""
    objectives, clips, replaced, reading = made.rest
    shared: dict[str, torch.Tensor] = {}
    prepared: dict[str, dict[str, torch.Tensor]] = {objective: {} for objective in objectives}
    for name, array in made.arrays.items():
        objective, _, own = name.rpartition("/")
        (prepared[objective] if objective else shared)[own] = torch.from_numpy(array)
    return Batch(shared, prepared, clips, replaced, reading)
