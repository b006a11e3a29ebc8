"""Sharding with torch's fully_shard (FSDP2), one unit a transformer block, one the renderer, the rest in the root.

A block is gathered before its forward and again before its backward, and the gathers of the next blocks are started
early: explicit prefetch, because the blocks of encoder and decoder run in the order in which they are registered.
Weights are gathered in the precision of the matrix products, those of the renderer in float32; gradients are reduced in float32.
"""

import datetime
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from models.rendering import Renderer
from trainer.config.training import ParallelConfig
from trainer.parallel.blocks import called_blocks
from trainer.parallel.launch import Launch


def shard(model: nn.Module, launch: Launch, config: ParallelConfig) -> None:
    """Shard `model` in place over the mesh of `launch`."""
    mesh = _build_mesh(launch, datetime.timedelta(seconds=config.timeout_s))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if launch.precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast decides per operation, as under every other engine
    )
    sharded = [
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=launch.reshard_after_forward)
        for block in called_blocks(model)
    ]
    for module in model.modules():
        if isinstance(module, Renderer):  # distances to a centimetre do not survive weights of 8 bits
            fully_shard(module, mesh=mesh, mp_policy=replace(policy, param_dtype=None), reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    _prefetch(sharded, config.prefetch_blocks)


def _build_mesh(launch: Launch, timeout: datetime.timedelta) -> DeviceMesh:
    sizes = {"replicate": launch.mesh.replicas, "shard": launch.mesh.shards}
    if launch.mesh.replicas == 1:
        del sizes["replicate"]
    mesh = init_device_mesh(launch.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    for group in mesh.get_all_groups():
        # The groups of a mesh do not inherit the time-out of the world: a frozen peer would cost half an hour.
        _set_pg_timeout(timeout, group)
    return mesh


def _prefetch(blocks: Sequence[FSDPModule], ahead: int) -> None:
    for place, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(list(blocks[place + 1 : place + 1 + ahead]))
        block.set_modules_to_backward_prefetch(list(reversed(blocks[max(0, place - ahead) : place])))
