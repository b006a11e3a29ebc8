"""Record: a checkpoint's manifest, and its form as JSON.

A checkpoint is a prefix in the store with one object of raw tensor bytes a rank and `manifest.json`, which is put last and
without which nothing is there. The manifest names every object with size and checksum and says where in them each box of each
logical tensor lies: row-major, little-endian, no gaps. It carries a checksum of itself, since a flipped digit can parse. It
does not say where it lies, so a checkpoint may be copied.

    {"format_version": 1, "checksum": "crc32:...", "record": {step, writer, engine, world_size, created, progress, tensors, objects}}

Left to whom: bytes are read and written by `storage`, and which checkpoint counts is decided by `manager`.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError

from trainer.errors import CheckpointError
from trainer.store.base import Checksum

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_OBJECT_NAME = re.compile(r"\w[\w.-]*", re.ASCII)

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

    __pydantic_config__ = ConfigDict(extra="forbid")

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class StoredObject:
    """What an object must look like to be whole."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    bytes: int
    checksum: str


@dataclass(frozen=True)
class Record:
    """A checkpoint: what it holds, where, and how far the run was."""

    __pydantic_config__ = ConfigDict(extra="forbid")

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
    format_version: int = FORMAT_VERSION

    @property
    def bytes(self) -> int:
        """Size of all objects together."""
        return sum(stored.bytes for stored in self.objects.values())


_MANIFEST_OF = TypeAdapter(Record)
_NOT_IN_BODY = {"prefix", "format_version"}


def dump_record(record: Record) -> bytes:
    """The manifest of `record`."""
    body = _MANIFEST_OF.dump_python(record, mode="json", exclude=_NOT_IN_BODY)
    manifest = {"format_version": FORMAT_VERSION, "checksum": _checksum(body), "record": body}
    return json.dumps(manifest, separators=(",", ":")).encode()


def parse_record(manifest: bytes, *, prefix: str) -> Record:
    """The record that `manifest`, found at `prefix`, describes; CheckpointError says what is wrong with it."""
    try:
        content = json.loads(manifest)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its {MANIFEST} is not JSON ({error})") from error
    _check_envelope(content)
    try:
        record = _MANIFEST_OF.validate_json(_canonical(content["record"]), strict=True)
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise CheckpointError(f"its {MANIFEST} is wrong at {place}: {error.errors()[0]['msg']}") from error
    _check_sense(record)
    return replace(record, prefix=prefix)


def _check_envelope(content: Any) -> None:
    if not isinstance(content, dict) or not isinstance(content.get("format_version"), int):
        raise CheckpointError(f"its {MANIFEST} states no format_version")
    if content["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"its {MANIFEST} has format_version {content['format_version']} and this version of Odonata reads {FORMAT_VERSION}; "
            "use the version that wrote it"
        )
    if content.keys() != {"format_version", "checksum", "record"}:
        raise CheckpointError(f"its {MANIFEST} has the keys {', '.join(sorted(content))}")
    if content["checksum"] != _checksum(content["record"]):
        raise CheckpointError(f"its {MANIFEST} does not have the checksum that it states")


def _check_sense(record: Record) -> None:
    for key in record.objects:
        if not _OBJECT_NAME.fullmatch(key):
            raise CheckpointError(f"its {MANIFEST} names an object {key!r}, which cannot lie beside it")
    for name, tensor in record.tensors.items():
        if tensor.dtype not in DTYPE_BYTES:
            raise CheckpointError(f"{name} has the type {tensor.dtype}, which this version does not know")
        if not all(_lies_inside(chunk, tensor, record) for chunk in tensor.chunks):
            raise CheckpointError(f"{name} has a chunk that lies outside of it or of its object")
        if sum(math.prod(chunk.lengths) for chunk in tensor.chunks) != math.prod(tensor.shape):
            raise CheckpointError(f"{name} is not covered by its chunks")


def _lies_inside(chunk: Chunk, tensor: StoredTensor, record: Record) -> bool:
    boxes = list(zip(chunk.offsets, chunk.lengths, tensor.shape, strict=False))
    return (
        len(chunk.offsets) == len(chunk.lengths) == len(tensor.shape)
        and all(offset >= 0 and length > 0 and offset + length <= size for offset, length, size in boxes)
        and chunk.byte_length == math.prod(chunk.lengths) * DTYPE_BYTES[tensor.dtype]
        and chunk.object in record.objects
        and 0 <= chunk.byte_offset <= record.objects[chunk.object].bytes - chunk.byte_length
    )


def _checksum(body: Any) -> str:
    checksum = Checksum()
    checksum.update(_canonical(body))
    return str(checksum)


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
