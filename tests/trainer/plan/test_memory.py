"""Memory of a rank, derived by hand for a model of ten equal blocks of which two were traced."""

import pytest

from tests.trainer.plan.short import BLOCK, BLOCKS, ELEMENTS, model
from trainer.config.training import Recompute
from trainer.hardware import find_gpu
from trainer.plan.memory import Memory, plan_memory
from trainer.plan.setup import EngineChoice, Setup, ZeroOptions

BIG = 1e6
"""Bytes of activations of a sample in a block: they are the peak."""
BUCKET = 1000


def memory(engine: EngineChoice, gpus: int, *, samples: int = 100, micro_steps: int = 1, recompute: Recompute = "none") -> Memory:
    shards = 1 if engine in ("ddp", "single") else gpus
    zero = ZeroOptions(reduce_bucket_size=BUCKET, stage3_prefetch_bucket_size=0, stage3_max_reuse_distance=0)
    asked = Setup(engine, gpus, shards, samples, micro_steps, recompute, "bf16", zero=zero)
    return plan_memory(model(BIG), asked, averaged=False)


def test_blocks_that_were_not_traced_take_what_one_more_took() -> None:
    planned = memory("fsdp2", 8)
    assert planned.activations == pytest.approx(BLOCKS * 100 * BIG)
    assert planned.buffers == pytest.approx(2 * BLOCK)  # the block whose activations came last is still there, in bf16
    assert planned.weights == pytest.approx(4 * ELEMENTS / 8)
    assert planned.optimiser == pytest.approx(8 * ELEMENTS / 8)


@pytest.mark.parametrize("engine", ["fsdp2", "zero1", "zero2", "zero3"])
def test_memory_shrinks_with_ranks(engine: EngineChoice) -> None:
    totals = [memory(engine, gpus).total for gpus in (2, 8, 64, 512)]
    assert totals == sorted(totals, reverse=True) and totals[0] > totals[-1]


def test_ddp_holds_everything_whatever_the_ranks() -> None:
    assert memory("ddp", 2) == memory("ddp", 512)
    assert memory("ddp", 8).optimiser == 8 * ELEMENTS
    assert memory("ddp", 8).buffers == (4 + 2) * ELEMENTS  # buckets, and weights in bf16
    assert memory("single", 1).total == memory("ddp", 8).total - 4 * ELEMENTS


def test_zero_shards_more_with_each_stage() -> None:
    first, second, third = (memory(engine, 64) for engine in ("zero1", "zero2", "zero3"))
    assert first.optimiser == second.optimiser == third.optimiser == pytest.approx(12 * ELEMENTS / 64)
    assert first.weights == second.weights == 4 * ELEMENTS
    assert third.weights == pytest.approx(4 * ELEMENTS / 64)
    assert third.gradients == pytest.approx(4 * ELEMENTS / 64)
    assert second.buffers == 2 * ELEMENTS + 2 * 4 * BUCKET


def test_gradients_that_wait_are_whole_under_fsdp2() -> None:
    waiting = memory("fsdp2", 8, micro_steps=2).gradients - memory("fsdp2", 8).gradients
    assert waiting == 4 * ELEMENTS


def test_few_activations_leave_the_peak_to_the_optimiser() -> None:
    planned = memory("fsdp2", 8, samples=0)
    assert planned.gradients == planned.buffers == pytest.approx(4 * ELEMENTS / 8)
    assert planned.activations == 0


def test_recomputation_spares_activations() -> None:
    assert memory("fsdp2", 8, recompute="full").activations == pytest.approx(memory("fsdp2", 8).activations / 10)


def test_what_fits_leaves_a_tenth_free() -> None:
    gpu = find_gpu("h100")
    of = Memory(0.0, 0.0, 0.0, 0.0, 0.0, activations=0.9 * gpu.memory_bytes)
    assert of.fits(gpu)
    assert not Memory(1.0, 0.0, 0.0, 0.0, 0.0, activations=of.activations).fits(gpu)
