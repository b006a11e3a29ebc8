"""Order and streams: pure functions of seed, step and slot."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.order import Order, Portion, Purpose, Share, permuted, random_stream


@given(length=st.integers(1, 2000), key=st.integers(0, 2**64 - 1))
def test_a_permutation_hits_every_index_once(length: int, key: int) -> None:
    assert sorted(permuted(place, length, key=key) for place in range(length)) == list(range(length))


def test_an_epoch_shows_every_sample_once_and_the_next_one_in_another_order() -> None:
    order = Order(seed=3, portions=(Portion(60),), global_batch=12)
    epochs = [[order.sample(step, slot) for step in steps for slot in range(12)] for steps in (range(5), range(5, 10))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(60))
    assert epochs[0] != epochs[1]


def test_another_seed_is_another_order() -> None:
    walks = [[Order(seed, (Portion(1000),), 8).sample(0, slot) for slot in range(8)] for seed in range(20)]
    assert len({tuple(walk) for walk in walks}) == 20


@given(length=st.sampled_from([10**8, 10**9 + 7, 2**40]), step=st.integers(0, 10**7))
def test_the_order_of_a_huge_data_set_costs_no_memory(length: int, step: int) -> None:
    assert 0 <= Order(0, (Portion(length),), 4096).sample(step, 4095) < length


def test_neighbours_in_the_walk_are_far_apart_in_the_data() -> None:
    # Mean distance of two uniform draws from [0, n) is n / 3; a poor permutation keeps neighbours together.
    length = 100_000
    walk = np.array([Order(0, (Portion(length),), 1).sample(step, 0) for step in range(4000)])
    assert abs(np.abs(np.diff(walk)).mean() / length - 1 / 3) < 0.02


@given(world=st.sampled_from([1, 2, 3, 4, 6, 12]), micro_steps=st.sampled_from([1, 2]))
def test_ranks_share_the_slots_of_a_step_without_overlap(world: int, micro_steps: int) -> None:
    batch = 24
    shares = [Share(rank, world, batch // world // micro_steps, micro_steps) for rank in range(world)]
    slots = [slot for share in shares for micro in range(micro_steps) for slot in share.slots(micro)]
    assert sorted(slots) == list(range(batch))


def test_streams_differ_by_every_coordinate_and_repeat_by_none() -> None:
    places = [
        (seed, purpose, step, slot, attempt)
        for seed in (0, 1)
        for purpose in Purpose
        for step in (0, 1)
        for slot in (0, 1)
        for attempt in (0, 1)
    ]

    def draws() -> list[float]:
        return [random_stream(s, p, step=k, slot=b, attempt=a).random() for s, p, k, b, a in places]

    assert len(set(draws())) == len(places)
    assert draws() == draws()


def test_long_streams_of_neighbouring_slots_do_not_run_into_each_other() -> None:
    first = random_stream(0, Purpose.LOAD, step=0, slot=0).random(10_000)
    second = random_stream(0, Purpose.LOAD, step=0, slot=1).random(10_000)
    assert not np.intersect1d(first, second).size
