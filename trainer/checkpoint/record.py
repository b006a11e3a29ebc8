"""Record: a checkpoint's manifest, and its form as JSON.

A checkpoint is a prefix in the store with one object of raw tensor bytes a rank and `manifest.json`, which is put last and
without which nothing is there. The manifest names every object with size and checksum and says which box of which logical tensor
lies where in it. It carries a checksum of itself, since a flipped digit can parse. It does not say where it lies, so a checkpoint
may be copied.

    {"format_version":2,"checksum":"crc32:...","record":{step, writer, engine, world_size, created, progress,
        tensors: {name: {shape, dtype}},
        objects: {key: {bytes, checksum, boxes: {tensors, offsets, lengths, checksums}}}}}

A giant encoder on hundreds of ranks has a million boxes, so those of an object are columns: the number of each box's tensor in
`tensors`, offsets and lengths of all boxes in one list each, and their CRC-32 as hexadecimal digits in one text. Boxes lie in an
object one after the other in this order, each row-major and little-endian, without a gap: where is not said. The checksum is that
of the bytes after "record": up to the last brace, as they stand.

Left to whom: bytes are read and written by `storage`, and which checkpoint counts is decided by `manager`.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import ConfigDict, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from trainer.errors import CheckpointError
from trainer.store.base import Checksum

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
_OBJECT_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_HEAD = '{{"format_version":{version},"checksum":"{checksum}","record":'
_HEAD_PATTERN = re.compile(rb'\{"format_version":(\d{1,9}),"checksum":"([^"]*)","record":')
_DIGITS = 8
_KIND = "crc32:"

DTYPE_BYTES = {
    **dict.fromkeys(("float64", "int64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32"), 4),
    **dict.fromkeys(("bfloat16", "float16", "int16"), 2),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "int8", "uint8", "bool"), 1),
}
"""Types that a checkpoint may hold, by the names that torch gives them."""


class Chunk(NamedTuple):
    """One box of a tensor and the bytes that hold it."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    object: str
    byte_offset: int
    byte_length: int
    checksum: str


@dataclass(frozen=True)
class StoredTensor:
    """A logical tensor; its chunks cover it."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class StoredObject:
    """What an object must look like to be whole."""

    bytes: int
    checksum: str


@dataclass(frozen=True)
class Record:
    """A checkpoint: what it holds, where, and how far the run was."""

    step: int
    writer: int
    """Incarnation of the run's writer that committed it (`claim`); 0 outside of a run."""
    engine: str
    world_size: int
    created: str
    """When, in UTC, ISO 8601."""
    progress: dict[str, int]
    """What the run counts; the checkpoint only carries it."""
    tensors: dict[str, StoredTensor]
    objects: dict[str, StoredObject]
    prefix: str = ""
    """Where in the store it was found or put, with "/" at its end; not in the manifest."""

    @property
    def bytes(self) -> int:
        """Size of all objects together."""
        return sum(stored.bytes for stored in self.objects.values())


@dataclass(frozen=True)
class _Shape:
    __pydantic_config__ = ConfigDict(extra="forbid")

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class _Boxes:
    """The boxes of one object, column by column."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    tensors: list[NonNegativeInt]
    offsets: list[NonNegativeInt]
    lengths: list[PositiveInt]
    checksums: str


@dataclass(frozen=True)
class _Object:
    __pydantic_config__ = ConfigDict(extra="forbid")

    bytes: int
    checksum: str
    boxes: _Boxes


@dataclass(frozen=True)
class _Body:
    """What stands under "record"; the first six fields are Record's."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: int
    writer: int
    engine: str
    world_size: int
    created: str
    progress: dict[str, int]
    tensors: dict[str, _Shape]
    objects: dict[str, _Object]


_BODY = TypeAdapter(_Body)


def dump_record(record: Record) -> bytes:
    """The manifest of `record`."""
    names = sorted(record.tensors)
    boxes: dict[str, list[tuple[int, int, Chunk]]] = {key: [] for key in record.objects}
    for number, name in enumerate(names):
        for chunk in record.tensors[name].chunks:
            boxes[chunk.object].append((chunk.byte_offset, number, chunk))
    body = _Body(
        step=record.step,
        writer=record.writer,
        engine=record.engine,
        world_size=record.world_size,
        created=record.created,
        progress=record.progress,
        tensors={name: _Shape(record.tensors[name].shape, record.tensors[name].dtype) for name in names},
        objects={key: _Object(stored.bytes, stored.checksum, _in_columns(boxes[key])) for key, stored in record.objects.items()},
    )
    content = _BODY.dump_json(body)
    return _HEAD.format(version=FORMAT_VERSION, checksum=_checksum(content)).encode() + content + b"}"


