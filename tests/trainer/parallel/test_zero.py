"""ZeRO-1, 2 and 3 on two ranks against one process: what is learnt, what is skipped, what a checkpoint would hold."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.batch import Batch, Losses
from models.pretraining import PretrainingModel
from tests.gloo import run_ranks
from tests.trainer.checkpoint.toy import WIDTH, Encoder, Toy
from trainer.checkpoint.boxes import Boxes
from trainer.config.training import OptimConfig, ParallelConfig
from trainer.parallel.engine import Engine, build_engine
from trainer.parallel.launch import Launch, Mesh
from trainer.parallel.zero_config import read_zero_config

DEEPSPEED = Path(__file__).parents[3] / "launch" / "deepspeed"
SMALL = {"reduce_bucket_size": 300, "allgather_bucket_size": 300, "stage3_param_persistence_threshold": 40}
"""Several buckets in a toy, and under stage 3 weights of both kinds: gathered when needed, and kept."""

OPTIM = OptimConfig(lr=1e-2, clip_grad_norm=0.05, ema_decay=0.9, layer_decay=0.5)
STAGES = ("zero1", "zero2", "zero3", "zero3_offload")
RANKS, MICRO_STEPS, SAMPLES = 2, 2, 8
STEPS, SAVED_AFTER = 7, 4
BROKEN_CLIP_AT, BROKEN_LOSS_AT = 2, 3
"""Steps that must be skipped: a sample of one rank is infinite; the mean loss alone is."""


class Model(PretrainingModel):
    """A toy behind the entry of a pre-training model, with weights of 1 and 3 elements, a frozen one and a buffer."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.toy = Toy()
        self.tokens_per_sample = 4

    @property
    def encoder(self) -> Encoder:  # type: ignore[override]
        return self.toy.encoder

    def forward(self, batch: Batch, task: str) -> Any:
        tokens = batch.shared["tokens"]
        loss = (self.toy(tokens) - tokens[..., :3].sin()).square().mean()
        return Losses(loss, {}) if task == "train" else loss


class Step(NamedTuple):
    loss: float
    norm: float


class Trained(NamedTuple):
    """What a rank reports: its steps, how they went on after a resume, and its boxes of the state at the end."""

    steps: list[Step]
    resumed: list[Step]
    evaluation: float
    boxes: dict[str, Boxes]
    resumed_boxes: dict[str, Boxes]


def engine_of(launch: Launch, *, seed: int) -> Engine:
    torch.manual_seed(seed)
    return build_engine(Model(), launch, ParallelConfig(timeout_s=60), OPTIM)


def zero_launch(name: str) -> Launch:
    zero = read_zero_config({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(DEEPSPEED / f"{name}.json")})
    zero["zero_optimization"] |= SMALL
    if "offload_optimizer" in zero["zero_optimization"]:
        zero["zero_optimization"]["offload_optimizer"]["pin_memory"] = False
    stage = zero["zero_optimization"]["stage"]
    return Launch(dist.get_rank(), dist.get_rank(), RANKS, RANKS, f"zero{stage}", "fp32", Mesh(1, RANKS), True, zero)  # type: ignore[arg-type]


def batch_of(launch: Launch, step: int, micro_step: int) -> Batch:
    """This rank's part of a micro-batch that `step` and `micro_step` alone decide."""
    tokens = torch.randn(SAMPLES, 4, WIDTH, generator=torch.Generator().manual_seed(10 * step + micro_step))
    if step == BROKEN_CLIP_AT:
        tokens[-1] = math.inf
    tokens = tokens[launch.rank :: launch.world_size]
    return Batch({"tokens": tokens}, {}, tuple("clip" for _ in tokens))


def train(engine: Engine, steps: range) -> list[Step]:
    return [take_step(engine, step) for step in steps]


def take_step(engine: Engine, step: int) -> Step:
    total = 0.0
    for micro_step in range(MICRO_STEPS):
        batch = batch_of(engine.launch, step, micro_step)
        losses = engine.train_micro_step(batch, share=1 / MICRO_STEPS, last=micro_step + 1 == MICRO_STEPS)
        total += float(losses.total.detach()) / MICRO_STEPS
    loss = mean_over_ranks(engine, total)
    norm = engine.update(OPTIM.lr / (step + 1), loss=torch.tensor(math.inf if step == BROKEN_LOSS_AT else loss))
    return Step(loss, float(norm))


def mean_over_ranks(engine: Engine, value: float) -> float:
    return float(engine.reduce(torch.tensor([value], dtype=torch.float64))[0]) / engine.launch.world_size


def snapshot(state: dict[str, Boxes]) -> dict[str, Boxes]:
    return {name: boxes.map(torch.clone) for name, boxes in state.items()}


