"""One contract, run over every kind of store."""

import errno
import os
import secrets
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.s3_server import S3Server
from trainer.errors import ConfigError
from trainer.store.base import Checksum, ObjectExistsError, ObjectInfo, ObjectMissingError, Store, StoreError, check_exclusive
from trainer.store.local import LocalStore
from trainer.store.open import open_store


def folder(request: pytest.FixtureRequest) -> Path:
    place: Path = request.getfixturevalue("tmp_path")
    return place / "not there yet"


def s3_store(request: pytest.FixtureRequest) -> Store:
    """A store of its own in the bucket of the session."""
    server: S3Server = request.getfixturevalue("s3_server")
    request.getfixturevalue("s3_owner")
    return open_store(f"s3://{server.bucket}/{secrets.token_hex(8)}", server.config())


STORES: dict[str, Callable[[pytest.FixtureRequest], Store]] = {
    "local": lambda request: open_store(folder(request)),
    "s3": s3_store,
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> Store:
    return STORES[request.param](request)


def keys(store: Store, prefix: str) -> list[str]:
    return [info.key for info in store.list(prefix)]


def test_what_is_put_can_be_got_and_its_size_and_checksum_are_told(store: Store) -> None:
    info = store.put("a/b.bin", b"dragonfly")
    assert (info.key, info.bytes, info.checksum) == ("a/b.bin", 9, f"crc32:{zlib.crc32(b'dragonfly'):08x}")
    assert store.get("a/b.bin") == b"dragonfly"


@given(st.lists(st.binary(max_size=300), max_size=6))
def test_checksums_of_pieces_make_that_of_the_whole(pieces: list[bytes]) -> None:
    whole = Checksum()
    for piece in pieces:
        following = Checksum()
        following.update(piece)
        whole.append(following)
    everything = b"".join(pieces)
    assert (whole.bytes, str(whole)) == (len(everything), f"crc32:{zlib.crc32(everything):08x}")


def test_checksums_of_large_pieces_are_put_together_without_them() -> None:
    first, second = Checksum(), Checksum()
    first.update(b"dragonfly")
    second.update(bytes(3 * 2**20 + 1))
    first.append(second)
    assert str(first) == f"crc32:{zlib.crc32(b'dragonfly' + bytes(3 * 2**20 + 1)):08x}"


def test_pieces_are_stored_one_after_the_other(store: Store) -> None:
    info = store.put("a", (memoryview(bytes([i]) * i) for i in range(5)))
    assert store.get("a") == b"\1\2\2\3\3\3\4\4\4\4"
    assert info == store.put("b", store.get("a")).__class__("a", 10, info.checksum)


def test_pieces_count_in_bytes_whatever_their_items_are(store: Store) -> None:
    assert store.put("a", [memoryview(b"12345678").cast("q")]).bytes == 8


def test_an_object_may_be_empty(store: Store) -> None:
    assert store.put("a", b"").bytes == 0
    assert store.get("a") == b""
    assert store.list("a")[0].bytes == 0


def test_a_range_is_read_without_the_rest(store: Store) -> None:
    store.put("a", b"0123456789")
    assert store.get("a", 3, 4) == b"3456"
    assert store.get("a", 7) == b"789"
    assert store.get("a", 10, 0) == b""


def test_a_range_that_an_object_does_not_have_is_an_error(store: Store) -> None:
    store.put("a", b"0123456789")
    with pytest.raises(ObjectMissingError, match="2 too early"):
        store.get("a", 8, 4)


def test_a_range_is_read_into_several_places_one_after_the_other(store: Store) -> None:
    store.put("a", b"0123456789")
    places = [bytearray(3), bytearray(0), bytearray(1), bytearray(2)]
    store.read_into("a", 2, [memoryview(place) for place in places])
    assert [bytes(place) for place in places] == [b"234", b"", b"5", b"67"]
    store.read_into("a", 10, [])


@pytest.mark.parametrize(("offset", "lacking"), [(8, 2), (10, 4), (12, 4)])
def test_places_that_an_object_cannot_fill_are_an_error(store: Store, offset: int, lacking: int) -> None:
    store.put("a", b"0123456789")
    with pytest.raises(ObjectMissingError, match=f"{lacking} too early"):
        store.read_into("a", offset, [memoryview(bytearray(4))])
    with pytest.raises(ObjectMissingError, match=r"no/where"):
        store.read_into("no/where", 0, [memoryview(bytearray(1))])


def test_a_missing_object_is_an_error_that_names_it(store: Store) -> None:
    with pytest.raises(ObjectMissingError, match=r"no/where"):
        store.get("no/where")


def test_a_second_put_replaces_the_object(store: Store) -> None:
    store.put("a", b"first")
    store.put("a", b"2nd")
    assert store.get("a") == b"2nd"


def test_an_exclusive_put_leaves_what_is_there(store: Store) -> None:
    store.put("a", b"first", exclusive=True)
    with pytest.raises(ObjectExistsError):
        store.put("a", b"second", exclusive=True)
    assert store.get("a") == b"first"
    assert keys(store, "") == ["a"]


def test_a_put_that_fails_on_its_way_leaves_what_was_there(store: Store) -> None:
    def breaking() -> Iterator[memoryview]:
        yield memoryview(b"half")
        raise RuntimeError("the source broke")

    store.put("kept", b"whole")
    for key in ("kept", "new"):
        with pytest.raises(RuntimeError, match="source broke"):
            store.put(key, breaking())
    assert keys(store, "") == ["kept"]
    assert store.get("kept") == b"whole"


def test_a_list_is_sorted_and_takes_whole_parts_of_names(store: Store) -> None:
    for key in ("b/2", "b/1", "b/c/3", "bb/4", "b.json", "a"):
        store.put(key, key.encode())
    assert keys(store, "") == ["a", "b.json", "b/1", "b/2", "b/c/3", "bb/4"]
    assert keys(store, "b") == keys(store, "b/") == ["b/1", "b/2", "b/c/3"]
    assert keys(store, "b/c") == ["b/c/3"]
    assert [(info.key, info.bytes) for info in store.list("bb/4")] == [("bb/4", 4)]
    assert store.list("none") == []


def test_a_delete_takes_whole_parts_of_names(store: Store) -> None:
    for key in ("b/1", "b/c/2", "bb/3", "a"):
        store.put(key, b"")
    store.delete("b/")
    store.delete("a")
    store.delete("none")
    assert keys(store, "") == ["bb/3"]


def test_a_whole_store_is_never_deleted(store: Store) -> None:
    store.put("a", b"")
    for prefix in ("", "/"):
        with pytest.raises(AssertionError):
            store.delete(prefix)
    assert keys(store, "") == ["a"]


@pytest.mark.parametrize("key", ["../a", "/a", "a//b", "a/./b", "a/../../b", ""])
def test_a_key_cannot_leave_the_store(store: Store, key: str) -> None:
    with pytest.raises(AssertionError):
        store.put(key, b"")


def test_what_a_killed_put_left_is_not_seen_and_goes_with_its_prefix(tmp_path: Path) -> None:
    program = """
import os, sys
from trainer.store.local import LocalStore
from trainer.store.open import open_store
def killed():
    yield memoryview(b"half" * 100_000)
    os.kill(os.getpid(), 9)
open_store(sys.argv[1]).put("a/b", killed())
"""
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == -9
    assert len(list((tmp_path / "a").iterdir())) == 1
    store = open_store(tmp_path)
    assert store.list("") == []
    store.put("a/c", b"")
    assert keys(store, "a") == ["a/c"]
    store.delete("a")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_reason_to_try_again_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    store.put("old", b"old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device") as caught:
        store.put("new", b"new")
    assert caught.value.exit_code == 75
    assert keys(store, "") == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_file_where_a_folder_must_be_is_a_wrong_config(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="give a folder"):
        open_store(tmp_path / "file").put("a", b"")
    with pytest.raises(ConfigError, match="give a folder"):
        open_store(tmp_path / "file").get("a")


def test_a_store_says_that_it_honours_exclusive_puts_and_nothing_is_left_of_the_question(store: Store) -> None:
    check_exclusive(store)
    assert store.list("") == []


def test_a_store_that_ignores_exclusive_is_a_wrong_config_that_names_it(tmp_path: Path) -> None:
    class Forgetful(LocalStore):
        def put(self, key: str, payload: bytes | Iterable[memoryview], *, exclusive: bool = False) -> ObjectInfo:
            return super().put(key, payload)

    with pytest.raises(ConfigError, match=f"{tmp_path} was asked .*If-None-Match"):
        check_exclusive(Forgetful(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "uri", ["gs://bucket/run", Path("s3://bucket/run"), "s3:/bucket/run", "s3://", "s3:///run", "s3://b/../a"]
)
def test_a_uri_that_names_no_store_is_a_wrong_config(uri: str | Path) -> None:
    with pytest.raises(ConfigError, match="s3://bucket/prefix"):
        open_store(uri)


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/a", "s3://bucket/a/b/"])
def test_a_uri_on_s3_is_opened_without_a_look_at_it(uri: str) -> None:
    assert open_store(uri).uri == uri.removesuffix("/")


def test_a_relative_folder_stays_the_same_when_the_process_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("run")
    monkeypatch.chdir("/")
    store.put("a", b"1")
    assert (tmp_path / "run" / "a").read_bytes() == b"1"
    assert store.uri == str(tmp_path / "run")