def parse_record(manifest: bytes, *, prefix: str) -> Record:
    """The record that `manifest`, found at `prefix`, describes; CheckpointError says what is wrong with it."""
    content = _check_envelope(manifest)
    try:
        body = _BODY.validate_json(content, strict=True)
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise CheckpointError(f"its {MANIFEST} is wrong at {place}: {error.errors()[0]['msg']}") from error
    return Record(
        step=body.step,
        writer=body.writer,
        engine=body.engine,
        world_size=body.world_size,
        created=body.created,
        progress=body.progress,
        tensors=_stored_tensors(body),
        objects={key: StoredObject(stored.bytes, stored.checksum) for key, stored in body.objects.items()},
        prefix=prefix,
    )


def _in_columns(boxes: list[tuple[int, int, Chunk]]) -> _Boxes:
    """Boxes with their places and the numbers of their tensors, in the order in which they lie."""
    boxes.sort()
    place = 0
    for byte_offset, _, chunk in boxes:
        assert byte_offset == place, "boxes lie one after the other"
        assert chunk.checksum.startswith(_KIND)
        place += chunk.byte_length
    return _Boxes(
        tensors=[number for _, number, _ in boxes],
        offsets=[offset for _, _, chunk in boxes for offset in chunk.offsets],
        lengths=[length for _, _, chunk in boxes for length in chunk.lengths],
        checksums="".join(chunk.checksum.removeprefix(_KIND) for _, _, chunk in boxes),
    )


def _check_envelope(manifest: bytes) -> bytes:
    """What stands under "record", once the version and the checksum are right."""
    head = _HEAD_PATTERN.match(manifest)
    if not (head and int(head[1]) == FORMAT_VERSION and manifest.endswith(b"}")):
        raise CheckpointError(f"its {MANIFEST} {_what_is_wrong(manifest)}")
    content = manifest[head.end() : -1]
    if head[2].decode(errors="replace") != _checksum(content):
        raise CheckpointError(f"its {MANIFEST} does not have the checksum that it states")
    return content


def _what_is_wrong(manifest: bytes) -> str:
    """Why `manifest` is none that this version writes."""
    try:
        content = json.loads(manifest)
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error})"
    version = content.get("format_version") if isinstance(content, dict) else None
    if not isinstance(version, int):
        return "states no format_version"
    if version != FORMAT_VERSION:
        return f"has format_version {version} and this version of Odonata reads {FORMAT_VERSION}; use the version that wrote it"
    return f"has the keys {', '.join(sorted(content))}, or not in the order and the form of its version"


def _stored_tensors(body: _Body) -> dict[str, StoredTensor]:
    """The tensors with their boxes, gathered from all objects; CheckpointError where they do not make sense together."""
    for name, tensor in body.tensors.items():
        if tensor.dtype not in DTYPE_BYTES:
            raise CheckpointError(f"{name} has the type {tensor.dtype}, which this version does not know")
    chunks: dict[str, list[Chunk]] = {name: [] for name in body.tensors}
    for key, stored in body.objects.items():
        if not _OBJECT_NAME.fullmatch(key):
            raise CheckpointError(f"its {MANIFEST} names an object {key!r}, which cannot lie beside it")
        for name, chunk in _chunks_of(key, stored, body.tensors):
            chunks[name].append(chunk)
    for name, tensor in body.tensors.items():
        if sum(math.prod(chunk.lengths) for chunk in chunks[name]) != math.prod(tensor.shape):
            raise CheckpointError(f"{name} is not covered by its chunks")
    return {name: StoredTensor(tensor.shape, tensor.dtype, tuple(sorted(chunks[name]))) for name, tensor in body.tensors.items()}


def _chunks_of(key: str, stored: _Object, tensors: dict[str, _Shape]) -> Iterator[tuple[str, Chunk]]:
    """The boxes in the object `key`, each with the name of its tensor."""
    columns, names = stored.boxes, list(tensors)
    first = place = 0
    for position, number in enumerate(columns.tensors):
        if number >= len(names):
            raise CheckpointError(f"{key} holds a box of a tensor {number}, and there are {len(names)}")
        tensor = tensors[names[number]]
        last = first + len(tensor.shape)
        offsets, lengths = tuple(columns.offsets[first:last]), tuple(columns.lengths[first:last])
        if not _lies_inside(offsets, lengths, tensor.shape):
            raise CheckpointError(f"{names[number]} has a chunk that lies outside of it")
        size = math.prod(lengths) * DTYPE_BYTES[tensor.dtype]
        digits = columns.checksums[position * _DIGITS : (position + 1) * _DIGITS]
        yield names[number], Chunk(offsets, lengths, key, place, size, _KIND + digits)
        first, place = last, place + size
    expected = (place, first, first, len(columns.tensors) * _DIGITS)
    if expected != (stored.bytes, len(columns.offsets), len(columns.lengths), len(columns.checksums)):
        raise CheckpointError(f"{key} is not filled by its boxes, or some column of them is longer than the others")


def _lies_inside(offsets: tuple[int, ...], lengths: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(offsets) == len(lengths) == len(shape) and all(map(_fits, offsets, lengths, shape))


def _fits(offset: int, length: int, size: int) -> bool:
    return offset + length <= size


def _checksum(content: bytes) -> str:
    checksum = Checksum()
    checksum.update(content)
    return str(checksum)