def assemble(of_ranks: list[dict[str, Boxes]]) -> dict[str, Tensor]:
    """Whole tensors from the boxes of all ranks, which must cover each exactly once; copies on several ranks must be equal."""
    assert len({tuple(state) for state in of_ranks}) == 1, "every rank has the same names in the same order"
    whole: dict[str, Tensor] = {}
    for name, boxes in of_ranks[0].items():
        whole[name] = torch.full(boxes.shape, math.nan, dtype=boxes.dtype)
        covered = torch.zeros(boxes.shape, dtype=torch.int64)
        copies = defaultdict(list)
        for state in of_ranks:
            assert (state[name].shape, state[name].dtype) == (boxes.shape, boxes.dtype)
            for offsets, elements in state[name].boxes:
                copies[offsets, elements.shape].append(elements)
        for (offsets, shape), equal in copies.items():
            where = tuple(slice(start, start + size) for start, size in zip(offsets, shape, strict=True))
            assert all(torch.equal(copy, equal[0]) for copy in equal), name
            whole[name][where] = equal[0]
            covered[where] += 1
        assert (covered == 1).all(), name
    return whole


def load(engine: Engine, whole: dict[str, Tensor]) -> None:
    """Write whole tensors into the boxes of this rank."""
    for name, boxes in engine.state().items():
        for offsets, elements in boxes.boxes:
            elements.copy_(whole[name][tuple(slice(o, o + n) for o, n in zip(offsets, elements.shape, strict=True))])
    engine.state_was_loaded()


def train_all() -> dict[str, Trained]:
    """On each rank: every stage, one after the other."""
    return {name: train_and_resume(name) for name in STAGES}


def train_and_resume(name: str) -> Trained:
    """Train with a copy of the state taken on the way, then load it into a fresh engine and go on."""
    launch = zero_launch(name)
    engine = engine_of(launch, seed=0)
    steps = train(engine, range(SAVED_AFTER))
    saved: list[Any] = [None] * RANKS
    dist.all_gather_object(saved, snapshot(engine.state()))
    steps += train(engine, range(SAVED_AFTER, STEPS))
    evaluation = mean_over_ranks(engine, float(engine.apply(batch_of(launch, 0, 0), "evaluate")))

    fresh = engine_of(launch, seed=1)
    load(fresh, assemble(saved))
    resumed = train(fresh, range(SAVED_AFTER, STEPS))
    return Trained(steps, resumed, evaluation, snapshot(engine.state()), snapshot(fresh.state()))


@pytest.fixture(scope="module")
def alone() -> tuple[list[Step], float, dict[str, Tensor]]:
    launch = Launch(0, 0, 1, 1, "single", "fp32", Mesh(1, 1), True)
    engine = engine_of(launch, seed=0)
    steps = train(engine, range(STEPS))
    evaluation = float(engine.apply(batch_of(launch, 0, 0), "evaluate"))
    return steps, evaluation, assemble([engine.state()])


@pytest.fixture(scope="module")
def all_trained() -> list[dict[str, Trained]]:
    return run_ranks(train_all, RANKS)


@pytest.fixture(params=STAGES)
def trained(all_trained: list[dict[str, Trained]], request: pytest.FixtureRequest) -> list[Trained]:
    return [stages[request.param] for stages in all_trained]


def assert_same_steps(found: list[Step], expected: list[Step]) -> None:
    assert len(found) == len(expected)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        if step == BROKEN_CLIP_AT:
            assert not math.isfinite(one.norm)
            assert not math.isfinite(one.loss)
        else:
            assert one.loss == pytest.approx(other.loss, rel=1e-6)
            assert one.norm == pytest.approx(other.norm, rel=1e-5)


def test_every_stage_learns_what_one_process_learns(
    trained: list[Trained], alone: tuple[list[Step], float, dict[str, Tensor]]
) -> None:
    steps, evaluation, state = alone
    for rank in trained:
        assert_same_steps(rank.steps, steps)
        assert rank.evaluation == pytest.approx(evaluation, rel=1e-6)
    found = assemble([rank.boxes for rank in trained])
    assert found.keys() == state.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_skipped_steps_do_not_count_in_the_bias_correction(trained: list[Trained]) -> None:
    state = assemble([rank.boxes for rank in trained])
    counts = {float(tensor) for name, tensor in state.items() if name.endswith(".step")}
    assert counts == {STEPS - 2.0}


def test_a_resumed_engine_goes_on_bit_for_bit(trained: list[Trained]) -> None:
    for rank in trained:
        assert rank.resumed == rank.steps[SAVED_AFTER:]
    found, expected = (assemble([getattr(rank, which) for rank in trained]) for which in ("resumed_boxes", "boxes"))
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_the_memory_of_a_rank_is_its_share(trained: list[Trained]) -> None:
    whole = sum(math.prod(boxes.shape) for name, boxes in trained[0].boxes.items() if name.endswith(".exp_avg"))
    for rank in trained:
        held = sum(box.tensor.numel() for name, boxes in rank.boxes.items() if name.endswith(".exp_avg") for box in boxes.boxes)
        assert held < 0.6 * whole
