"""What is done to each transformer block before it is spread over ranks: recomputing its activations, compiling it.

    none        the backward has all that the forward made
    selective   outputs of matrix products and of attention are kept, the rest (norms, GELU, sums) is made again: almost no compute,
                about half the memory (the policy of torchtitan and of Korthikanti et al. 2022, who keep all but attention's inside)
    full        only what enters a block is kept: the least memory, about a third more compute

Random state is kept in both, where accelerate's own wrapper drops it. A block is compiled with its recomputation inside, which the
compiler has to see, and by itself: blocks of one shape share one compiled function, and hooks of what shards stay outside of it.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from models.layers import Block, DecoderBlock
from trainer.config.training import Recompute

_KEPT = frozenset({
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
    "xformers_flash::flash_fwd",
    "xformers_flash3::flash_fwd",
})  # fmt: skip
"""Matrix products and attention, by the names of their operators."""


def recompute_activations(model: nn.Module, what: Recompute) -> None:
    """Wrap every block of `model` so that its backward makes `what` again."""
    if what == "none":
        return
    kept = {"context_fn": partial(create_selective_checkpoint_contexts, _choose)} if what == "selective" else {}
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda block: checkpoint_wrapper(
            block, checkpoint_impl=CheckpointImpl.NO_REENTRANT, preserve_rng_state=True, **kept
        ),
        check_fn=is_block,
    )


def compile_blocks(model: nn.Module) -> None:
    """Compile every block of `model`, each for the few shapes that a run has."""
    for block in called_blocks(model):
        block.forward = torch.compile(block.forward, dynamic=False)  # type: ignore[method-assign]


def called_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Blocks in the order in which they run, each as the module that is called: its checkpoint wrapper where it has one."""
    inner: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, CheckpointWrapper):
            inner.add(module._checkpoint_wrapped_module)
            yield module
        elif is_block(module) and module not in inner:
            yield module


def is_block(module: nn.Module) -> bool:
    """Whether it is a transformer block itself, not what is around it."""
    return isinstance(module, Block | DecoderBlock)


def _choose(_context: Any, operator: Any, *_arguments: Any, **_keywords: Any) -> CheckpointPolicy:
    kept = operator.name().partition(".")[0] in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
