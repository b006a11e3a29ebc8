"""A file system that is really full: a small one of memory, mounted for the test. Needs root; elsewhere these tests are skipped."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.runs import Runner
from tests.trainer.checkpoint.toy import Trainer, save_now, unequal, whole
from trainer.checkpoint.manager import CheckpointManager, find_one, read_tensors
from trainer.checkpoint.tools import Place, list_checkpoints, verify_checkpoint
from trainer.config.training import CheckpointConfig
from trainer.store.base import Store, StoreError
from trainer.store.open import open_store

KB = 1 << 10


@contextmanager
def small_disk(folder: Path, *, size_mb: int) -> Iterator[Path]:
    """A file system of this size at `folder`."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", folder]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"this user may not mount a file system: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", size_mb=4) as folder:
        yield folder


@pytest.fixture
def disk_for_a_run(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", size_mb=512) as folder:
        yield folder


def leave_free(folder: Path, size_bytes: int) -> Path:
    """Fill the disk but for `size_bytes` with a file."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - size_bytes)
    return filler


def states(store: Store) -> list[str]:
    """Of every checkpoint, when every byte of it has been read."""
    return [verify_checkpoint(store, found, lambda count: None).state for found in list_checkpoints(Place(store))]


@pytest.mark.parametrize("free", [0, 4 * KB, 24 * KB])
def test_a_full_disk_harms_neither_the_older_checkpoint_nor_the_state(disk: Path, free: int) -> None:
    store = open_store(disk / "run")
    trainer = Trainer(0)
    trainer.train(range(3))
    manager = CheckpointManager(store, CheckpointConfig(keep_last=1))
    older = save_now(manager, 3, trainer.state())
    before, listed = whole(trainer.state()), store.list("checkpoints")
    assert older.bytes > free
    filler = leave_free(disk, free)
    with pytest.raises(StoreError, match=r"No space left on device; mend that \(space, quota, mount\)") as caught:
        save_now(manager, 4, trainer.state())
    assert caught.value.exit_code == 75
    assert unequal(whole(trainer.state()), before) == []
    assert store.list("checkpoints") == listed
    assert manager.newest() == older
    assert unequal(read_tensors(store, older), before) == []
    filler.unlink()
    assert save_now(manager, 4, trainer.state()).step == 4


@pytest.mark.slow
def test_a_run_on_a_full_disk_ends_with_a_sentence_and_goes_on_when_there_is_room(disk_for_a_run: Path, runner: Runner) -> None:
    uri, often = f"run.uri={disk_for_a_run / 'run'}", ("checkpoint.every_steps=2", "checkpoint.max_failed_saves=1")
    runner.run("room", uri, *often, "steps=2")
    store = open_store(disk_for_a_run / "run")
    first = find_one(store)
    filler = leave_free(disk_for_a_run, first.bytes // 2)
    ended = runner.finish("full", runner.start("full", uri, *often, "steps=6"))
    assert ended.returncode == 75, ended.output[-3000:]
    assert "No space left on device; mend that (space, quota, mount) and start the same job again" in ended.output
    assert "Traceback" not in ended.output
    assert states(store) == ["whole"]
    assert find_one(store) == first
    filler.unlink()
    runner.run("room again", uri, *often, "steps=6")
    assert find_one(store).step == 6
