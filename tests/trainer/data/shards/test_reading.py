"""Training from shards: the same samples as from the dataroot, few bytes beside those that are used, and damage that costs little."""

import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.s3_server import S3Server, forget_clients
from tests.trainer.packed import packed
from trainer.config.data import CacheConfig, DatasetConfig, NuscenesData, ShardsData
from trainer.config.store import StoreConfig
from trainer.data.build import build_source
from trainer.data.mixed_source import MixedSource, portions_of
from trainer.data.order import Order
from trainer.data.pair_source import PAIR_FIELDS
from trainer.data.shards.reading import ShardFiles, Span, join_spans
from trainer.data.source import Source
from trainer.data.surround_source import CAMERA_FIELDS, LIDAR_FIELDS, SurroundSource
from trainer.errors import ClipError, ConfigError, DataError
from trainer.store.base import StoreError
from trainer.store.local import LocalStore

ALL = PAIR_FIELDS | CAMERA_FIELDS | LIDAR_FIELDS
SURROUND = CAMERA_FIELDS | LIDAR_FIELDS
BLOCK = 2048


def source_of(config: NuscenesData | ShardsData, needs: frozenset[str] = ALL) -> Source:
    source = build_source(config, "train", needs, augment=True)
    assert source is not None
    return source


def assert_same_samples(one: Source, other: Source, *, samples: int) -> None:
    assert len(one) == len(other) > 0
    for number in range(0, len(one), max(1, len(one) // samples)):
        assert one.name(number) == other.name(number)
        first, second = one.load(number, np.random.default_rng(number)), other.load(number, np.random.default_rng(number))
        assert first.keys() == second.keys()
        for field in first:
            np.testing.assert_array_equal(first[field], second[field], err_msg=f"{one.name(number)} {field}")


def surround(config: ShardsData) -> tuple[SurroundSource, ShardFiles]:
    source = source_of(config, SURROUND)
    assert isinstance(source, SurroundSource) and isinstance(source.index.files, ShardFiles)
    return source, source.index.files


def test_samples_from_shards_are_those_of_the_dataroot(loose: NuscenesData, packed_folder: Path) -> None:
    assert_same_samples(source_of(loose), source_of(packed(packed_folder, loose)), samples=12)


def test_samples_from_s3_are_those_of_the_dataroot(loose: NuscenesData, packed_s3: str, s3_server: S3Server) -> None:
    assert_same_samples(source_of(loose), source_of(packed(packed_s3, loose, s3_server.config())), samples=6)


def test_sources_travel_to_workers_as_a_path(loose: NuscenesData, packed_folder: Path) -> None:
    source = source_of(packed(packed_folder, loose), SURROUND)
    carried = pickle.dumps(source)
    assert len(carried) < 10_000
    assert_same_samples(source, pickle.loads(carried), samples=2)


def test_a_clip_of_all_cameras_is_one_range_and_its_sweeps_another(loose: NuscenesData, packed_folder: Path) -> None:
    source, files = surround(packed(packed_folder, loose))
    for number in range(len(source)):
        rows = source.clips["clip_images"][number].reshape(-1)
        if not source.index.is_key_frame(rows).all():
            continue
        (images,) = files.plan_images(rows)
        assert images.bytes <= source.index.columns["image_bytes"][rows].sum() + 1536 * len(rows)
        (sweeps,) = files.plan_sweeps(source.clips["clip_sweeps"][number])
        assert sweeps.bytes <= 1.01 * source.index.columns["sweep_bytes"][source.clips["clip_sweeps"][number]].sum()


@pytest.mark.parametrize("cameras", [("CAM_FRONT",), ("CAM_FRONT", "CAM_BACK"), ("CAM_FRONT", "CAM_FRONT_LEFT", "CAM_BACK")])
def test_a_few_cameras_fetch_little_of_the_others(loose: NuscenesData, packed_folder: Path, cameras: tuple[str, ...]) -> None:
    source, files = surround(packed(packed_folder, loose, cameras=cameras))
    rows = source.clips["clip_images"][0].reshape(-1)
    useful = source.index.columns["image_bytes"][rows].sum()
    assert useful <= sum(span.bytes for span in files.plan_images(rows)) <= 1.25 * useful


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60), st.integers(1, 9)), min_size=1, max_size=20))
def test_joined_ranges_hold_every_file_and_waste_at_most_a_quarter(places: list[tuple[int, int, int]]) -> None:
    taken: set[tuple[int, int]] = set()
    spans = []
    for shard, first, count in places:
        inside = {(shard, block) for block in range(first, first + count)}
        if not inside & taken:
            taken |= inside
            spans.append(Span(shard, first * BLOCK, count * BLOCK))
    joined = join_spans(spans)
    assert all(any(j.shard == s.shard and j.offset <= s.offset and s.end <= j.end for j in joined) for s in spans)
    assert len(taken) <= sum(span.bytes for span in joined) / BLOCK <= 1.25 * len(taken)


