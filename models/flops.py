"""Floating-point operations of a training step: what the algorithm asks for, not what a kernel happens to do.

`train_flops` is the formula of completion (CroCo, MAE). Per sequence of n tokens, width C, hidden width M: a block multiplies n by
4 C^2 + 2 C M weights, and attention costs 4 C n^2 (scores and sum, both directions, none halved); a multiply-add is two operations.
Training is three times the forward, but for the patch embedding, which needs no gradient of its input: two times. Masked tokens
that are dropped do not count, and neither does recomputation.

`count_flops` counts the matrix products, convolutions and attention of any objectives by running the model itself on fake
tensors, which have shapes and no memory: a ViT-g takes seconds, and no new objective needs a new formula. What the
backward makes again is told apart from what it needs: autograd computes without gradients, a recomputation with them.

Left to whom: how fast that is, and what the device could do, is `trainer.utilisation`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from models.batch import Batch
from models.config import DECODER_SHAPES, CompletionConfig, CrocoConfig, EncoderConfig, Grid, TransformerShape
from models.masking import count_visible


@dataclass(frozen=True)
class Flops:
    """Operations of forward and backward."""

    needed: int
    """By the algorithm: what MFU counts."""
    again: int
    """Made a second time in the backward to save memory: HFU counts both."""


@dataclass(frozen=True)
class ShapedPeers:
    """Ranks of which only their number is known: rows come back as many times as there are ranks."""

    world_size: int
    rank: int = 0

    def gather(self, rows: Tensor) -> Tensor:
        """As Peers has it."""
        return rows.repeat(self.world_size, *[1] * (rows.ndim - 1))

    def sum(self, value: Tensor) -> Tensor:
        """As Peers has it."""
        return value


class _Counter(TorchDispatchMode):
    """Adds up what torch's own formulas say of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.in_backward = False
        self.needed = self.again = 0

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], arguments: Sequence[Any] = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        out = function(*arguments, **(keywords or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            flops = int(formula(*arguments, **(keywords or {}), out_val=out))
            if self.in_backward and torch.is_grad_enabled():
                self.again += flops
            else:
                self.needed += flops
        return out


def count_flops(build: Callable[[], nn.Module], batch: Batch, *, samples: int) -> Flops:
    """Operations that the model of `build`, called as PretrainingModel is, takes for `samples` samples with the shapes of `batch`'s."""
    # Plain matrix products, since torch has no formula for the fused attention of a CPU.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), _Counter() as counter:
        losses = build()(resize_batch(batch, samples), "train")
        counter.in_backward = True
        losses.total.backward()
    return Flops(counter.needed, counter.again)


def resize_batch(batch: Batch, samples: int) -> Batch:
    """A batch of `samples` with the shapes of `batch` and without contents."""

    def resize(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.empty((samples, *one.shape[1:]), dtype=one.dtype) for name, one in tensors.items()}

    prepared = {objective: resize(tensors) for objective, tensors in batch.prepared.items()}
    return Batch(resize(batch.shared), prepared, ("",) * samples)


def train_flops(encoder: EncoderConfig, objective: CompletionConfig, grid: Grid) -> int:
    """Operations of forward and backward for one sample of CroCo or MAE with clips of `grid`."""
    tokens, shape, decoder = grid.tokens, encoder.shape, DECODER_SHAPES[objective.decoder]
    crosses = isinstance(objective, CrocoConfig)
    encoded = [count_visible(grid, objective.mask), *([tokens] if crosses else [])]
    pixels = 3 * encoder.tubelet_frames * encoder.patch_px**2
    embedding = 2 * shape.width * pixels * sum(encoded)
    encoding = sum(shape.depth * _block(shape, encoder.registers + n) for n in encoded)
    bridging = 2 * shape.width * decoder.width * sum(encoded)
    decoding = decoder.depth * (_block(decoder, tokens) + crosses * _cross_attention(decoder, tokens))
    predicting = 2 * decoder.width * pixels * tokens
    return 2 * embedding + 3 * (encoding + bridging + decoding + predicting)


def _block(shape: TransformerShape, n: int) -> int:
    """Forward of self-attention and MLP."""
    weights = 4 * shape.width**2 + 2 * shape.width * shape.hidden
    return 2 * weights * n + 4 * shape.width * n**2


def _cross_attention(shape: TransformerShape, n: int) -> int:
    """Forward of four projections, half of them of the other view's n tokens, and of attention to it."""
    return 2 * 4 * shape.width**2 * n + 4 * shape.width * n**2
