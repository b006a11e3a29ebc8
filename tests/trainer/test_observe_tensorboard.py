"""TensorBoard's files, read back by TensorBoard: curves and sheets are there, also after a resume and in a store that is no folder."""

from pathlib import Path

import pytest

pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.s3_server import S3Server
from tests.trainer.observe_fakes import Saved, report, sheets
from trainer.observe.curves import list_figures
from trainer.observe.tensorboard import TensorBoard
from trainer.store.open import open_store


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_curves_and_sheets_are_read_back(tmp_path: Path) -> None:
    board = TensorBoard(open_store(tmp_path), resumed_at=0, every_steps=2)
    for step in (1, 2, 3, 4):
        board.step(report(step, loss=1 / step))
    board.evaluation(4, {"croco/true": 0.25}, seconds=0.5)
    board.pictures(4, sheets())
    board.close()
    events = read(tmp_path / "tensorboard")
    assert [(each.step, each.value) for each in events.Scalars("train/loss")] == [(2, 0.5), (4, 0.25)]
    assert [each.value for each in events.Scalars("held_out/croco/true")] == [0.25]
    assert set(events.Tags()["scalars"]) == {*list_figures(report()), "held_out/croco/true"}
    [picture] = events.Images("pictures/croco")
    assert picture.step == 4
    assert picture.encoded_image_string.startswith(b"\x89PNG")


def test_a_resume_hides_the_steps_that_it_makes_again(tmp_path: Path) -> None:
    first = TensorBoard(open_store(tmp_path), resumed_at=0, every_steps=1)
    for step in (1, 2, 3):
        first.step(report(step, loss=9.0))
    first.close()
    second = TensorBoard(open_store(tmp_path), resumed_at=2, every_steps=1)
    second.step(report(3, loss=1.0))
    second.close()
    steps = [(each.step, each.value) for each in read(tmp_path / "tensorboard").Scalars("train/loss")]
    assert steps == [(1, 9.0), (2, 9.0), (3, 1.0)]


def test_a_store_that_is_no_folder_gets_the_file_with_each_checkpoint(
    s3_server: S3Server, s3_owner: None, tmp_path: Path
) -> None:
    store = open_store(f"s3://{s3_server.bucket}/board", s3_server.config())
    board = TensorBoard(store, resumed_at=0, every_steps=1)
    board.step(report(1, loss=0.5))
    board.checkpoint(Saved())
    [info] = store.list("tensorboard")
    board.step(report(2, loss=0.25))
    board.close()
    (tmp_path / Path(info.key).name).write_bytes(store.get(info.key))
    assert [each.value for each in read(tmp_path).Scalars("train/loss")] == [0.5, 0.25]
