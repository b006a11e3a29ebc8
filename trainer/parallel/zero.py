"""ZeRO (Rajbhandari et al. 2020) by DeepSpeed: all that is asked of it, and all that is known of how it lays out memory.

ZeRO flattens the weights of an optimiser group and gives each rank a part of the flat memory, cut wherever it falls: stages
1 and 2 cut a group's memory into one part a rank, stage 3 every weight by itself. What a rank holds of a weight is a
`Fragment`, a range of its elements, and its moments lie at the same place of the optimiser's flat memory. Checkpoints read
and write fragments, so nothing is gathered and padding is never seen.

DeepSpeed exchanges gradients, shards them and runs the optimiser; it neither clips nor skips here. Whether a step is taken is
decided by `engine` as under every other engine, and `drop_gradients` is how it is not.

Most of what is touched is DeepSpeed's private API: pyproject.toml holds it to one minor version.
"""

import datetime
import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout

from trainer.checkpoint.boxes import Box, Boxes, boxes_of, boxes_of_range
from trainer.checkpoint.logical import create_moments, logical_name
from trainer.config.training import ParallelConfig
from trainer.parallel.launch import Launch


@dataclass(frozen=True)
class Fragment:
    """Elements `start` to `start + length`, counted row by row, of a weight of `shape`; `first` is where they lie in `flat`."""

    shape: tuple[int, ...]
    start: int
    length: int
    flat: Tensor
    """Flat memory of many weights; the optimiser's parameter where the weight is trained."""
    first: int

    def of(self, flat: Tensor) -> Tensor:
        """These elements in memory that is laid out as `self.flat`, not copied."""
        return flat.detach().view(-1).narrow(0, self.first, self.length)

    @property
    def elements(self) -> Tensor:
        """The weight itself."""
        return self.of(self.flat)

    def boxes(self, elements: Tensor) -> Boxes:
        """`elements`, this fragment of some tensor of this shape, as boxes that share their memory."""
        cut = boxes_of_range(self.shape, self.start, self.start + self.length)
        return Boxes(
            self.shape,
            elements.dtype,
            tuple(
                Box(offsets, elements.narrow(0, element - self.start, math.prod(lengths)).view(lengths))
                for offsets, lengths, element in cut
            ),
        )


