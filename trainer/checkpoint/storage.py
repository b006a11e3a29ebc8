"""Where torch.distributed.checkpoint (DCP) puts its bytes: one raw object a rank, no pickle, no `.metadata`.

DCP's planners decide which rank writes which box of which tensor and which boxes a rank needs to fill its own; here a box is
turned into bytes and back. Replicated tensors are planned on all ranks and written by the one with the least to write.
A rank streams its boxes one after the other, the next one brought to the host while one is written, so it holds two of them
beside its state; a reader asks for the rows that it
needs and no more, several boxes at once, since a store far away answers each of them late. What is written has a checksum a box,
which is checked when the whole box is read again.

Left to whom: the planners are DCP's; the store knows bytes only; the manifest is `record`'s and is put by `manager`.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future as TorchFuture

from trainer.checkpoint.record import DTYPE_BYTES, Chunk, Record, StoredObject, StoredTensor
from trainer.errors import CheckpointError
from trainer.store.base import Checksum, ObjectInfo, Store

_READERS = 4

T = TypeVar("T")
R = TypeVar("R")


class Writer(StorageWriter):
    """Writes the boxes of one save under `prefix`; on the coordinator `tensors` and `objects` say afterwards what was written."""

    def __init__(self, store: Store, prefix: str, *, rank: int) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self.objects: dict[str, StoredObject] = {}
        self._store = store
        self._prefix = prefix
        self._object = f"rank-{rank:05d}.bin"

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """Stream the boxes of this rank into its object; nothing is written where there is none."""
        items = [item for item in plan.items if _box_bytes(item)]
        results: list[WriteResult] = []
        if items:
            info = self._store.put(self._prefix + self._object, self._stream(items, planner, results))
            results.append(WriteResult(MetadataIndex(self._object), info.bytes, info))
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Collect what all ranks wrote; nothing is committed by it."""
        chunks: dict[str, list[Chunk]] = {}
        for result in (result for of_rank in results for result in of_rank):
            if isinstance(result.storage_data, ObjectInfo):
                self.objects[result.index.fqn] = StoredObject(result.size_in_bytes, str(result.storage_data.checksum))
            else:
                chunks.setdefault(result.index.fqn, []).append(result.storage_data)
        for name, tensor in sorted(metadata.state_dict_metadata.items()):
            assert isinstance(tensor, TensorStorageMetadata), f"{name} is no tensor"
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            self.tensors[name] = StoredTensor(tuple(tensor.size), dtype, tuple(sorted(chunks.get(name, []))))

    def _stream(self, items: list[WriteItem], planner: SavePlanner, results: list[WriteResult]) -> Iterator[memoryview]:
        place = 0
        for item, (view, checksum) in zip(items, _one_ahead(lambda item: _on_host(planner, item), items), strict=True):
            yield view
            assert item.tensor_data is not None
            box = item.tensor_data.chunk
            chunk = Chunk(tuple(box.offsets), tuple(box.sizes), self._object, place, view.nbytes, checksum)
            results.append(WriteResult(item.index, view.nbytes, chunk))
            place += view.nbytes

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer serves one save, named when it is made."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans as they are."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never chosen by DCP on its own."""
        return False


class Reader(StorageReader):
    """Reads the boxes that a rank needs out of the objects of `record`."""

    def __init__(self, store: Store, record: Record) -> None:
        self._store = store
        self._record = record
        self._chunks = {(name, chunk.offsets): chunk for name, tensor in record.tensors.items() for chunk in tensor.chunks}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The record in DCP's terms."""
        return Metadata({name: _dcp_metadata(tensor) for name, tensor in self._record.tensors.items()})

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> TorchFuture[None]:
        """Fill the live tensors box by box, `_READERS` at once."""

        def fill(item: ReadItem) -> None:
            self._read_box(item, planner.resolve_tensor(item).detach())

        with ThreadPoolExecutor(_READERS) as threads:
            for _ in threads.map(fill, (item for item in plan.items if math.prod(item.lengths))):
                pass
        return _done(None)

    def _read_box(self, item: ReadItem, target: Tensor) -> None:
        """Read the rows of a stored box that hold the wanted one, then take its columns out of them."""
        name, offsets = item.storage_index.fqn, item.storage_index.offset
        assert offsets is not None
        chunk, dtype = self._chunks[name, tuple(offsets)], getattr(torch, self._record.tensors[name].dtype)
        first = item.storage_offsets[0] if item.lengths else 0
        shape = (*item.lengths[:1], *chunk.lengths[1:])
        data = self._read_rows(name, chunk, first=first, length=math.prod(shape) * dtype.itemsize)
        if target.is_cpu and target.is_contiguous() and target.shape == shape:
            _bytes_of(target)[:] = data
            return
        rows = torch.empty(shape, dtype=dtype)
        _bytes_of(rows)[:] = data
        for dim, (start, length) in enumerate(zip(item.storage_offsets[1:], item.lengths[1:], strict=True), start=1):
            rows = rows.narrow(dim, start, length)
        target.copy_(rows)

    def _read_rows(self, name: str, chunk: Chunk, *, first: int, length: int) -> bytes:
        row_bytes = chunk.byte_length // (chunk.lengths[0] if chunk.lengths else 1)
        data = self._store.get(self._record.prefix + chunk.object, chunk.byte_offset + first * row_bytes, length)
        if length == chunk.byte_length:
            checksum = Checksum()
            checksum.update(data)
            if str(checksum) != chunk.checksum:
                place = f"{self._store.uri}/{self._record.prefix}{chunk.object}"
                raise CheckpointError(f"{name} in {place} is damaged: its checksum differs; take an older checkpoint")
        return data

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A reader serves one record, named when it is made."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never chosen by DCP on its own."""
        return False


def _dcp_metadata(tensor: StoredTensor) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=getattr(torch, tensor.dtype)),
        size=torch.Size(tensor.shape),
        chunks=[ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.lengths)) for chunk in tensor.chunks],
    )


def _box_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None, "a logical state holds tensors only"
    name = str(item.tensor_data.properties.dtype).removeprefix("torch.")
    assert name in DTYPE_BYTES, f"{item.index.fqn} has the type {name}, for which the format has no name"
    return math.prod(item.tensor_data.chunk.sizes) * DTYPE_BYTES[name]


def _on_host(planner: SavePlanner, item: WriteItem) -> tuple[memoryview, str]:
    """The bytes of a box and their checksum."""
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, Tensor), "a logical state holds tensors only"
    view, checksum = _bytes_of(tensor.detach().cpu().contiguous()), Checksum()
    checksum.update(view)
    return view, str(checksum)


def _one_ahead(function: Callable[[T], R], arguments: Iterable[T]) -> Iterator[R]:
    """What `function` makes of each argument; the next is made in a thread while one is used."""
    with ThreadPoolExecutor(1) as thread:
        coming: Future[R] | None = None
        for argument in arguments:
            ready, coming = coming, thread.submit(function, argument)
            if ready:
                yield ready.result()
        if coming:
            yield coming.result()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _done(value: Any) -> TorchFuture[Any]:
    future: TorchFuture[Any] = TorchFuture()
    future.set_result(value)
    return future
