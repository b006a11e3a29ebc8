"""Building sources: prepared once however many ask, never with the devkit in the process that trains."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.data.dataroot import VERSION, make_tables, write_dataroot
from trainer.config.data import SURROUND_CAMERAS, ClipConfig, NuscenesData, PairConfig
from trainer.data.build import build_source
from trainer.data.columns import HEADER, write_columns
from trainer.data.nuscenes import build_index, index_path, temporary_folder
from trainer.data.pair_source import PAIR_FIELDS
from trainer.errors import DataError

ROOT = Path(__file__).parents[3]


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


LOAD_ALL = """
import sys
import numpy as np
from trainer.config.data import NuscenesData
from trainer.data.build import build_source
from trainer.data.pair_source import PAIR_FIELDS
config = NuscenesData.model_validate_json(sys.argv[1])
for split in ("train", "val"):
    source = build_source(config, split, PAIR_FIELDS, augment=True)
    for index in range(len(source)):
        source.load(index, np.random.default_rng(index))
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"nuscenes", "matplotlib", "sklearn", "pandas", "torch"}, loaded
"""


def test_neither_preparing_nor_loading_imports_the_devkit_into_the_process(data: NuscenesData, tmp_path: Path) -> None:
    fresh = data.model_copy(update={"index_folder": tmp_path})
    finished = run_python(LOAD_ALL, fresh.model_dump_json())
    assert finished.returncode == 0, finished.stderr
    assert index_path(fresh).is_dir()


def test_processes_that_start_together_make_one_index(data: NuscenesData, tmp_path: Path) -> None:
    fresh = data.model_copy(update={"index_folder": tmp_path, "val_split": None})
    build_index(fresh)  # what takes seconds to import; the pairs are left to the racers
    code = LOAD_ALL.replace('("train", "val")', '("train",)')
    racers = [
        subprocess.Popen([sys.executable, "-c", code, fresh.model_dump_json()], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for racer in racers:
        _, errors = racer.communicate(timeout=60)
        assert racer.returncode == 0, errors
    folder = index_path(fresh)
    assert len([path for path in folder.iterdir() if path.name.startswith("pairs-") and path.is_dir()]) == 1
    assert not [path for path in (*folder.iterdir(), *tmp_path.iterdir()) if path.name.startswith(".")]


def test_what_was_half_written_is_made_again(data: NuscenesData, tmp_path: Path) -> None:
    fresh = data.model_copy(update={"index_folder": tmp_path, "val_split": None})
    path = build_index(fresh)
    expected = build_source(fresh, "train", PAIR_FIELDS, augment=True).load(0, np.random.default_rng(0))
    pairs = next(path.glob("pairs-*/candidate.npy"))
    pairs.write_bytes(pairs.read_bytes()[:-4])
    (path / "image_file.npy").unlink()
    again = build_source(fresh, "train", PAIR_FIELDS, augment=True).load(0, np.random.default_rng(0))
    np.testing.assert_array_equal(again["target_images"], expected["target_images"])


def test_train_and_val_have_the_scenes_of_their_splits(data: NuscenesData) -> None:
    train, val = (build_source(data, split, PAIR_FIELDS, augment=False) for split in ("train", "val"))
    assert {train.name(index).split()[0] for index in range(len(train))} == {"scene-0001"}
    assert {val.name(index).split()[0] for index in range(len(val))} == {"scene-0002"}
    both = build_source(data.model_copy(update={"train_split": "all"}), "train", PAIR_FIELDS, augment=False)
    assert len(both) == len(train) + len(val)
    scenes = {int(both.load(index, np.random.default_rng(0))["scene"]) for index in (0, len(both) - 1)}
    assert scenes == {0, 1}


def test_a_config_without_a_validation_split_has_no_validation_source(data: NuscenesData) -> None:
    assert build_source(data.model_copy(update={"val_split": None}), "val", PAIR_FIELDS, augment=False) is None


def test_synthetic_data_is_read_as_nuscenes_is(data: NuscenesData) -> None:
    config = data.model_copy(update={"kind": "synthetic"})
    assert build_source(config, "train", PAIR_FIELDS, augment=False).describe()["kind"] == "synthetic"


def test_an_unknown_split_lists_those_that_are_there(data: NuscenesData) -> None:
    with pytest.raises(
        DataError, match=r"split training .* by data\.train_split .*knows train \(1 scenes\), val \(1 scenes\), all"
    ):
        build_source(data.model_copy(update={"train_split": "training"}), "train", PAIR_FIELDS, augment=False)


def test_an_empty_split_says_which_are_not(data: NuscenesData, tmp_path: Path) -> None:
    root = write_dataroot(tmp_path / "root", make_tables(), {"train": ["scene-0001"], "val": ["scene-9999"]})
    config = data.model_copy(update={"root": root, "index_folder": tmp_path / "index"})
    build_index(config)
    with pytest.raises(DataError, match=r"split val .* none of its scenes is among the 2 .*train \(1 scenes\).* or to null"):
        build_source(config, "val", PAIR_FIELDS, augment=False)


def test_unknown_cameras_are_named_with_those_that_are_there(data: NuscenesData) -> None:
    config = data.model_copy(update={"cameras": ("CAM_FRONT", "CAM_TOP")})
    with pytest.raises(DataError, match=r"asks for CAM_TOP and .* has CAM_BACK, CAM_FRONT, CAM_FRONT_LEFT; set data\.cameras"):
        build_source(config, "train", PAIR_FIELDS, augment=False)
    with pytest.raises(DataError, match="asks for no camera"):
        build_source(data.model_copy(update={"cameras": ()}), "train", PAIR_FIELDS, augment=False)


def test_an_error_in_the_tables_crosses_the_process_as_a_sentence(data: NuscenesData, tmp_path: Path) -> None:
    root = write_dataroot(tmp_path / "root", make_tables(frames=2))
    table = root / VERSION / "sample_data.json"
    table.write_text(json.dumps(json.loads(table.read_text()))[:-1])
    with pytest.raises(DataError, match=r"sample_data\.json .* does not parse"):
        build_source(
            data.model_copy(update={"root": root, "index_folder": tmp_path / "index"}), "train", PAIR_FIELDS, augment=False
        )


def test_an_index_folder_that_cannot_be_written_is_named(data: NuscenesData, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, no folder")
    with pytest.raises(DataError, match=r"was to be written to .*/taken/.* cannot be: .*; set data\.index_folder"):
        build_source(data.model_copy(update={"index_folder": tmp_path / "taken"}), "train", PAIR_FIELDS, augment=False)


def test_one_real_keyframe_without_sweeps_gives_pairs_of_neighbours(keyframe_dataroot: Path, tmp_path: Path) -> None:
    config = NuscenesData(
        root=keyframe_dataroot,
        train_split="all",
        val_split=None,
        index_folder=tmp_path,
        clip=ClipConfig(height_px=90, width_px=160),
        pairs=PairConfig(min_overlap=0.005),
    )
    build_index(config)
    source = build_source(config, "train", PAIR_FIELDS, augment=False)
    assert [source.name(index).split()[-1] for index in range(len(source))] == list(SURROUND_CAMERAS)
    assert source.describe()["pairs_across_cameras"] == 12
    assert source.describe()["pairs_in_time"] == 0
    sample = source.load(0, np.random.default_rng(0))
    assert sample["target_images"].shape == (1, 1, 3, 90, 160)
    assert sample["target_images"].std() > 10


def test_indexes_in_the_temporary_folder_go_when_they_were_not_opened_for_a_month(
    data: NuscenesData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the tables are read by a process of its own
    monkeypatch.setattr(tempfile, "tempdir", None)
    folder, day_s = temporary_folder(), 86_400
    for name, days in (("old", 31), ("used", 29)):
        write_columns(folder / name, {}, {})
        at = time.time() - days * day_s
        os.utime(folder / name / HEADER, (at, at))
    unnamed = data.model_copy(update={"index_folder": None})
    build_source(unnamed, "train", PAIR_FIELDS, augment=False)
    index = index_path(unnamed)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"used", index.name}
    os.utime(index / HEADER, (0, 0))
    build_source(unnamed, "train", PAIR_FIELDS, augment=False)
    assert (index / HEADER).stat().st_mtime > time.time() - day_s
