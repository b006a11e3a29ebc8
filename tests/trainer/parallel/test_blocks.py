"""Recomputing and compiling blocks: the same numbers, for other costs."""

import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.attention import Segments
from models.config import TransformerShape
from models.layers import Block, DecoderBlock, Pack
from trainer.config.training import Recompute
from trainer.parallel.blocks import called_blocks, compile_blocks, is_block, recompute_activations

SHAPE = TransformerShape(width=32, depth=2, heads=2, hidden=64)
PACK = Pack(Segments.within((5, 5, 3)), "sdpa")
HOW: tuple[Recompute, ...] = ("none", "selective", "full")


class Tower(nn.Module):
    """Two blocks that attend to themselves, and one that looks across."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(SHAPE), Block(SHAPE)])
        self.last = DecoderBlock(SHAPE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = x
        for block in self.blocks:
            x = block(x, PACK)
        return self.last(x, memory, PACK, PACK)


def learn(tower: Tower) -> list[torch.Tensor]:
    """The answer and all gradients."""
    x = torch.linspace(-1, 1, 13 * SHAPE.width).view(13, SHAPE.width)
    answer = tower(x)
    answer.square().mean().backward()
    return [answer.detach(), *(p.grad for p in tower.parameters() if p.grad is not None)]


def count(tower: Tower) -> int:
    with FlopCounterMode(display=False) as counter:
        learn(tower)
    return counter.get_total_flops()


@pytest.mark.parametrize("how", HOW[1:])
def test_recomputing_changes_no_bit(how: Recompute) -> None:
    plain, wrapped = Tower(), Tower()
    recompute_activations(wrapped, how)
    for expected, got in zip(learn(plain), learn(wrapped), strict=True):
        assert torch.equal(expected, got)


def test_selective_makes_no_product_again_and_full_makes_all() -> None:
    flops = {}
    for how in HOW:
        tower = Tower()
        recompute_activations(tower, how)
        flops[how] = count(tower)
    product = 2 * 13 * SHAPE.width**2  # of 13 tokens with a matrix width x width
    blocks, last = 2 * (3 + 1 + 2 + 2), 3 + 1 + 3 + 1 + 2 + 2  # qkv, proj, fc1 and fc2; the last one looks across as well
    assert flops["none"] == 3 * (blocks + last) * product
    assert flops["selective"] == flops["none"]
    # The second product of an MLP ends a block: nothing in the backward needs what it makes.
    assert flops["full"] - flops["none"] == (blocks + last - 3 * 2) * product


def compare_compiled() -> None:
    """Answers and gradients of compiled blocks beside those of others, for every way to recompute."""
    torch.compile = partial(torch.compile, backend="aot_eager", fullgraph=True)
    for how in HOW:
        plain, compiled = Tower(), Tower()
        recompute_activations(compiled, how)
        compile_blocks(compiled)
        for expected, got in zip(learn(plain), learn(compiled), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_compiled_blocks_learn_the_same_whatever_they_recompute() -> None:
    # In a process of its own, for the tests' checks of types cannot be traced. aot_eager traces forward, backward and recomputation
    # as inductor gets them, and needs no C++ compiler to run them.
    code = f"from {__name__} import compare_compiled; compare_compiled()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=True)


def test_compiling_and_recomputing_leave_the_names_of_weights_as_a_checkpoint_has_them() -> None:
    plain, changed = Tower(), Tower()
    recompute_activations(changed, "full")
    compile_blocks(changed)
    assert list(plain.state_dict()) == list(changed.state_dict())


@pytest.mark.parametrize("how", HOW)
def test_blocks_are_called_in_the_order_in_which_they_run(how: Recompute) -> None:
    tower = Tower()
    bare = [module for module in tower.modules() if is_block(module)]
    recompute_activations(tower, how)
    called = list(called_blocks(tower))
    order: list[nn.Module] = []
    for block in called:
        block.register_forward_pre_hook(lambda module, _arguments: order.append(module))
    tower(torch.zeros(13, SHAPE.width))
    assert order == called
    assert [block if is_block(block) else next(block.children()) for block in called] == bare
    assert all(first is not second for first, second in pairwise(called))
