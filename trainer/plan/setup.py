"""How a run could be spread over GPUs: what a plan weighs against each other."""

from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.config.training import Recompute
from trainer.plan.trace import Precision

EngineChoice = Literal["single", "fsdp2", "hsdp", "ddp", "zero1", "zero2", "zero3"]
ENGINES: tuple[EngineChoice, ...] = ("single", "fsdp2", "hsdp", "ddp", "zero1", "zero2", "zero3")
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class ZeroOptions:
    """DeepSpeed's own options, as launch/deepspeed/ has them; in elements."""

    reduce_bucket_size: int = 50_000_000
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_param_persistence_threshold: int = 100_000
    stage3_max_reuse_distance: int = 1_000_000_000

    @classmethod
    def read(cls, zero: dict[str, Any]) -> "ZeroOptions":
        """Of DeepSpeed's section zero_optimization."""
        return cls(**{name: int(zero[name]) for name in cls.__dataclass_fields__ if name in zero})


@dataclass(frozen=True)
class Setup:
    """An engine on so many GPUs, with the batch that each takes."""

    engine: EngineChoice
    gpus: int
    shards: int
    """GPUs over which weights are cut; the rest are replicas of them. One process and DDP have one, ZeRO all."""
    micro_batch: int
    micro_steps: int
    recompute: Recompute
    """What blocks make again in the backward."""
    precision: Precision
    gpus_per_node: int = GPUS_PER_NODE
    zero: ZeroOptions = field(default_factory=ZeroOptions)

    @property
    def replicas(self) -> int:
        return self.gpus // self.shards

    @property
    def is_zero(self) -> bool:
        return self.engine.startswith("zero")

    @property
    def name(self) -> str:
        """As people call it."""
        return f"hsdp {self.replicas}x{self.shards}" if self.engine == "hsdp" else self.engine
