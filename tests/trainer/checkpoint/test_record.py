"""The manifest: there and back, and every way in which it can be wrong."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from trainer.checkpoint.record import FORMAT_VERSION, Chunk, Record, StoredObject, StoredTensor, dump_record, parse_record
from trainer.errors import CheckpointError
from trainer.store.base import Checksum

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


def with_body(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A manifest whose body was changed before its checksum was taken, as a faulty writer would."""
    body = json.loads(dump_record(RECORD))["record"]
    change(body)
    content = json.dumps(body).encode()
    checksum = Checksum()
    checksum.update(content)
    return f'{{"format_version":{FORMAT_VERSION},"checksum":"{checksum}","record":'.encode() + content + b"}"


def with_boxes(column: str, value: object) -> bytes:
    """RECORD's manifest with another column of boxes in its second object."""
    return with_body(lambda body: body["objects"]["rank-00001.bin"]["boxes"].update({column: value}))


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


@pytest.mark.parametrize("version", [FORMAT_VERSION - 1, FORMAT_VERSION + 1])
def test_another_version_is_refused_by_name_before_anything_else_is_looked_at(version: int) -> None:
    of_another_form = f'{{"format_version": {version}, "shape_of_that_time": []}}'.encode()
    of_our_form = dump_record(RECORD).replace(b'version":%d' % FORMAT_VERSION, b'version":%d' % version)
    for manifest in (of_another_form, of_our_form):
        with pytest.raises(CheckpointError, match=f"format_version {version} and this version of Odonata reads {FORMAT_VERSION}"):
            parse_record(manifest, prefix="")


def test_a_manifest_of_this_version_with_other_keys_is_refused() -> None:
    with pytest.raises(CheckpointError, match="has the keys format_version, more, or not in the order"):
        parse_record(f'{{"more": 1, "format_version": {FORMAT_VERSION}}}'.encode(), prefix="")


def test_a_box_of_many_takes_few_bytes() -> None:
    """A giant encoder on hundreds of ranks has a million boxes."""
    boxes, row = 2000, 64
    chunks = tuple(
        Chunk((number, 0), (1, row), "rank-00000.bin", 4 * row * number, 4 * row, f"crc32:{number:08x}")
        for number in range(boxes)
    )
    weight = StoredTensor((boxes, row), "float32", chunks)
    whole = StoredObject(4 * row * boxes, "crc32:00000000")
    record = replace(RECORD, tensors={"model.weight": weight}, objects={"rank-00000.bin": whole})
    manifest = dump_record(record)
    assert len(manifest) < 30 * boxes
    assert parse_record(manifest, prefix=record.prefix) == record


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
        lambda body: body["tensors"]["model.weight"].update(chunks=[]),
        lambda body: body["objects"]["rank-00000.bin"]["boxes"].pop("lengths"),
        lambda body: body["objects"]["rank-00001.bin"]["boxes"].update(offsets=[-1, 0]),
        lambda body: body["objects"]["rank-00001.bin"]["boxes"].update(lengths=[0, 2]),
    ],
)
def test_a_body_of_another_form_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    with pytest.raises(CheckpointError, match="is wrong at"):
        parse_record(with_body(change), prefix="")


def test_boxes_are_columns_of_their_object() -> None:
    body = json.loads(dump_record(RECORD))["record"]
    assert list(body["tensors"]) == ["model.empty", "model.weight", "optim.weight.step"]
    assert body["objects"]["rank-00001.bin"]["boxes"] == {
        "tensors": [2, 1],
        "offsets": [2, 0],
        "lengths": [1, 2],
        "checksums": "00000003" + "00000002",
    }


@pytest.mark.parametrize(("column", "value"), [("offsets", [3, 0]), ("offsets", [2, 1]), ("offsets", [2]), ("lengths", [2, 2])])
def test_a_box_outside_of_its_tensor_is_refused(column: str, value: list[int]) -> None:
    with pytest.raises(CheckpointError, match=r"model\.weight has a chunk that lies outside"):
        parse_record(with_boxes(column, value), prefix="")


@pytest.mark.parametrize(
    ("column", "value"),
    [("offsets", [2, 0, 0]), ("lengths", [1, 2, 1]), ("lengths", [1, 1]), ("checksums", "00000003"), ("checksums", "0" * 17)],
)
def test_boxes_that_do_not_fill_their_object_are_refused(column: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"rank-00001\.bin is not filled by its boxes"):
        parse_record(with_boxes(column, value), prefix="")


def test_a_box_of_no_tensor_is_refused() -> None:
    with pytest.raises(CheckpointError, match="holds a box of a tensor 3, and there are 3"):
        parse_record(with_boxes("tensors", [2, 3]), prefix="")


def test_a_tensor_that_its_chunks_do_not_cover_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"model\.weight is not covered"):
        parse_record(with_body(lambda body: body["tensors"]["model.weight"].update(shape=[4, 2])), prefix="")


def test_an_unknown_type_is_refused() -> None:
    empty = replace(RECORD.tensors["model.empty"], dtype="float1")
    with pytest.raises(CheckpointError, match="float1"):
        parse_record(dump_record(replace(RECORD, tensors={"model.empty": empty})), prefix="")


@pytest.mark.parametrize("key", ["../../etc/passwd", "/etc/passwd", "..", "a/b", ""])
def test_an_object_elsewhere_is_refused(key: str) -> None:
    with pytest.raises(CheckpointError, match="cannot lie beside it"):
        parse_record(dump_record(replace(RECORD, objects=RECORD.objects | {key: StoredObject(0, "")})), prefix="")
