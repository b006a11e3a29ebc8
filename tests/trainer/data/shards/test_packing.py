"""Packing: plain tars with every file byte for byte, that go on after a kill, grow, and tell of damage."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.trainer.packed import packed
from trainer.config.data import NuscenesData
from trainer.data.build import build_source
from trainer.data.shards import packing
from trainer.data.shards.abandoned import remove_abandoned
from trainer.data.shards.layout import KINDS, Pack, Version, commit_version, read_version
from trainer.data.shards.mending import mend
from trainer.data.shards.packing import Group, find_new_drives, pack, pack_group
from trainer.data.shards.recording import NO_SWEEPS, Drive, Images, NuscenesRecording
from trainer.data.shards.verifying import raise_if_damaged, verify
from trainer.data.surround_source import CAMERA_FIELDS, LIDAR_FIELDS
from trainer.errors import DataError
from trainer.store.base import Store
from trainer.store.local import LocalStore


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_shards_are_plain_tars_with_every_file_byte_for_byte(
    city: Path, packed_folder: Path, recording: NuscenesRecording
) -> None:
    unpacked: dict[str, bytes] = {}
    for shard in (packed_folder / "shards").iterdir():
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                unpacked[member.name] = file.read()
    wanted = {}
    for drive in recording.drives():
        described = recording.read_drive(drive)
        for captures in (described.images, described.sweeps):
            for sensor, name in zip(captures.sensor, captures.file, strict=True):
                wanted[f"{drive}/{sensor}/{Path(name).name}"] = (city / name).read_bytes()
    assert {name: data for name, data in unpacked.items() if not name.endswith("drive.json")} == wanted


def test_each_drive_brings_its_calibration_and_poses(packed_folder: Path, recording: NuscenesRecording) -> None:
    shard = min((packed_folder / "shards").glob("*.camera-key.tar"))
    with tarfile.open(shard) as tar:
        drive = recording.drives()[0]
        file = tar.extractfile(f"{drive}/drive.json")
        assert file is not None
        first = json.load(file)["files"][0]
    images = recording.read_drive(drive).images
    row = [Path(name).name for name in images.file].index(Path(first["file"]).name)
    np.testing.assert_array_equal(first["world_from_ego"], images.world_from_ego[row])
    np.testing.assert_array_equal(first["pix_from_cam"], images.pix_from_cam[row])


def test_the_index_says_where_every_file_lies(packed_folder: Path, city: Path) -> None:
    for table in ("images", "sweeps"):
        for row in pq.read_table(next(packed_folder.rglob(f"{table}.parquet"))).to_pylist()[::7]:
            with (packed_folder / row["shard"]).open("rb") as shard:
                shard.seek(row["offset"])
                assert shard.read(row["bytes"]) == (city / row["file"]).read_bytes()


def test_packing_again_gives_the_same_bytes(recording: NuscenesRecording, packed_folder: Path, tmp_path: Path) -> None:
    pack(recording, str(tmp_path / "again"), drives_per_shard=2, workers=2)
    first, again = files_of(packed_folder), files_of(tmp_path / "again")
    assert first.keys() == again.keys()
    shards = [name for name in first if name.startswith("shards/")]
    assert len(shards) == 2 * len(KINDS)
    assert all(first[name] == again[name] for name in shards)


def test_packing_the_same_again_into_it_changes_nothing(recording: NuscenesRecording, packed_folder: Path) -> None:
    before = files_of(packed_folder)
    report = pack(recording, str(packed_folder), workers=1)
    assert (report.drives, report.known, report.version) == (0, 3, 1)
    assert files_of(packed_folder) == before


@dataclass(frozen=True)
class Some:
    """A recording with some of its drives."""

    whole: NuscenesRecording
    names: tuple[str, ...]
    name: str = "some"

    def drives(self) -> tuple[str, ...]:
        return self.names

    def read_drive(self, drive: str) -> Drive:
        return self.whole.read_drive(drive)

    def read_file(self, file: str) -> bytes:
        return self.whole.read_file(file)


def test_a_data_set_grows_by_versions_and_nothing_is_written_twice(
    recording: NuscenesRecording, loose: NuscenesData, tmp_path: Path
) -> None:
    uri = str(tmp_path / "growing")
    first, _, third = recording.drives()
    pack(Some(recording, (first, third)), uri, workers=1)
    before = files_of(tmp_path / "growing")
    report = pack(recording, uri, workers=1)
    assert (report.version, report.drives, report.known) == (2, 1, 2)
    after = files_of(tmp_path / "growing")
    assert before.items() <= after.items()
    store = LocalStore(tmp_path / "growing")
    assert [len(read_version(store, number).packs) for number in (1, 2)] == [1, 2]
    config = packed(uri, loose)
    newest, oldest = (
        build_source(
            config.model_copy(update={"datasets": (config.datasets[0].model_copy(update={"version": number}),)}),
            "train",
            CAMERA_FIELDS,
            augment=False,
        )
        for number in (None, 1)
    )
    assert newest is not None and oldest is not None
    assert len(newest) > len(oldest)
    assert [newest.name(number) for number in range(len(oldest))] == [oldest.name(number) for number in range(len(oldest))]


def test_two_packings_at_once_make_two_versions_and_pack_nothing_twice(
    recording: NuscenesRecording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = recording.drives()
    uri, packed_shards = str(tmp_path), []

    def commit_late(store: Store, version: Version) -> None:
        monkeypatch.undo()
        packed_shards.extend(tmp_path.glob("shards/*"))
        pack(Some(recording, (first,), "other"), uri, workers=1)  # the other one is faster
        commit_version(store, version)

    monkeypatch.setattr(packing, "commit_version", commit_late)
    slow = Some(recording, (second,), "slow")
    with pytest.raises(DataError, match="start the same command again"):
        pack(slow, uri, workers=1)
    times = {path: path.stat().st_mtime_ns for path in packed_shards}
    assert pack(slow, uri, workers=1).version == 2
    assert times and {path: path.stat().st_mtime_ns for path in times} == times
    store = LocalStore(tmp_path)
    assert [pack.source for pack in read_version(store).packs] == ["other", "slow"]
    assert verify(store, read_version(store)) == []


def test_a_prefix_tells_the_scenes_of_two_data_sets_apart(recording: NuscenesRecording, tmp_path: Path) -> None:
    first = recording.drives()[0]
    pack(Some(recording, (first,)), str(tmp_path), workers=1)
    prefixed = replace(recording, prefix="berlin-")
    assert pack(Some(prefixed, (f"berlin-{first}",)), str(tmp_path), workers=1).drives == 1
    store = LocalStore(tmp_path)
    assert verify(store, read_version(store)) == []


def test_another_drive_of_a_known_name_is_refused(recording: NuscenesRecording, packed_folder: Path) -> None:
    @dataclass(frozen=True)
    class Moved(Some):
        def read_drive(self, drive: str) -> Drive:
            known = self.whole.read_drive(drive)
            return replace(known, images=replace(known.images, world_from_ego=known.images.world_from_ego + 1.0))

    store = LocalStore(packed_folder)
    with pytest.raises(DataError, match="holds a drive of that name with other files"):
        find_new_drives(Moved(recording, tuple(recording.drives())), store, read_version(store))


def test_a_file_that_cannot_be_read_stops_the_packing_and_leaves_no_version(recording: NuscenesRecording, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Torn(Some):
        def read_file(self, file: str) -> bytes:
            if "CAM_BACK" in file:
                raise FileNotFoundError(2, "No such file or directory", file)
            return self.whole.read_file(file)

    group = Group("p", 0, tuple(recording.drives()))
    with pytest.raises(DataError, match=r"CAM_BACK.* of some was to be packed and cannot be read: No such file"):
        pack_group(Torn(recording, group.drives), group, str(tmp_path / "torn"), None)
    assert not (tmp_path / "torn" / "versions").exists()


def test_a_killed_packing_goes_on_and_ends_with_the_same_data(
    city: Path, loose: NuscenesData, recording: NuscenesRecording, tmp_path: Path
) -> None:
    uri = tmp_path / "killed"
    command = [sys.executable, "-m", "odonata", "pack", str(city), str(uri), "--drives-per-shard", "1", "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(uri.glob("packing/*/*/done.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr and process.stderr.read()
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()  # alone: its workers have to notice
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    finished = {path: path.stat().st_mtime_ns for path in uri.glob("shards/*") if not path.name.startswith(".")}
    assert not (uri / "versions").exists()
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "packed already" in result.stderr
    kept = [path for path, mtime in finished.items() if path.stat().st_mtime_ns == mtime]
    assert len(kept) >= 1
    store = LocalStore(uri)
    assert verify(store, read_version(store)) == []
    assert not (uri / "packing").exists() or not files_of(uri / "packing")


def test_verify_names_the_files_that_are_lost(recording: NuscenesRecording, tmp_path: Path) -> None:
    pack(Some(recording, (recording.drives()[0],)), str(tmp_path), workers=1)
    store = LocalStore(tmp_path)
    version = read_version(store)
    assert verify(store, version) == []
    row = pq.read_table(next(tmp_path.rglob("images.parquet"))).to_pylist()[3]
    path = tmp_path / row["shard"]
    data = bytearray(path.read_bytes())
    data[row["offset"] + 10] ^= 4
    path.write_bytes(data)
    (damage,) = verify(store, version)
    assert damage.files == (f"{row['drive']}: {row['file']}",)
    next(tmp_path.glob("shards/*lidar-key*")).unlink()
    damaged = verify(store, version)
    assert len(damaged) == 2
    with pytest.raises(DataError, match="objects are damaged: 2"):
        raise_if_damaged(store, version, damaged)


def damage(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def test_damaged_shards_are_written_anew_byte_for_byte_and_whole_ones_are_left(
    recording: NuscenesRecording, packed_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(packed_folder, tmp_path / "packed")
    whole = files_of(tmp_path / "packed")
    shards = sorted((tmp_path / "packed" / "shards").iterdir())
    damage(shards[0], 5000)
    shards[-1].unlink()
    untouched = shards[1].stat().st_mtime_ns
    store = LocalStore(tmp_path / "packed")
    version = read_version(store)
    assert mend(recording, store, version, verify(store, version)) == []
    assert files_of(tmp_path / "packed") == whole
    assert shards[1].stat().st_mtime_ns == untouched


@dataclass(frozen=True)
class Other(Some):
    """The same drives, with other bytes in their files."""

    def read_file(self, file: str) -> bytes:
        return super().read_file(file) + b" "


def test_what_cannot_be_mended_stays_as_it_is_and_says_why(
    recording: NuscenesRecording, packed_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(packed_folder, tmp_path / "packed")
    shard = min((tmp_path / "packed" / "shards").iterdir())
    damage(shard, 5000)
    damaged_bytes, store = shard.read_bytes(), LocalStore(tmp_path / "packed")
    version = read_version(store)
    damaged = verify(store, version)
    (other,) = mend(Other(recording, tuple(recording.drives())), store, version, damaged)
    assert "has other files by now" in other.reason
    (fewer,) = mend(Some(recording, ()), store, version, damaged)
    assert "does not have its drive" in fewer.reason
    assert shard.read_bytes() == damaged_bytes
    damage(next((tmp_path / "packed").rglob("images.parquet")), 50)
    left = mend(recording, store, version, verify(store, version))
    assert len(left) == 2 and all("cannot be mended: packs/" in each.reason for each in left)


def abandon(folder: Path, pack: str, *, days: float) -> list[Path]:
    """What a packing leaves that was killed so many days ago."""
    at = (datetime.now(UTC) - timedelta(days=days)).isoformat()
    files = {
        f"packing/{pack}/alive.json": json.dumps({"at": at}),
        f"packing/{pack}/00000/done.json": "{}",
        f"packs/{pack}/images.parquet": "rows",
        f"shards/{pack}-00000.camera-key.tar": "shard",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return [folder / name for name in files]


def test_the_next_packing_removes_what_an_abandoned_one_has_left_and_nothing_else(
    recording: NuscenesRecording, packed_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(packed_folder, tmp_path, dirs_exist_ok=True)
    store = LocalStore(tmp_path)
    version = read_version(store)
    (listed,) = version.packs
    kept = files_of(tmp_path)
    abandoned = abandon(tmp_path, "0123", days=7.1)
    running = [*abandon(tmp_path, "01234", days=6.9), *abandon(tmp_path, "silent", days=30)]
    (tmp_path / "packing/silent/alive.json").unlink()
    (tmp_path / f"packing/{listed.name}").mkdir()
    (tmp_path / f"packing/{listed.name}/alive.json").write_text(json.dumps({"at": "2020-01-01T00:00:00+00:00"}))
    remove_abandoned(store, version)
    assert not any(path.exists() for path in abandoned)
    assert all(path.exists() for path in running if path.parts[-2:] != ("silent", "alive.json"))
    assert kept.items() <= files_of(tmp_path).items()


def test_a_packing_says_that_it_is_alive_while_it_runs(recording: NuscenesRecording, tmp_path: Path) -> None:
    seen = []

    def look(done: int, total: int) -> None:
        del done, total
        seen.append(len(list(tmp_path.glob("packing/*/alive.json"))))

    pack(Some(recording, (recording.drives()[0],)), str(tmp_path), workers=1, advance=look)
    assert set(seen) == {1} and not list(tmp_path.glob("packing/*/*"))


def test_a_version_does_not_appear_while_a_shard_of_it_is_gone(
    recording: NuscenesRecording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = packing.join_groups

    def join_and_lose(store: Store, source: str, groups: Sequence[Group]) -> Pack:
        added = joined(store, source, groups)
        store.delete(added.shards[0].key)
        return added

    monkeypatch.setattr(packing, "join_groups", join_and_lose)
    with pytest.raises(DataError, match="and it is missing"):
        pack(Some(recording, (recording.drives()[0],)), str(tmp_path), workers=1)
    assert not list(tmp_path.glob("versions/*"))


@dataclass(frozen=True)
class FiveCameras:
    """Another rig as its own adapter: five cameras that fire at once, no LiDAR, pictures from memory."""

    jpeg: bytes
    name: str = "five"

    def drives(self) -> tuple[str, ...]:
        return ("one", "two")

    def read_drive(self, drive: str) -> Drive:
        cameras, instants = 5, 4
        count = cameras * instants
        poses = np.tile(np.eye(4), (count, 1, 1))
        poses[:, 0, 3] = np.repeat(np.arange(instants), cameras)
        images = Images(
            sensor=tuple(f"camera {number % cameras}" for number in range(count)),
            file=tuple(f"{drive}/{number}.jpg" for number in range(count)),
            timestamp_us=np.repeat(np.arange(instants) * 100_000, cameras),
            is_key_frame=np.ones(count, dtype=bool),
            ego_from_sensor=np.tile(np.eye(4), (count, 1, 1)),
            world_from_ego=poses,
            pix_from_cam=np.tile(np.array([[30.0, 0, 32], [0, 30, 18], [0, 0, 1]]), (count, 1, 1)),
            size_px=np.tile([64, 36], (count, 1)),
        )
        return Drive(drive, ("train",), images, NO_SWEEPS)

    def read_file(self, file: str) -> bytes:
        return self.jpeg


def test_a_rig_of_five_cameras_without_lidar_is_packed_by_its_own_adapter(loose: NuscenesData, tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (64, 36), (10, 200, 30)).save(picture, "JPEG")
    recording = FiveCameras(picture.getvalue())
    pack(recording, str(tmp_path), workers=1)
    names = tuple(f"camera {number}" for number in range(5))
    config = packed(tmp_path, loose, cameras=names, val_split=None)
    clip = config.clip.model_copy(update={"spacing_s": 0.1})
    source = build_source(config.model_copy(update={"clip": clip}), "train", CAMERA_FIELDS, augment=False)
    assert source is not None and source.offers == CAMERA_FIELDS and len(source) == 2 * 3
    images = source.load(0, np.random.default_rng(0))["images"]
    assert images.shape == (2, 5, 3, 32, 64) and abs(int(images[0, 0, 1].mean()) - 200) < 5
    with pytest.raises(DataError, match="has no LiDAR"):
        build_source(config.model_copy(update={"clip": clip}), "train", CAMERA_FIELDS | LIDAR_FIELDS, augment=False)
