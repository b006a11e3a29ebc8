"""Boxes: the part of a logical tensor that this rank holds, whatever engine holds it.

FSDP2 gives a rank one box of a tensor, DDP and one process the whole of it, and ZeRO, which cuts flat memory anywhere, up to
three. Boxes share memory with what trains, so reading them saves and writing them loads. DCP's planners take them through the
protocol by which DTensors present themselves: they decide which stored boxes fill one. Which rank writes a box that several
hold is decided here, before it is copied: replicas must not stage what they do not write.

Left to whom: bytes and places are `storage`'s, names `logical`'s.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor


class Box(NamedTuple):
    """A box of a tensor: where it begins, and its elements."""

    offsets: tuple[int, ...]
    tensor: Tensor


class Holders(NamedTuple):
    """The ranks that hold the very same boxes of a tensor, and which of them this one is."""

    total: int = 1
    number: int = 0


_ONE_HOLDER = Holders()


@dataclass(frozen=True)
class Boxes:
    """A logical tensor of `shape` and `dtype`, of which this rank holds `boxes`, or none."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]
    holders: Holders = _ONE_HOLDER

    @property
    def bytes(self) -> int:
        """Size of what this rank holds."""
        return sum(box.tensor.nbytes for box in self.boxes)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Boxes":
        """The same boxes with other elements."""
        return replace(self, boxes=tuple(Box(offsets, function(tensor)) for offsets, tensor in self.boxes))

    def size(self) -> torch.Size:
        """The shape, under the name by which a planner asks for it."""
        return torch.Size(self.shape)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """DCP's protocol: the boxes."""
        return [ChunkStorageMetadata(torch.Size(offsets), tensor.size()) for offsets, tensor in self.boxes]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        """DCP's protocol: the boxes as things to write."""
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """DCP's protocol: the box that `index` names."""
        return next(tensor for offsets, tensor in self.boxes if torch.Size(offsets) == index.offset)


State = Mapping[str, Boxes]
"""What a run must keep, by logical name."""


def boxes_of(tensor: Tensor) -> Boxes:
    """What this rank holds of a plain tensor, which is all of it, as every rank does, or of a DTensor."""
    if isinstance(tensor, DTensor):
        [chunk] = tensor.__create_chunk_list__()
        local = tensor.to_local().detach()
        held = (Box(tuple(chunk.offsets), local),) if local.numel() else ()  # an uneven shard may be empty
        return Boxes(tuple(tensor.shape), tensor.dtype, held, _replicas_of(tensor))
    everybody = Holders(dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else _ONE_HOLDER
    return Boxes(tuple(tensor.shape), tensor.dtype, (Box((0,) * tensor.ndim, tensor.detach()),), everybody)


def take_share(state: State) -> State:
    """`state` without the boxes that another of their holders is to write; each is left with one of them, the sizes shared evenly.

    Nothing is exchanged: the holders of a box see the same sizes in the same order and come to the same answer.
    """
    given: dict[int, list[int]] = {}
    share = {}
    for name in sorted(state, key=lambda name: (-state[name].bytes, name)):
        boxes = state[name]
        loads = given.setdefault(boxes.holders.total, [0] * boxes.holders.total)
        writer = loads.index(min(loads))
        loads[writer] += boxes.bytes
        share[name] = boxes if writer == boxes.holders.number else replace(boxes, boxes=())
    return {name: share[name] for name in state}


def _replicas_of(tensor: DTensor) -> Holders:
    """The ranks that differ in dimensions of the mesh over which `tensor` is replicated, and in no other."""
    total, number = 1, 0
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "a rank outside of the mesh holds nothing"
    for size, place, placement in zip(tensor.device_mesh.shape, coordinate, tensor.placements, strict=True):
        if placement.is_replicate():
            total, number = total * size, number * size + place
    return Holders(total, number)


class SavePlanner(DefaultSavePlanner):
    """DCP's planner; a box that several ranks give it, unlike `take_share`, is written by the one with the least to write."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The box that `index` names."""
        boxes: Boxes = self.state_dict[index.fqn]
        return boxes.__get_tensor_shard__(index)


class LoadPlanner(DefaultLoadPlanner):
    """DCP's planner; every asked tensor must be there."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Take the boxes as they are: DCP's own looks for tensors without memory among them."""
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The box that `index` names."""
        boxes: Boxes = self.state_dict[index.fqn]
        return boxes.__get_tensor_shard__(index)


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Cut elements `start` to `stop` of a row-major tensor of `shape` into boxes: (offsets, lengths, first element).

    A flat range that begins and ends within rows is the end of one row, whole rows and the beginning of another, and the same
    again one dimension down in each of the broken rows: at most 2 * (dimensions - 1) + 1 boxes.
    """
    if start >= stop:
        return
    if not shape:
        yield (), (), 0
        return
    row = 1
    for size in shape[1:]:
        row *= size
    first_whole, last_whole = -(-start // row), stop // row
    if first_whole > last_whole:  # within one row
        yield from _within_row(shape, start // row, start % row, stop - start // row * row)
        return
    if start % row:
        yield from _within_row(shape, first_whole - 1, start % row, row)
    if first_whole < last_whole:
        zeros = (0,) * (len(shape) - 1)
        yield (first_whole, *zeros), (last_whole - first_whole, *shape[1:]), first_whole * row
    if stop % row:
        yield from _within_row(shape, last_whole, 0, stop % row)


def _within_row(
    shape: tuple[int, ...], row: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    elements = 1
    for size in shape[1:]:
        elements *= size
    for offsets, lengths, first in boxes_of_range(shape[1:], start, stop):
        yield (row, *offsets), (1, *lengths), row * elements + first
