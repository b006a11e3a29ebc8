"""Where torch.distributed.checkpoint (DCP) puts its bytes: one raw object a rank, no pickle, no `.metadata`.

DCP's planners take the boxes that a rank has to write and decide which stored boxes it needs to fill its own; here a box is
turned into bytes and back. A rank streams its boxes one after the other, the next one brought to the host while one is
written, so it holds two of them beside its state. A reader asks for the rows that it needs and no more, for neighbouring boxes
together and for several stretches at once, since a store far away answers each request late. Rows are read into the live
tensors; only what is wanted in part, or by a GPU, lands in memory of its own first, and of a large box some rows at a time. What
is written has a checksum a box, which is checked when the whole box is read again.

Left to whom: the planners are DCP's; the store knows bytes only; the manifest is `record`'s and is put by `manager`.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
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
from trainer.store.base import Checksum, ObjectInfo, Store, StoreError

_READERS = 4
_READ_BYTES = 32 << 20  # the most of one request: each costs the server and the way to it a while, whatever its size

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
        whole = Checksum()
        if items:
            info = self._store.put(self._prefix + self._object, self._stream(items, planner, results, whole))
            if (info.bytes, info.checksum) != (whole.bytes, str(whole)):
                raise StoreError(
                    f"{self._store.uri} was given {whole.bytes} bytes of {self._prefix}{self._object} with {whole} and took {info.bytes} "
                    f"with {info.checksum}: they changed in this host's memory; start the same job again, elsewhere if it comes back"
                )
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

    def _stream(
        self, items: list[WriteItem], planner: SavePlanner, results: list[WriteResult], whole: Checksum
    ) -> Iterator[memoryview]:
        """The bytes of `items` one after the other; `whole` counts them, without seeing them again."""
        for item, (view, checksum) in zip(items, _one_ahead(lambda item: _on_host(planner, item), items), strict=True):
            yield view
            assert item.tensor_data is not None
            box = item.tensor_data.chunk
            chunk = Chunk(tuple(box.offsets), tuple(box.sizes), self._object, whole.bytes, view.nbytes, str(checksum))
            results.append(WriteResult(item.index, view.nbytes, chunk))
            whole.append(checksum)

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
        """Fill the live tensors, `_READERS` stretches at once."""
        wanted = [self._rows(item, planner.resolve_tensor(item).detach()) for item in plan.items if math.prod(item.lengths)]
        with ThreadPoolExecutor(_READERS) as threads:
            for _ in threads.map(self._read_stretch, _stretches(wanted)):
                pass
        return _done(None)

    def _rows(self, item: ReadItem, target: Tensor) -> "_Rows":
        """The rows of a stored box that hold the wanted one."""
        name, offsets = item.storage_index.fqn, item.storage_index.offset
        assert offsets is not None
        chunk, dtype = self._chunks[name, tuple(offsets)], getattr(torch, self._record.tensors[name].dtype)
        first = item.storage_offsets[0] if item.lengths else 0
        row_bytes = chunk.byte_length // (chunk.lengths[0] if chunk.lengths else 1)
        return _Rows(
            name=name,
            chunk=chunk,
            start=chunk.byte_offset + first * row_bytes,
            shape=(*item.lengths[:1], *chunk.lengths[1:]),
            dtype=dtype,
            columns=tuple(zip(item.storage_offsets[1:], item.lengths[1:], strict=True)),
            target=target,
            checksum=Checksum(),
        )

    def _read_stretch(self, stretch: "list[_Rows]") -> None:
        """Read rows that lie one after the other; those of a box that is too large for one request, some at a time."""
        pieces = [stretch] if len(stretch) > 1 else [[rows] for rows in stretch[0].split()]
        for piece in pieces:
            landings = [rows.landing() for rows in piece]
            key = self._record.prefix + piece[0].chunk.object
            self._store.read_into(key, piece[0].start, [_bytes_of(landing) for landing in landings])
            for rows, landing in zip(piece, landings, strict=True):
                rows.take(landing)
        for rows in stretch:
            self._check(rows)

    def _check(self, rows: "_Rows") -> None:
        """CheckpointError where all of a box was read and is not what was written."""
        if rows.checksum.bytes == rows.chunk.byte_length and str(rows.checksum) != rows.chunk.checksum:
            place = f"{self._store.uri}/{self._record.prefix}{rows.chunk.object}"
            raise CheckpointError(f"{rows.name} in {place} is damaged: its checksum differs; take an older checkpoint")

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


@dataclass(frozen=True)
class _Rows:
    """Rows of a stored box, which lie in one piece, and the live tensor that they, or some columns of them, go into."""

    name: str
    chunk: Chunk
    start: int
    """Where in the object they begin."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    columns: tuple[tuple[int, int], ...]
    """First and number of what is wanted in every dimension but that of the rows."""
    target: Tensor
    checksum: Checksum
    """Of all that was read of the box, in order."""

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def split(self) -> "Iterator[_Rows]":
        """These rows in order, as many at a time as one request brings, at least one."""
        if self.bytes <= _READ_BYTES or not self.shape:
            yield self
            return
        row_bytes = self.bytes // self.shape[0]
        rows = max(1, _READ_BYTES // row_bytes)
        for first in range(0, self.shape[0], rows):
            target = self.target[first : first + rows]
            yield replace(self, start=self.start + first * row_bytes, shape=(len(target), *self.shape[1:]), target=target)

    def landing(self) -> Tensor:
        """Host memory to read into: the live tensor itself wherever these bytes are its own."""
        fits = self.target.is_cpu and self.target.is_contiguous() and self.target.shape == self.shape
        return self.target if fits else torch.empty(self.shape, dtype=self.dtype)

    def take(self, landing: Tensor) -> None:
        """Count what was read into `landing`, and bring it to the live tensor if it is not there."""
        self.checksum.update(_bytes_of(landing))
        if landing is not self.target:
            for dim, (start, length) in enumerate(self.columns, start=1):
                landing = landing.narrow(dim, start, length)
            self.target.copy_(landing)


def _stretches(wanted: list[_Rows]) -> Iterator[list[_Rows]]:
    """`wanted` in the order in which they lie; what one request can bring together, one behind the other, is together."""
    stretch: list[_Rows] = []
    begin = end = 0
    for rows in sorted(wanted, key=lambda rows: (rows.chunk.object, rows.start)):
        follows = stretch and rows.start == end and rows.chunk.object == stretch[-1].chunk.object
        if stretch and not (follows and end + rows.bytes - begin <= _READ_BYTES):
            yield stretch
            stretch = []
        begin = begin if stretch else rows.start
        end = rows.start + rows.bytes
        stretch.append(rows)
    if stretch:
        yield stretch


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


def _on_host(planner: SavePlanner, item: WriteItem) -> tuple[memoryview, Checksum]:
    """The bytes of a box and their checksum."""
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, Tensor), "a logical state holds tensors only"
    view, checksum = _bytes_of(tensor.detach().cpu().contiguous()), Checksum()
    checksum.update(view)
    return view, checksum


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
