"""How this process was started: its place among the ranks, its device, and what accelerate's config file asks for.

`accelerate launch` and torchrun both set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; accelerate adds what its
config file says, which is read through accelerate's own plugin classes. Nothing else of accelerate is used:
`Accelerator(cpu=True, fsdp_plugin=...)` silently trains DDP, and its process group carries no CPU backend beside NCCL.
"""

import datetime
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from trainer.config.training import ParallelConfig, split_batch
from trainer.errors import ConfigError
from trainer.parallel.zero_config import read_zero_config

EngineName = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]


@dataclass(frozen=True)
class Mesh:
    """World size as replicas of shards; HSDP has more than one of each."""

    replicas: int
    shards: int


@dataclass(frozen=True)
class Launch:
    """Place and strategy of this process."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    engine: EngineName
    precision: Literal["fp32", "bf16"]
    mesh: Mesh
    reshard_after_forward: bool
    """FSDP2: free a block's gathered weights after its forward; without it more memory and fewer gathers."""
    zero: Mapping[str, Any] | None = None
    """ZeRO: DeepSpeed's own config, as far as it is its own."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_launch(environ: Mapping[str, str], config: ParallelConfig) -> Launch:
    """What `environ` says, checked against what the run config asks for."""
    world_size = int(environ.get("WORLD_SIZE", "1"))
    if config.world_size and config.world_size != world_size:
        raise ConfigError(
            f"parallel.world_size asks for {config.world_size} processes and {world_size} started; "
            "set num_processes in accelerate's config file (and distributed_type: FSDP or MULTI_GPU, also on CPU) "
            "or drop parallel.world_size"
        )
    zero = read_zero_config(environ) if environ.get("ACCELERATE_USE_DEEPSPEED") == "true" else None
    engine, mesh, reshard = _read_engine(environ, world_size, zero)
    return Launch(
        rank=int(environ.get("RANK", "0")),
        local_rank=int(environ.get("LOCAL_RANK", "0")),
        world_size=world_size,
        local_world_size=int(environ.get("LOCAL_WORLD_SIZE", "1")),
        engine=engine,
        precision=_read_precision(environ, config),
        mesh=mesh,
        reshard_after_forward=reshard,
        zero=zero,
    )


def micro_steps(launch: Launch, config: ParallelConfig, global_batch: int) -> tuple[int, int]:
    """Micro-batch on one rank and how many of them make the global batch."""
    return split_batch(launch.world_size, config, global_batch)


@contextmanager
def process_group(launch: Launch, *, timeout_s: float) -> Iterator[None]:
    """Join the other ranks for the length of the block: NCCL for CUDA tensors and gloo beside it, gloo alone without a GPU."""
    if launch.device.type == "cuda":
        torch.cuda.set_device(launch.device)
    if launch.world_size > 1 or launch.zero:  # DeepSpeed wants a group even of one
        backend = "cpu:gloo,cuda:nccl" if launch.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def is_peer_loss(error: BaseException) -> bool:
    """Whether an error of torch says that another rank is gone; gloo raises a bare RuntimeError for it."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in ("gloo", "Connection closed by peer", "NCCL"))
    )


def _read_engine(environ: Mapping[str, str], world_size: int, zero: Mapping[str, Any] | None) -> tuple[EngineName, Mesh, bool]:
    if zero:
        names: dict[int, EngineName] = {1: "zero1", 2: "zero2", 3: "zero3"}
        return names[zero["zero_optimization"]["stage"]], Mesh(replicas=1, shards=world_size), True
    if world_size == 1:
        return "single", Mesh(replicas=1, shards=1), True
    if environ.get("ACCELERATE_USE_FSDP") == "true":
        return _read_fsdp(environ, world_size)
    return "ddp", Mesh(replicas=world_size, shards=1), True


def _read_fsdp(environ: Mapping[str, str], world_size: int) -> tuple[EngineName, Mesh, bool]:
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import FullyShardedDataParallelPlugin

    version = environ.get("FSDP_VERSION", "1")  # the plugin of version 1 cannot even be built without a GPU
    if version != "2":
        raise ConfigError(
            f"accelerate's config file asks for FSDP {version}; this trainer shards with FSDP2: "
            "set fsdp_version: 2 (accelerate to-fsdp2 converts a file)"
        )
    plugin = FullyShardedDataParallelPlugin()
    mesh = Mesh(replicas=1, shards=world_size)
    if environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
        sizes = ParallelismConfig()
        mesh = Mesh(replicas=sizes.dp_replicate_size, shards=sizes.dp_shard_size)
        if mesh.replicas * mesh.shards != world_size or sizes.tp_size * sizes.cp_size != 1:
            raise ConfigError(
                f"accelerate's parallelism_config asks for {mesh.replicas} replicas x {mesh.shards} shards "
                f"(tp {sizes.tp_size}, cp {sizes.cp_size}) and {world_size} processes started; "
                "set dp_replicate_size x dp_shard_size to the number of processes and leave tp and cp at 1"
            )
    return "fsdp2", mesh, bool(plugin.reshard_after_forward)


def _read_precision(environ: Mapping[str, str], config: ParallelConfig) -> Literal["fp32", "bf16"]:
    asked = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    names: dict[str, Literal["fp32", "bf16"]] = {"no": "fp32", "bf16": "bf16"}
    if asked not in names:
        raise ConfigError(f"accelerate's config file asks for mixed_precision {asked}; this trainer runs no (fp32) and bf16")
    if config.precision and asked != "no" and names[asked] != config.precision:
        raise ConfigError(
            f"parallel.precision is {config.precision} and accelerate's mixed_precision is {asked}; drop one of the two"
        )
    return config.precision or names[asked]