class Zero(ABC):
    """A module under DeepSpeed with the memory of its weights; the stages differ in where that is."""

    def __init__(self, engine: Any, optimizer: torch.optim.AdamW) -> None:
        self.engine = engine
        self.sharded: Any = engine.optimizer
        self.optimizer = optimizer
        names = {weight: logical_name(engine.module, name) for name, weight in engine.module.named_parameters()}
        self.fragments = {names[weight]: fragment for weight, fragment in self._find_fragments()}
        self.steps = {names[weight]: torch.zeros(()) for group in self._weights() for weight in group}
        """What `state()` shows as the steps of each weight: DeepSpeed counts those of a flat memory."""
        for flat in self._flat_weights():
            create_moments(optimizer, flat, optimizer.param_groups[0])

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`; it is exchanged at the latest on the last one of a step."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def step(self) -> None:
        """One step of the optimiser with the gradients as they are now; every rank ends up with the new weights."""
        self.engine.step()

    @property
    def offloads(self) -> bool:
        """Whether moments and masters, so gradients too, are in the host's memory."""
        return bool(self.engine.zero_cpu_offload())

    def gradients(self) -> list[Tensor]:
        """The mean gradient after the last backward of a step, as much as this rank steps; writing it changes the step."""
        if not self.offloads:
            return list(itertools.chain.from_iterable(self.sharded.averaged_gradients.values()))
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # they come from the GPU in copies that nobody waits for
        # Weight by weight: the norm of a flat memory of millions, added up in float32, is off in the fourth digit.
        trained = [self.fragments[name] for name in self.steps]
        return [fragment.of(fragment.flat.grad) for fragment in trained if fragment.flat.grad is not None]

    @abstractmethod
    def drop_gradients(self) -> None:
        """Forget the gradients of a step that is not taken, as DeepSpeed does after an overflow."""

    @abstractmethod
    def refresh_weights(self) -> None:
        """Bring what the module computes with up to date with the fragments, after they were written; collective."""

    def state(self) -> dict[str, Boxes]:
        """Weights, persistent buffers and moments by logical name, as much as this rank holds of each."""
        state = {f"model.{name}": fragment.boxes(fragment.elements) for name, fragment in self.fragments.items()}
        state |= {f"model.{name}": boxes_of(buffer) for name, buffer in self._buffers()}
        for name, step in self.steps.items():
            moments, fragment = self._moments(name), self.fragments[name]
            step.copy_(moments["step"])
            state[f"optim.{name}.exp_avg"] = fragment.boxes(fragment.of(moments["exp_avg"]))
            state[f"optim.{name}.exp_avg_sq"] = fragment.boxes(fragment.of(moments["exp_avg_sq"]))
            state[f"optim.{name}.step"] = boxes_of(step)
        return state

    def state_was_loaded(self) -> None:
        """Take over what was written into `state()`; collective."""
        for flat in self._flat_weights():
            self.optimizer.state[flat]["step"].zero_()
        for name, step in self.steps.items():
            # Other engines count a step for each weight, and one that never had a gradient stays behind.
            counted = self._moments(name)["step"]
            counted.copy_(torch.maximum(counted, step.to(counted.device)))
        self.refresh_weights()

    def _moments(self, name: str) -> dict[str, Tensor]:
        return self.optimizer.state[self.fragments[name].flat]

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        module = self.engine.module
        kept = module.state_dict().keys()
        return ((logical_name(module, name), buffer) for name, buffer in module.named_buffers() if name in kept)

    @abstractmethod
    def _find_fragments(self) -> Iterator[tuple[nn.Parameter, Fragment]]:
        """Every weight of the module with what this rank holds of it, in the order of the module."""

    @abstractmethod
    def _weights(self) -> list[list[nn.Parameter]]:
        """The trained weights of each flat memory."""

    @abstractmethod
    def _flat_weights(self) -> list[Tensor]:
        """The flat float32 memories that the optimiser of this rank steps."""


class _ZeroOneTwo(Zero):
    """Stages 1 and 2: a copy of the weights to compute with on every rank, a part of the float32 masters on each."""

    def drop_gradients(self) -> None:
        self.sharded.micro_step_id = -1  # counted from before the first backward
        self.sharded.zero_grad()
        for gradients in (self.sharded.averaged_gradients, self.sharded.all_grad_tensors):
            gradients.update(dict.fromkeys(gradients))
        if self.offloads:
            self.sharded.reset_cpu_buffers()

    def refresh_weights(self) -> None:
        self.sharded.update_lp_params()

    def _find_fragments(self) -> Iterator[tuple[nn.Parameter, Fragment]]:
        flat_of = {weight: flat for flat, group in zip(self._flat_weights(), self._weights(), strict=True) for weight in group}
        for weight in self.engine.module.parameters():
            shape, flat = tuple(weight.shape), flat_of.get(weight)
            mapping = getattr(weight, "_hp_mapping", None)
            if flat is None:
                yield weight, Fragment(shape, 0, weight.numel(), weight.detach(), 0)
            elif mapping is None:
                yield weight, Fragment(shape, 0, 0, flat, 0)
            else:
                held, place = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield weight, Fragment(shape, held.start, held.numel, flat, place.start)

    def _weights(self) -> list[list[nn.Parameter]]:
        return self.sharded.bit16_groups

    def _flat_weights(self) -> list[Tensor]:
        return self.sharded.single_partition_of_fp32_groups


class _ZeroThree(Zero):
    """Stage 3: a part of every weight on each rank, gathered around the forward and backward of its module."""

    def drop_gradients(self) -> None:
        self.sharded._overflow_clean_up(1.0)

    def refresh_weights(self) -> None:
        for group in range(len(self._weights())):
            self.sharded._reassign_or_swap_out_partitioned_parameters(group)
        small = self.sharded.persistent_parameters
        if small:  # these stay gathered between steps
            small[0].all_gather(small)

    def _find_fragments(self) -> Iterator[tuple[nn.Parameter, Fragment]]:
        for weight in self.engine.module.parameters():
            shape, part = tuple(weight.ds_shape), weight.ds_tensor  # type: ignore[attr-defined]
            start = min(weight.ds_numel, part.numel() * self.sharded._get_param_partition_rank(weight))
            length = min(part.numel(), weight.ds_numel - start)
            if weight.requires_grad:
                group, first, _ = self.sharded.grad_position[self.sharded.get_param_id(weight)]
                yield weight, Fragment(shape, start, length, self._flat_weights()[group], first)
            else:
                yield weight, Fragment(shape, start, length, part.detach(), 0)

    def _weights(self) -> list[list[nn.Parameter]]:
        return self.sharded.fp16_groups

    def _flat_weights(self) -> list[Tensor]:
        return self.sharded.fp32_partitioned_groups_flat


def shard_with_deepspeed(module: nn.Module, optimizer: torch.optim.AdamW, launch: Launch, parallel: ParallelConfig) -> Zero:
    """Spread `module` and `optimizer`, which must not have stepped, over the ranks as `launch.zero` says."""
    import deepspeed

    assert launch.zero is not None, "a ZeRO engine comes with DeepSpeed's config"
    # Its collectives go by names that torch calls old, every time; it is DeepSpeed's to change them.
    warnings.filterwarnings("ignore", ".torch.distributed.(all_gather_into|reduce_scatter)_tensor. is deprecated", FutureWarning)
    # Else it would build, with a compiler, an all-reduce for processes on one CPU; gloo has one.
    deepspeed.ops.__compatible_ops__ = {}
    engine, _, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=_config(launch.zero, launch.precision))
    # DeepSpeed's group does not inherit the time-out of the world: a frozen peer would cost half an hour.
    _set_pg_timeout(datetime.timedelta(seconds=parallel.timeout_s), engine.optimizer.dp_process_group)
    return (_ZeroThree if launch.engine == "zero3" else _ZeroOneTwo)(engine, optimizer)


def _config(zero: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """DeepSpeed's config of a run.

    It is told of batches of one sample in one micro-step, which it counts and does not compute with. Autocast is its own, since it
    turns ours off, and names no modules, whose gradients it would exchange in bf16.
    """
    return {
        **zero,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # left out, it is 1
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also when offloaded: the same arithmetic, and no compiler
    }
