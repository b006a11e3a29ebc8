"""Bytes on the wire, derived by hand for a model of ten blocks and a root, and counted on two ranks."""

import pytest
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.plan_rank import Meter, repeat
from models.pretraining import build_model
from tests.gloo import run_ranks
from tests.trainer.plan.short import BLOCK, BLOCK_ROWS, BLOCKS, ELEMENTS, ROOT, run_config, weights
from trainer.assembly import assemble_model
from trainer.hardware import find_gpu
from trainer.parallel.engine import build_engine
from trainer.parallel.launch import Launch, Mesh
from trainer.plan.samples import build_blank_batch
from trainer.plan.setup import EngineChoice, Setup, ZeroOptions
from trainer.plan.weights import list_weights
from trainer.plan.wire import Collective, list_collectives


def setup(engine: EngineChoice, gpus: int, *, shards: int | None = None, micro_steps: int = 1) -> Setup:
    zero = ZeroOptions(stage3_param_persistence_threshold=ROOT + 1)
    cut = shards or (1 if engine in ("ddp", "single") else gpus)
    return Setup(engine, gpus, cut, 1, micro_steps, "none", "bf16", zero=zero)


def payload(asked: Setup) -> dict[str, float]:
    return {kind: size for kind, size in list_collectives(weights(), asked).payload_bytes().items() if size}


def test_fsdp2_gathers_blocks_twice_in_bf16_and_reduces_float32_once() -> None:
    gathered = 2 * (2 * BLOCKS * BLOCK + ROOT)
    assert payload(setup("fsdp2", 8)) == {"all_gather": gathered, "reduce_scatter": 4 * ELEMENTS}
    accumulated = payload(setup("fsdp2", 8, micro_steps=3))
    assert accumulated == {"all_gather": 3 * gathered, "reduce_scatter": 4 * ELEMENTS}


def test_hsdp_sums_each_shard_over_its_replicas() -> None:
    within = payload(setup("hsdp", 64, shards=8))
    assert within["all_gather"] == payload(setup("fsdp2", 8))["all_gather"]
    assert within["all_reduce"] == pytest.approx(4 * ELEMENTS / 8)


def test_rows_that_shards_do_not_divide_are_filled_up() -> None:
    shards = 2 * BLOCK_ROWS  # each holds one row, half of them none
    reduced = payload(setup("fsdp2", shards))["reduce_scatter"]
    assert reduced == 4 * (BLOCKS * 2 * BLOCK + ROOT * shards / 512)


@pytest.mark.parametrize(
    ("engine", "micro_steps", "expected"),
    [
        ("ddp", 2, {"all_reduce": 4 * ELEMENTS}),
        ("zero1", 2, {"all_gather": 4 * ELEMENTS, "all_reduce": 4 * ELEMENTS}),
        ("zero2", 2, {"all_gather": 4 * ELEMENTS, "all_reduce": 2 * 4 * ELEMENTS}),
        ("zero3", 2, {"all_gather": 2 * 4 * BLOCKS * BLOCK + 4 * ROOT, "reduce_scatter": 2 * 4 * ELEMENTS}),
    ],
)
def test_other_engines_send_float32(engine: EngineChoice, micro_steps: int, expected: dict[str, float]) -> None:
    assert payload(setup(engine, 8, micro_steps=micro_steps)) == pytest.approx(expected)


def test_zero3_gathers_again_what_is_used_again_too_late() -> None:
    zero = ZeroOptions(stage3_param_persistence_threshold=0, stage3_max_reuse_distance=4 * BLOCK)
    asked = Setup("zero3", 8, 8, 1, 1, "none", "bf16", zero=zero)
    # The last two blocks' elements come again within four blocks' worth: two to the end and two back.
    assert payload(asked)["all_gather"] == pytest.approx(4 * (2 * ELEMENTS - 2 * BLOCK))


def test_one_process_sends_nothing() -> None:
    assert payload(setup("single", 1)) == {}


def test_inside_a_node_nothing_crosses_the_network() -> None:
    wire = list_collectives(weights(), setup("fsdp2", 8))
    assert wire.network_bytes == 0
    assert wire.nvlink_bytes == pytest.approx(sum(payload(setup("fsdp2", 8)).values()) * 7 / 8)


def test_a_gather_comes_into_each_node_once_over_all_its_cards() -> None:
    gather = Collective("all_gather", 1600.0, ranks=32, nodes=4)
    assert 8 * gather.network_bytes == pytest.approx(1600 * 3 / 4)
    assert gather.network_bytes + gather.nvlink_bytes == pytest.approx(1600 * 31 / 32)
    summed = Collective("all_reduce", 1600.0, ranks=32, nodes=4)
    assert summed.network_bytes == 2 * gather.network_bytes


def test_long_rings_wait_for_their_hops_and_sums_take_trees() -> None:
    ring = Collective("all_gather", 1.0, ranks=1024, nodes=128)
    assert ring.latency_s() == pytest.approx(896 * 3.4e-6 + 127 * 9.6e-6)
    tree = Collective("all_reduce", 1.0, ranks=1024, nodes=128)
    assert tree.latency_s() == pytest.approx(2 * (7 * 28e-6 + 7 * 50e-6))


def test_hsdp_spares_the_network_what_gathers_cost() -> None:
    gpu = find_gpu("h100")
    flat, within_nodes = (
        list_collectives(weights(), asked).network_s(gpu) for asked in (setup("fsdp2", 512), setup("hsdp", 512, shards=8))
    )
    assert within_nodes < flat / 2


MICRO_STEPS = 2


def count_payloads() -> dict[str, int]:
    """Payloads of a step of two micro-steps under FSDP2, as this rank sees them."""
    config, ranks = run_config(), dist.get_world_size()
    launch = Launch(dist.get_rank(), dist.get_rank(), ranks, ranks, "fsdp2", "fp32", Mesh(1, ranks), reshard_after_forward=True)
    model = build_model(config.encoder, config.objectives, config.token_grid)
    engine = build_engine(model, launch, config.parallel, config.optim)
    batch = repeat(build_blank_batch(config), 2)
    with Meter() as meter:
        for micro_step in range(MICRO_STEPS):
            engine.train_micro_step(batch, share=0.5, last=micro_step + 1 == MICRO_STEPS)
    return dict(meter.payload_bytes)


def test_two_ranks_send_what_was_planned() -> None:
    with FakeTensorMode():
        of_run = list_weights(assemble_model(run_config()))
    asked = Setup("fsdp2", 2, 2, 2, MICRO_STEPS, "none", "fp32")
    planned = {kind: size for kind, size in list_collectives(of_run, asked).payload_bytes().items() if size}
    assert run_ranks(count_payloads, 2) == [planned, planned]
