"""What the search chooses, and what it refuses."""

import pytest

from tests.trainer.plan.short import ELEMENTS, model, run_config
from trainer.errors import ConfigError
from trainer.hardware import find_gpu
from trainer.plan.duration import PRODUCT_SHARE
from trainer.plan.run import Row
from trainer.plan.search import Question, check_gpus, find_options

H200 = Question(find_gpu("h200"))


def test_the_fastest_that_fits_comes_first() -> None:
    options = find_options(run_config(), model(), 64, H200)
    assert options[0].duration.typical_s <= 1.01 * min(option.duration.typical_s for option in options)
    assert not any(option.setup.is_zero for option in options)
    assert options[0].setup.recompute == "none", "memory is no matter, so nothing is made again"


def test_a_smaller_micro_batch_or_recomputation_saves_what_does_not_fit() -> None:
    gpu = H200.gpu
    heavy = model(sample_bytes=0.5 * gpu.memory_bytes)  # of a sample in one block, ten times that in all
    (best, *_) = find_options(run_config(), heavy, 64, H200)
    assert best.setup.recompute == "full" and best.setup.micro_batch == 1


def test_what_fits_nowhere_is_told_with_what_would() -> None:
    hopeless = model(sample_bytes=2 * H200.gpu.memory_bytes)
    with pytest.raises(
        ConfigError, match=r"nothing fits into the 127 GB .* the least is \d.* shorter clips or a smaller encoder"
    ):
        find_options(run_config(), hopeless, 8, H200)


@pytest.mark.parametrize("engine", ["fsdp2", "hsdp", "ddp", "zero1", "zero2", "zero3"])
def test_the_engine_that_is_asked_for_is_planned(engine: str) -> None:
    options = find_options(run_config(), model(), 32, Question(H200.gpu, engine=engine))
    assert {option.setup.engine for option in options} == {engine}
    assert all(option.setup.replicas * option.setup.shards == 32 for option in options)


def test_a_mesh_that_is_asked_for_is_planned() -> None:
    options = find_options(run_config(), model(), 64, Question(H200.gpu, shards=16))
    assert {option.setup.name for option in options} == {"hsdp 4x16"}


def test_one_gpu_has_no_engine() -> None:
    assert {option.setup.engine for option in find_options(run_config(), model(), 1, H200)} == {"single"}


def test_micro_batches_make_the_global_batch() -> None:
    for option in find_options(run_config(), model(), 8, H200):
        assert 8 * option.setup.micro_batch * option.setup.micro_steps == 64
    fixed = run_config(parallel={"micro_batch": 2})
    assert {option.setup.micro_batch for option in find_options(fixed, model(), 8, H200)} == {2}


@pytest.mark.parametrize(
    ("gpus", "changes", "question", "sentence"),
    [
        (48, {}, H200, "global_batch is 64, which 48 does not divide; take 16, 32, 64"),
        (12, {"global_batch": 24}, H200, "a node has 8"),
        (64, {}, Question(H200.gpu, shards=24), "no multiple of that; give --shards a divisor of 64"),
        (64, {}, Question(H200.gpu, engine="ddp", shards=8), "ddp, which has no groups"),
        (32, {"parallel": {"micro_batch": 4}}, H200, "does not divide the 2 samples"),
    ],
)
def test_what_cannot_be_spread_evenly_is_refused(
    gpus: int, changes: dict[str, object], question: Question, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_gpus(run_config(**changes), [gpus], question)


def test_hsdp_needs_two_nodes() -> None:
    with pytest.raises(ConfigError, match="no two groups of whole nodes"):
        find_options(run_config(), model(), 8, Question(H200.gpu, engine="hsdp"))


def test_a_row_reckons_the_whole_run() -> None:
    config, planned = run_config(), model()
    (best, *_) = find_options(config, planned, 64, H200)
    flops = 64 * planned.traced["none"].needed_flops
    row = Row(best, H200.gpu, config.steps, 64, 6400, flops, checkpoint_bytes=12.0 * ELEMENTS, largest_micro_batch=1)
    assert row.gpu_hours == pytest.approx(64 * best.duration.typical_s)  # 3600 steps, so hours are seconds of a step
    assert row.dollars == pytest.approx(row.gpu_hours * 5.41)
    assert row.kwh == pytest.approx(row.gpu_hours * 1.275)
    assert 0 < row.mfu_ceiling <= PRODUCT_SHARE
    assert f"parallel.micro_batch={best.setup.micro_batch}" in row.advice
    assert row.as_json()["memory_bytes"]["total"] == best.memory.total


def test_a_step_takes_between_all_of_the_wire_hidden_and_none() -> None:
    for option in find_options(run_config(), model(), 64, H200):
        step = option.duration
        assert step.busy_s <= step.best_s <= step.typical_s <= step.worst_s
        assert step.worst_s == pytest.approx(step.compute_s + step.memory_s + step.nvlink_s + step.network_s)
