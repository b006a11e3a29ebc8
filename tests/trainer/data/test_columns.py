"""Columns: whole or not there, mapped and not copied."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from trainer.data.columns import Columns, is_whole, write_columns

ARRAYS = {
    "number": np.arange(1000, dtype=np.int32),
    "pose": np.linspace(0, 1, 48).reshape(3, 4, 4),
    "name": np.array([b"one", b"twelve"]),
    "nothing": np.empty((0, 3, 3)),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_columns(tmp_path / "columns", ARRAYS, {"root": "/data"})
    return tmp_path / "columns"


def test_columns_come_back_as_they_were_and_cannot_be_written(folder: Path) -> None:
    columns = Columns(folder)
    assert columns.header["root"] == "/data"
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(columns[name], array)
        assert columns[name].dtype == array.dtype
    with pytest.raises(ValueError, match="read-only"):
        columns["number"][0] = 1


def test_a_pickle_carries_the_path_and_not_the_data(folder: Path) -> None:
    columns = Columns(folder)
    columns["number"]
    pickled = pickle.dumps(columns)
    assert len(pickled) < ARRAYS["number"].nbytes / 4
    reopened = pickle.loads(pickled)
    assert isinstance(reopened["number"].base, np.memmap), "a copy, not the pages of the file"
    np.testing.assert_array_equal(reopened["pose"], ARRAYS["pose"])


@pytest.mark.parametrize("name", ["header.json", "number.npy", "nothing.npy"])
def test_a_folder_is_not_whole_when_a_file_is_missing_empty_or_cut(folder: Path, name: str) -> None:
    assert is_whole(folder)
    whole = (folder / name).read_bytes()
    for part in (whole[:-10], whole[:5], b""):
        (folder / name).write_bytes(part)
        assert not is_whole(folder)
    (folder / name).unlink()
    assert not is_whole(folder)
    assert not is_whole(folder / "elsewhere")


def test_columns_of_another_shape_than_the_header_says_are_not_whole(folder: Path) -> None:
    np.save(folder / "number.npy", np.arange(999, dtype=np.int32))
    assert not is_whole(folder)


def test_writing_again_replaces_and_leaves_nothing_beside(folder: Path) -> None:
    write_columns(folder, {"other": np.ones(2)}, {})
    assert sorted(path.name for path in folder.iterdir()) == ["header.json", "other.npy"]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_write_that_fails_leaves_what_was_there(folder: Path) -> None:
    with pytest.raises(TypeError):
        write_columns(folder, {"number": np.zeros(3)}, {"unwritable": object()})
    assert list(folder.parent.iterdir()) == [folder]
    np.testing.assert_array_equal(Columns(folder)["number"], ARRAYS["number"])
