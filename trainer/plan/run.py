"""The plan of a whole run: one row for each number of GPUs, with what the best setup takes until the last step.

A run is reckoned with the typical step, half-way between all of the wire hidden and none, without failures, evaluations and pictures.
A checkpoint is weights, moments and averages in float32. Each GPU that holds another part of it copies that to pinned host memory, which is
the stall, and puts it to the store behind the training over one connection, of which S3 serves each with some 85 MB/s
(https://docs.aws.amazon.com/whitepapers/latest/s3-optimizing-performance-best-practices/use-byte-range-fetches.html).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from trainer.config.run import RunConfig
from trainer.hardware import Gpu
from trainer.plan.data import DataPlan, MeasuredData
from trainer.plan.duration import peak_flops
from trainer.plan.search import Option, Question, check_gpus, find_options
from trainer.plan.setup import ENGINES, Setup
from trainer.plan.tracing import TRACED_SHARDS, Model, count_traces, trace_model
from trainer.plan.weights import BYTES

_STORE_BYTES_PER_S = 85e6


@dataclass(frozen=True)
class Row:
    """A run on so many GPUs."""

    option: Option
    gpu: Gpu
    steps: int
    clips: int
    """In a step."""
    tokens: int
    """In a step."""
    needed_flops: float
    """Of a step, over all GPUs."""
    checkpoint_bytes: float
    largest_micro_batch: int
    """That fits, of those that divide the batch, with this engine, mesh and recomputation."""
    data: DataPlan | None = None
    """What the data asks for at the typical step; none where it is not packed."""
    others: tuple[Option, ...] = ()
    """The best of each other engine that fits."""

    @property
    def gpus(self) -> int:
        return self.option.setup.gpus

    @property
    def clips_per_s(self) -> float:
        return self.clips / self.option.duration.typical_s

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.option.duration.typical_s

    @property
    def mfu_ceiling(self) -> float:
        """What MFU could reach with all of the wire hidden."""
        peak = self.gpus * peak_flops(self.gpu, self.option.setup)
        return self.needed_flops / (self.option.duration.best_s * peak)

    @property
    def checkpoint_stall_s(self) -> float:
        return self.checkpoint_bytes / self._writers / self.gpu.host_bytes_per_s

    @property
    def checkpoint_s(self) -> float:
        """Until it is in the store."""
        return self.checkpoint_bytes / self._writers / _STORE_BYTES_PER_S

    @property
    def _writers(self) -> int:
        """Ranks that each hold another part."""
        return self.option.setup.gpus if self.option.setup.is_zero else self.option.setup.shards

    @property
    def hours(self) -> float:
        return self.steps * self.option.duration.typical_s / 3600

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.hours

    @property
    def kwh(self) -> float:
        return self.gpu_hours * self.gpu.watts / 1000

    @property
    def dollars(self) -> float:
        return self.gpu_hours * self.gpu.dollars_per_hour

    @property
    def bottleneck(self) -> str:
        """What would have to become faster first."""
        if self.data and self.data.cores_per_gpu > self.gpu.cores:
            return "decoding"
        return self.option.duration.bottleneck

    @property
    def advice(self) -> str:
        """What to write into the run and its launch."""
        setup = self.option.setup
        mesh = f" in {setup.replicas} replicas of {setup.shards} shards" if setup.engine == "hsdp" else ""
        steps = f", {setup.micro_steps} micro-steps" if setup.micro_steps > 1 else ""
        return (
            f"{setup.gpus:,} GPUs: {setup.engine}{mesh}, parallel.micro_batch={setup.micro_batch}{steps}, "
            f"parallel.activation_checkpointing={setup.recompute}; the first bottleneck is {self.bottleneck}"
        )

    def as_json(self) -> dict[str, Any]:
        """Every figure."""
        option = self.option
        figures = (
            "gpus",
            "largest_micro_batch",
            "clips_per_s",
            "tokens_per_s",
            "mfu_ceiling",
            "checkpoint_bytes",
            "checkpoint_stall_s",
            "checkpoint_s",
        )
        totals = ("hours", "gpu_hours", "kwh", "dollars", "bottleneck", "advice")
        return {
            **{name: getattr(self, name) for name in (*figures, *totals)},
            "setup": asdict(option.setup) | {"name": option.setup.name, "replicas": option.setup.replicas},
            "memory_bytes": asdict(option.memory) | {"total": option.memory.total},
            "wire": {
                "payload_bytes": option.wire.payload_bytes(),
                "nvlink_bytes": option.wire.nvlink_bytes,
                "network_bytes": option.wire.network_bytes,
            },
            "step_s": asdict(option.duration)
            | {name: getattr(option.duration, f"{name}_s") for name in ("best", "typical", "worst")},
            "data": asdict(self.data) if self.data else None,
            "others": [
                {"setup": o.setup.name, "step_s": o.duration.typical_s, "memory_bytes": o.memory.total} for o in self.others
            ],
        }


def plan_run(
    config: RunConfig,
    gpus: Sequence[int],
    question: Question,
    *,
    data: MeasuredData | None = None,
    advance: Callable[[int, int], object] = lambda done, total: None,
) -> list[Row]:
    """A row for each of `gpus`, with what the data asks for where that was measured.

    `advance` is told how many traces are done, and of how many.

    ConfigError where the batch or a mesh cannot be spread evenly, and where nothing fits.
    """
    check_gpus(config, gpus, question)
    total, done = count_traces(config), 0

    def tell() -> None:
        nonlocal done
        done += 1
        advance(done, total)

    model = trace_model(config, shards=TRACED_SHARDS, precision=question.precision, advance=tell)
    return [plan_row(config, model, count, question, data) for count in gpus]


def plan_row(config: RunConfig, model: Model, gpus: int, question: Question, data: MeasuredData | None = None) -> Row:
    """The best setup of `gpus` GPUs for a run whose `model` was traced, whatever its batch."""
    best, *rest = find_options(config, model, gpus, question)
    others = [next((o for o in rest if o.setup.engine == engine), None) for engine in ENGINES if engine != best.setup.engine]
    kept = BYTES * (model.weights.elements + 2 * model.weights.learning)
    kept += BYTES * sum(w.elements for w in model.weights.all if w.averaged) if config.optim.ema_decay else 0
    return Row(
        option=best,
        gpu=question.gpu,
        steps=config.steps,
        clips=config.global_batch,
        tokens=config.global_batch * model.tokens_per_sample,
        needed_flops=config.global_batch * model.traced["none"].needed_flops,
        checkpoint_bytes=kept,
        largest_micro_batch=max(o.setup.micro_batch for o in (best, *rest) if _differ_in_batch(o.setup, best.setup)),
        data=data.plan(gpus, step_s=best.duration.typical_s, clips_per_gpu=config.global_batch / gpus) if data else None,
        others=tuple(option for option in others if option),
    )


def _differ_in_batch(one: Setup, other: Setup) -> bool:
    return replace(one, micro_batch=0, micro_steps=0) == replace(other, micro_batch=0, micro_steps=0)
