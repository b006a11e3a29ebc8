"""Linear layers of transformer blocks in float8, by torchao.

Weights, moments and checkpoints stay as they are. For a product both factors are scaled by their largest value, as it is in that moment,
and rounded to 8 bits: weights and tokens to e4m3, gradients to e5m2 (Micikevicius et al. 2022); sums are float32, results bf16. What
rounding takes of a factor is 1/16 of it at most, of a gradient 1/8. Everything else of a block, and all that is no block (patches,
predictions, heads), stays as `parallel.precision` has it.

A GPU multiplies float8 from Ada and Hopper on (compute capability 8.9). A CPU rounds as such a GPU does and multiplies in float32: slower
than without, for tests and for a look at what 8 bits do to a loss. Nobody has run this on a GPU here.
"""

from typing import Any

import torch
from torch import nn

from trainer.errors import ConfigError
from trainer.parallel.blocks import is_block
from trainer.parallel.launch import Launch

_MULTIPLE = 16
"""Of which both widths of a product have to be one; the number of tokens is filled up."""
_LEAST_CAPABILITY = (8, 9)


def use_float8(model: nn.Module, launch: Launch) -> None:
    """Have the linear layers of all blocks of `model` multiply in float8; ConfigError where that cannot be."""
    _check(launch)
    convert, config = _import_torchao(emulate=launch.device.type == "cpu")
    for block in filter(is_block, model.modules()):
        convert(block, config=config, module_filter_fn=_fits)


def _check(launch: Launch) -> None:
    if launch.precision != "bf16":
        raise ConfigError(
            f"parallel.fp8_linears is true and the rest would be {launch.precision}; set parallel.precision to bf16 or fp8_linears to false"
        )
    if launch.zero:
        raise ConfigError(
            "parallel.fp8_linears is true and this run is DeepSpeed's, under which nobody has tried it; "
            "take FSDP2 or DDP, or set fp8_linears to false"
        )
    if launch.device.type == "cuda" and torch.cuda.get_device_capability(launch.device) < _LEAST_CAPABILITY:
        raise ConfigError(
            f"parallel.fp8_linears is true and {torch.cuda.get_device_name(launch.device)} does not multiply float8 (from compute "
            "capability 8.9 on: Ada, Hopper); set it to false"
        )


def _import_torchao(*, emulate: bool) -> tuple[Any, Any]:
    """What converts, and how it is to."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError(
            f"parallel.fp8_linears is true and torchao cannot be imported ({error}): pip install 'odonata[fp8]', or set it to false"
        ) from error
    return convert_to_float8_training, Float8LinearConfig(emulate=emulate, pad_inner_dim=True)


def _fits(module: nn.Module, name: str) -> bool:
    del name
    return isinstance(module, nn.Linear) and module.in_features % _MULTIPLE == 0 == module.out_features % _MULTIPLE
