"""The logical state of a run: names and live tensors, the same whatever spreads them over ranks.

    model.<fqn>                weights and persistent buffers
    optim.<fqn>.<moment>       exp_avg, exp_avg_sq and step of each trained weight
    ema.<fqn>                  moving averages

<fqn> is the name of the weight in the bare model: the names that DDP, activation checkpointing and torch.compile put around a
module are taken out. A value is what this rank holds of a tensor (`Boxes`), sharing its memory with what trains, so saving reads
it and loading writes it; nothing is gathered. Moments that do not exist before the first step are created as AdamW creates them, or a
checkpoint could not be loaded into a fresh run and one saved before the first step would lack them.

Left to whom: DeepSpeed's fragments go by the same names (`trainer.parallel.zero`); bytes are `storage`'s.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainer.checkpoint.boxes import Boxes, boxes_of

_WRAPPERS = frozenset({"_checkpoint_wrapped_module", "_orig_mod"})


def logical_state(module: nn.Module, optimizer: torch.optim.AdamW, averages: Mapping[str, Tensor] | None) -> dict[str, Boxes]:
    """All that a run must keep, by logical name; every rank gets the same names in the same order."""
    state = model_state(module)  # first: it brings FSDP2's weights back to shards, which the optimiser knows them by
    state |= _optimizer_state(module, optimizer)
    state |= {f"ema.{logical_name(module, name)}": boxes_of(average) for name, average in (averages or {}).items()}
    return state


def model_state(module: nn.Module) -> dict[str, Boxes]:
    """Weights and persistent buffers of `module` as model.<fqn>."""
    tensors = module.state_dict()
    return {f"model.{logical_name(module, name)}": boxes_of(tensor) for name, tensor in tensors.items()}


def logical_name(module: nn.Module, name: str) -> str:
    """`name`, as `module` says it, in the bare model."""
    parts = name.split(".")
    if isinstance(module, nn.parallel.DistributedDataParallel):
        parts = parts[parts[0] == "module" :]
    return ".".join(part for part in parts if part not in _WRAPPERS)


def _optimizer_state(module: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Boxes]:
    names = {parameter: logical_name(module, name) for name, parameter in module.named_parameters()}
    state: dict[str, Boxes] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = optimizer.state[parameter] or create_moments(optimizer, parameter, group)
            state |= {f"optim.{names[parameter]}.{moment}": boxes_of(tensor) for moment, tensor in sorted(moments.items())}
    return state


def create_moments(optimizer: torch.optim.AdamW, parameter: Tensor, group: Mapping[str, object]) -> dict[str, Tensor]:
    """What AdamW's first step would create; it takes these for its own, and counts their step from zero."""
    assert not group["amsgrad"], "amsgrad keeps a third moment"
    device = parameter.device if group["fused"] or group["capturable"] else torch.device("cpu")
    moments = {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }
    optimizer.state[parameter] = moments
    return moments
