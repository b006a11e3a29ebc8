"""Weights & Biases without its server: our figures are in the file that an offline run leaves for `wandb sync`.

wandb has no reader of its own for it. It is a log in LevelDB's format (google/leveldb, doc/log_format.md) after a header of seven bytes:
blocks of 32 KiB with fragments of protobuf records, each after its checksum, length and kind.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("wandb", reason="the extra `wandb` is not installed")

from wandb.proto import wandb_internal_pb2

from tests.trainer.observe_fakes import report, sheets
from trainer.config.training import WandbConfig
from trainer.observe.weights_and_biases import WeightsAndBiases, keep_id
from trainer.store.open import open_store

BLOCK, HEADER = 32768, 7
WHOLE, LAST = 1, 4
OFFLINE = WandbConfig(project="odonata", mode="offline")


def records(folder: Path) -> Iterator[Any]:
    """What an offline run has written, in its order."""
    [path] = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, place, gathered = path.read_bytes(), 7, b""
    while place < len(data):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        gathered += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(gathered)
            gathered = b""
            yield record


def history(folder: Path) -> list[dict[str, Any]]:
    """Each step's figures by name."""
    steps = [record.history for record in records(folder) if record.WhichOneof("record_type") == "history"]
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in step.item} for step in steps]


def test_an_offline_run_keeps_figures_pictures_and_config(tmp_path: Path) -> None:
    observer = WeightsAndBiases(OFFLINE, open_store(tmp_path), {"steps": 4}, every_steps=2)
    for step in (1, 2, 3, 4):
        observer.step(report(step, loss=1 / step))
    observer.evaluation(4, {"croco/true": 0.125}, seconds=0.5)
    observer.pictures(4, sheets())
    observer.close()
    observer.close()
    steps = history(tmp_path)
    assert [(step["_step"], step["train/loss"]) for step in steps if "train/loss" in step] == [(2, 0.5), (4, 0.25)]
    assert steps[-1]["held_out/croco/true"] == 0.125
    assert list((tmp_path / "wandb").rglob("*.png"))
    [run] = [record.run for record in records(tmp_path) if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("odonata", tmp_path.name)
    assert {each.key: json.loads(each.value_json) for each in run.config.update}["steps"] == 4


def test_every_start_of_a_run_has_the_same_page(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    drawn = keep_id(store)
    assert drawn
    assert keep_id(store) == drawn
    assert keep_id(open_store(tmp_path / "another")) != drawn
