"""The manifest: there and back, and every way in which it can be wrong."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from trainer.checkpoint.record import Chunk, Record, StoredObject, StoredTensor, dump_record, parse_record
from trainer.errors import CheckpointError

RECORD = Record(
    step=40,
    writer=1,
    engine="fsdp2",
    world_size=2,
    created="2026-05-09T07:35:25+00:00",
    progress={"step": 40, "skipped_steps": 1},
    tensors={
        "model.weight": StoredTensor(
            shape=(3, 2),
            dtype="bfloat16",
            chunks=(
                Chunk((0, 0), (2, 2), "rank-00000.bin", 0, 8, "crc32:00000001"),
                Chunk((2, 0), (1, 2), "rank-00001.bin", 4, 4, "crc32:00000002"),
            ),
        ),
        "optim.weight.step": StoredTensor((), "float32", (Chunk((), (), "rank-00001.bin", 0, 4, "crc32:00000003"),)),
        "model.empty": StoredTensor((0, 4), "float32", ()),
    },
    objects={"rank-00000.bin": StoredObject(8, "crc32:0000000a"), "rank-00001.bin": StoredObject(8, "crc32:0000000b")},
    prefix="checkpoints/step-00000040-ab/",
)


def with_chunk(**changes: Any) -> Record:
    """RECORD, with the second chunk of its weight changed."""
    weight = RECORD.tensors["model.weight"]
    chunks = (weight.chunks[0], weight.chunks[1]._replace(**changes))
    return replace(RECORD, tensors=RECORD.tensors | {"model.weight": replace(weight, chunks=chunks)})


def with_body(change: Callable[[dict[str, Any]], None]) -> bytes:
    """A manifest whose body was changed before its checksum was taken, as a faulty writer would."""
    from trainer.checkpoint import record as module

    content = json.loads(dump_record(RECORD))
    change(content["record"])
    content["checksum"] = module._checksum(content["record"])
    return json.dumps(content).encode()


def test_a_record_survives_its_manifest() -> None:
    assert parse_record(dump_record(RECORD), prefix=RECORD.prefix) == RECORD


def test_a_manifest_does_not_say_where_it_lies() -> None:
    assert parse_record(dump_record(RECORD), prefix="elsewhere/").prefix == "elsewhere/"
    assert b"step-00000040-ab" not in dump_record(RECORD)


def test_the_size_of_a_record_is_that_of_its_objects() -> None:
    assert RECORD.bytes == 8 + 8


@pytest.mark.parametrize("manifest", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_not_json_is_refused(manifest: bytes) -> None:
    with pytest.raises(CheckpointError, match="is not JSON"):
        parse_record(manifest, prefix="")


@pytest.mark.parametrize("manifest", [b"[]", b"{}", b'{"format_version": "1"}'])
def test_a_manifest_without_a_version_is_refused(manifest: bytes) -> None:
    with pytest.raises(CheckpointError, match="states no format_version"):
        parse_record(manifest, prefix="")


def test_a_future_version_is_refused_by_name_before_anything_else_is_looked_at() -> None:
    with pytest.raises(CheckpointError, match="format_version 2 and this version of Odonata reads 1"):
        parse_record(b'{"format_version": 2, "shape_of_the_future": []}', prefix="")


def test_no_byte_of_a_manifest_can_change_unnoticed() -> None:
    manifest = dump_record(RECORD)
    for place in range(len(manifest)):
        for bit in (0, 4):
            flipped = bytearray(manifest)
            flipped[place] ^= 1 << bit
            with pytest.raises(CheckpointError):
                parse_record(bytes(flipped), prefix="")


def test_a_truncated_manifest_is_refused() -> None:
    manifest = dump_record(RECORD)
    for length in range(len(manifest)):
        with pytest.raises(CheckpointError):
            parse_record(manifest[:length], prefix="")


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(extra=1),
        lambda body: body.pop("engine"),
        lambda body: body.update(step="40"),
        lambda body: body["progress"].update(step=0.5),
        lambda body: body["objects"]["rank-00000.bin"].update(extra=1),
        lambda body: body["tensors"]["model.weight"]["chunks"][0].pop(),
    ],
)
def test_a_body_of_another_form_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    with pytest.raises(CheckpointError, match="is wrong at"):
        parse_record(with_body(change), prefix="")


@pytest.mark.parametrize(
    "changes",
    [
        {"offsets": (3, 0)},
        {"offsets": (-1, 0)},
        {"offsets": (2,)},
        {"lengths": (1, 2, 1)},
        {"object": "rank-00007.bin"},
        {"byte_offset": 5},
        {"byte_offset": -1},
        {"byte_length": 5},
    ],
)
def test_a_chunk_outside_of_its_tensor_or_object_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"model\.weight has a chunk that lies outside"):
        parse_record(dump_record(with_chunk(**changes)), prefix="")


def test_a_tensor_that_its_chunks_do_not_cover_is_refused() -> None:
    weight = replace(RECORD.tensors["model.weight"], chunks=RECORD.tensors["model.weight"].chunks[:1])
    with pytest.raises(CheckpointError, match="not covered"):
        parse_record(dump_record(replace(RECORD, tensors={"model.weight": weight})), prefix="")


def test_an_unknown_type_is_refused() -> None:
    empty = replace(RECORD.tensors["model.empty"], dtype="float1")
    with pytest.raises(CheckpointError, match="float1"):
        parse_record(dump_record(replace(RECORD, tensors={"model.empty": empty})), prefix="")


@pytest.mark.parametrize("key", ["../../etc/passwd", "/etc/passwd", "..", "a/b", ""])
def test_an_object_elsewhere_is_refused(key: str) -> None:
    with pytest.raises(CheckpointError, match="cannot lie beside it"):
        parse_record(dump_record(replace(RECORD, objects=RECORD.objects | {key: StoredObject(0, "")})), prefix="")