def test_as_many_gaps_are_closed_as_the_waste_allows() -> None:
    big = 100 * BLOCK
    apart = [Span(0, 0, big), Span(0, big + 10 * BLOCK, big), Span(0, 3 * big, big), Span(1, 4 * big, big)]
    assert join_spans(apart) == [Span(0, 0, 4 * big), Span(1, 4 * big, big)]
    assert join_spans([*apart[:2], Span(0, 4 * big, BLOCK)]) == [Span(0, 0, 2 * big + 10 * BLOCK), Span(0, 4 * big, BLOCK)]


def test_what_a_tar_leaves_between_two_small_files_is_worth_no_request() -> None:
    assert join_spans([Span(0, 512, 10), Span(0, 1536, 10)]) == [Span(0, 512, 1034)]


@pytest.fixture
def own_copy(packed_folder: Path, tmp_path: Path) -> Path:
    """A copy of the packed city that a test may damage."""
    return Path(shutil.copytree(packed_folder, tmp_path / "city"))


def shard(folder: Path, kind: str) -> Path:
    return min((folder / "shards").glob(f"*.{kind}.tar"))


def outcomes(source: Source) -> Iterator[str]:
    for number in range(len(source)):
        try:
            source.load(number, np.random.default_rng(0))
        except ClipError as error:
            yield str(error)


def test_a_flipped_byte_costs_the_clips_it_lies_in_and_no_others(loose: NuscenesData, own_copy: Path) -> None:
    source, _ = surround(packed(own_copy, loose))
    row = int(source.clips["clip_images"][0, 0, 0])
    offset = int(source.index.columns["image_offset"][row]) + 100
    path = own_copy / source.index.columns["shard_key"][source.index.columns["image_shard"][row]].decode()
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    broken = list(outcomes(source))
    touched = sum(row in clip for clip in source.clips["clip_images"].reshape(len(source), -1))
    assert len(broken) == touched < len(source)
    assert all("is damaged" in reason and path.name in reason for reason in broken)


def test_a_shard_that_is_cut_short_later_costs_the_clips_behind_the_cut(loose: NuscenesData, own_copy: Path) -> None:
    source, _ = surround(packed(own_copy, loose))
    path = shard(own_copy, "camera-key")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    broken = list(outcomes(source))
    assert 0 < len(broken) < len(source)
    assert all("too early" in reason for reason in broken)


def test_a_shard_that_is_gone_later_is_told_clip_by_clip(loose: NuscenesData, own_copy: Path) -> None:
    source, _ = surround(packed(own_copy, loose))
    shard(own_copy, "lidar-key").unlink()
    broken = list(outcomes(source))
    assert broken and all("not there" in reason for reason in broken)


@pytest.mark.parametrize("fate", ["gone", "shorter"])
def test_an_index_of_other_shards_is_refused_at_the_start(loose: NuscenesData, own_copy: Path, fate: str, tmp_path: Path) -> None:
    path = shard(own_copy, "camera-key")
    if fate == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(DataError, match=f"{path.name} with .* bytes and it (is missing|has)"):
        source_of(packed(own_copy, loose, index_folder=tmp_path / "index"))


def test_a_table_that_is_damaged_is_refused_at_the_start(loose: NuscenesData, own_copy: Path, tmp_path: Path) -> None:
    path = next((own_copy / "packs").rglob("images.parquet"))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"images\.parquet was to be read as a table"):
        source_of(packed(own_copy, loose, index_folder=tmp_path / "index"))


def test_what_was_never_packed_and_a_version_that_is_not_there_are_told(
    loose: NuscenesData, own_copy: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="has no version in versions/; pack one with"):
        source_of(packed(tmp_path / "nothing", loose))
    config = packed(own_copy, loose)
    dataset = config.datasets[0].model_copy(update={"version": 7})
    with pytest.raises(DataError, match=r"version 7 of .* and it has only 1"):
        source_of(config.model_copy(update={"datasets": (dataset,)}))


def test_a_version_of_a_later_format_is_refused(loose: NuscenesData, own_copy: Path) -> None:
    path = own_copy / "versions" / "000001.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(DataError, match="format"):
        source_of(packed(own_copy, loose))


def test_a_store_that_is_gone_ends_the_run_and_is_no_bad_clip(
    loose: NuscenesData, packed_s3: str, s3_server: S3Server, tmp_path: Path
) -> None:
    source, files = surround(packed(packed_s3, loose, s3_server.config()))
    nowhere = StoreConfig(endpoint_url="http://127.0.0.1:9", region="us-east-1", max_attempts=1, timeout_s=1)
    lost = ShardFiles(files.columns, nowhere, None)
    with pytest.raises(StoreError) as caught:
        lost.read_images(source.clips["clip_images"][0].reshape(-1), clip="x")
    assert caught.value.exit_code == 75 and not isinstance(caught.value, ClipError)


