"""The loader: the same samples whatever the ranks and workers, and broken clips replaced, not fatal."""

from collections.abc import Mapping

import numpy as np
import pytest

from models.batch import Batch
from trainer.data.loader import PlacedSamples, PlaceSampler, build_loader, check_needs
from trainer.data.mixed_source import portions_of
from trainer.data.order import Order, Portion, Share
from trainer.data.source import Sample
from trainer.errors import ClipError, DataError

GLOBAL_BATCH = 8


class NumberSource:
    """A source whose sample tells its index and one draw of its stream; `broken` ones cannot be read."""

    offers = frozenset({"index", "draw"})

    def __init__(self, length: int = 100, broken: frozenset[int] = frozenset()) -> None:
        self.length = length
        self.broken = broken

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"number {index}"

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        if index in self.broken:
            raise ClipError(self.name(index), "broken on purpose")
        return {"index": np.array(index), "draw": np.array(rng.random())}

    def describe(self) -> dict[str, float | int | str]:
        return {"samples": self.length}


class DrawPreparation:
    """Prepares one random number."""

    needs = keeps = frozenset({"index", "draw"})

    def prepare(self, sample: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        del sample
        return {"mask": rng.permutation(5)}


def samples(source: NumberSource | None = None) -> PlacedSamples:
    source = source or NumberSource()
    return PlacedSamples(source, Order(7, portions_of(source), GLOBAL_BATCH), {"draws": DrawPreparation()})


def load(share: Share, *, workers: int = 0, first: int = 0, last: int = 3, source: NumberSource | None = None) -> list[Batch]:
    sampler = PlaceSampler(share, first, last)
    return list(build_loader(samples(source), sampler, workers=workers, prefetch_batches=2, pin_memory=False))


def as_step(batches: list[Batch]) -> set[tuple[float, ...]]:
    """The samples of batches as a set: index, its draw, its mask."""
    return {
        (float(index), float(draw), *mask.tolist())
        for batch in batches
        for index, draw, mask in zip(batch.shared["index"], batch.shared["draw"], batch.prepared["draws"]["mask"], strict=True)
    }


def test_a_step_is_the_same_on_1_2_and_4_ranks_with_and_without_accumulation() -> None:
    alone = as_step(load(Share(0, 1, GLOBAL_BATCH, 1), first=2, last=3))
    for world in (2, 4):
        for micro_steps in (1, 2):
            micro_batch = GLOBAL_BATCH // world // micro_steps
            ranks = [load(Share(rank, world, micro_batch, micro_steps), first=2, last=3) for rank in range(world)]
            assert as_step([batch for rank in ranks for batch in rank]) == alone


def test_workers_and_a_late_start_change_nothing() -> None:
    share = Share(0, 1, GLOBAL_BATCH, 1)
    from_the_start = load(share, last=4)
    resumed = load(share, workers=2, first=2, last=4)
    for expected, found in zip(from_the_start[2:], resumed, strict=True):
        assert expected.clips == found.clips
        assert as_step([expected]) == as_step([found])


def test_a_broken_clip_is_replaced_by_the_same_other_one_and_named() -> None:
    broken = frozenset(range(0, 100, 4))
    first, second = (load(Share(0, 1, GLOBAL_BATCH, 1), source=NumberSource(broken=broken)) for _ in range(2))
    read = [int(index) for batch in first for index in batch.shared["index"]]
    assert not broken & set(read)
    assert [batch.clips for batch in first] == [batch.clips for batch in second]
    replaced = [reason for batch in first for reason in batch.replaced]
    assert replaced and all("broken on purpose" in reason for reason in replaced)
    wanted = [Order(7, (Portion(100),), GLOBAL_BATCH).sample(step, slot) for step in range(3) for slot in range(GLOBAL_BATCH)]
    assert len(replaced) >= sum(index in broken for index in wanted) > 0


def test_samples_that_are_not_broken_do_not_move_when_others_are() -> None:
    whole = load(Share(0, 1, GLOBAL_BATCH, 1))
    damaged = load(Share(0, 1, GLOBAL_BATCH, 1), source=NumberSource(broken=frozenset({whole[0].shared["index"][0].item()})))
    assert damaged[0].clips[0] != whole[0].clips[0]
    assert damaged[0].clips[1:] == whole[0].clips[1:]


def test_a_source_that_is_all_broken_ends_with_a_sentence() -> None:
    source = NumberSource(length=5, broken=frozenset(range(5)))
    with pytest.raises(DataError, match="in a row could not be read"):
        load(Share(0, 1, GLOBAL_BATCH, 1), source=source)


def test_an_objective_whose_fields_are_not_offered_is_refused() -> None:
    preparation = DrawPreparation()
    preparation.needs = frozenset({"index", "lidar_points"})
    with pytest.raises(DataError, match=r"missing: \['lidar_points'\]"):
        check_needs({"draws": preparation}, NumberSource(), origin="numbers")