def test_a_byte_that_flips_on_the_way_is_fetched_again(
    loose: NuscenesData, packed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = surround(packed(packed_folder, loose))
    before = source.load(0, np.random.default_rng(0))
    read, flips = LocalStore.get, iter([1])

    def get(self: LocalStore, key: str, offset: int = 0, length: int | None = None) -> bytes:
        data = bytearray(read(self, key, offset, length))
        data[len(data) // 2] ^= next(flips, 0)
        return bytes(data)

    monkeypatch.setattr(LocalStore, "get", get)
    np.testing.assert_array_equal(source.load(0, np.random.default_rng(0))["images"], before["images"])
    assert next(flips, None) is None


def test_a_read_is_tried_again_for_as_long_as_the_run_has_patience(
    loose: NuscenesData, packed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, files = surround(packed(packed_folder, loose, timeout_s=60.0))
    assert files.patience_s == 30.0
    read = LocalStore.get
    failures = [StoreError("the store is out of breath")] * 2

    def get(self: LocalStore, key: str, offset: int = 0, length: int | None = None) -> bytes:
        if failures:
            raise failures.pop()
        return read(self, key, offset, length)

    monkeypatch.setattr(LocalStore, "get", get)
    source.load(0, np.random.default_rng(0))
    failures.append(StoreError("the store is out of breath"))
    with pytest.raises(StoreError, match="out of breath"):
        replace(files, patience_s=0.0).read_images(source.clips["clip_images"][0].reshape(-1), clip="x")


def test_wrong_credentials_are_told_and_not_tried_again(
    loose: NuscenesData, packed_s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "somebody else's")
    forget_clients()
    with pytest.raises(ConfigError, match=r"credentials|denied|signature"):
        source_of(packed(packed_s3, loose, s3_server.config()))
    with pytest.raises(ConfigError, match="no-such-bucket"):
        source_of(packed("s3://no-such-bucket/city", loose, s3_server.config()))


def test_scenes_shorter_than_a_clip_give_none_and_that_is_told(loose: NuscenesData, packed_folder: Path) -> None:
    clip = loose.clip.model_copy(update={"frames": 64})
    with pytest.raises(DataError, match=r"no scene has 64 frames .* apart"):
        source_of(packed(packed_folder, loose, clip=clip), SURROUND)


def test_a_cached_range_is_not_fetched_again_even_after_a_restart(loose: NuscenesData, own_copy: Path, tmp_path: Path) -> None:
    config = packed(own_copy, loose, cache=CacheConfig(folder=tmp_path / "cache", size_gb=1))
    before = source_of(config, SURROUND).load(0, np.random.default_rng(0))
    kept = source_of(config, SURROUND)
    for path in (own_copy / "shards").iterdir():
        path.unlink()
    after = kept.load(0, np.random.default_rng(0))
    np.testing.assert_array_equal(before["images"], after["images"])


def test_a_damaged_cache_entry_is_fetched_again(loose: NuscenesData, own_copy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    config = packed(own_copy, loose, cache=CacheConfig(folder=folder, size_gb=1))
    source = source_of(config, SURROUND)
    before = source.load(0, np.random.default_rng(0))
    for path in folder.rglob("*.val"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    after = source.load(0, np.random.default_rng(0))
    np.testing.assert_array_equal(before["images"], after["images"])


def test_the_cache_keeps_its_bound(loose: NuscenesData, packed_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    whole = packed(packed_folder, loose, cache=CacheConfig(folder=folder, size_gb=0.002))
    source = source_of(whole, SURROUND)
    fetched = 0
    for _ in range(3):
        for number in range(len(source)):
            fetched += source.load(number, np.random.default_rng(0))["images"].nbytes
    assert fetched > 4_000_000
    assert sum(path.stat().st_size for path in folder.rglob("*.val")) <= 4_000_000


def test_two_data_sets_are_mixed_by_their_weights(loose: NuscenesData, packed_folder: Path, own_copy: Path) -> None:
    datasets = (DatasetConfig(uri=str(packed_folder), weight=3), DatasetConfig(uri=str(own_copy), weight=1))
    source = source_of(packed(packed_folder, loose).model_copy(update={"datasets": datasets}), SURROUND)
    assert isinstance(source, MixedSource)
    half = len(source) // 2
    order = Order(0, portions_of(source), 8)
    drawn = [order.sample(step, slot) for step in range(128) for slot in range(8)]
    assert sum(index < half for index in drawn) == 3 * 1024 // 4
    assert source.name(0) == source.name(half)
    np.testing.assert_array_equal(
        source.load(1, np.random.default_rng(0))["images"], source.load(half + 1, np.random.default_rng(0))["images"]
    )
