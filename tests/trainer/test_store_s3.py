"""What a store on S3 does on bad days: a real server that is killed, and a proxy that spoils what passes it."""

import contextlib
import itertools
import multiprocessing
import os
import secrets
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.faulty_proxy import Fault, FaultyProxy, faulty_proxy
from tests.s3_server import OWNER, READER, Keys, S3Server, forget_clients
from trainer.config.store import StoreConfig
from trainer.errors import ConfigError
from trainer.store import s3
from trainer.store.base import BucketMissingError, ObjectExistsError, ObjectMissingError, Store, StoreError
from trainer.store.open import open_store

MB = 1 << 20
PART = 5 * MB  # the least that S3 takes

pytestmark = pytest.mark.usefixtures("s3_owner")


@pytest.fixture
def uri(s3_server: S3Server) -> str:
    return f"s3://{s3_server.bucket}/{secrets.token_hex(8)}"


@pytest.fixture
def store(s3_server: S3Server, uri: str) -> Store:
    return open_store(uri, s3_server.config(part_mb=5))


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultyProxy]:
    with faulty_proxy(s3_server.port) as proxy:
        yield proxy


@pytest.fixture
def far_store(proxy: FaultyProxy, uri: str) -> Store:
    """The same store, through the proxy."""
    return open_store(uri, StoreConfig(endpoint_url=proxy.url, region="us-east-1", part_mb=5, timeout_s=10))


def become(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in keys.environment.items():
        monkeypatch.setenv(name, value)
    forget_clients()


def pieces(data: bytes, size: int = 3 * MB) -> Iterator[memoryview]:
    view = memoryview(data)
    return (view[start : start + size] for start in range(0, len(data), size))


def unfinished_uploads(server: S3Server, uri: str) -> list[str]:
    prefix = uri.removeprefix(f"s3://{server.bucket}/")
    found = server.client().list_multipart_uploads(Bucket=server.bucket, Prefix=prefix)
    return [upload["Key"].removeprefix(prefix + "/") for upload in found.get("Uploads", [])]


# Large objects


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_an_object_of_many_parts_is_what_was_put(store: Store, extra: int) -> None:
    data = os.urandom(4 * PART + extra)
    info = store.put("a", pieces(data))
    assert (info.bytes, info.checksum) == (len(data), store.put("b", data).checksum)
    assert store.get("a") == data
    assert store.get("b", PART - 1, 2 * PART) == data[PART - 1 : 3 * PART - 1]
    with pytest.raises(ObjectMissingError, match="1 too early"):
        store.get("a", PART, 3 * PART + extra + 1)


def test_the_server_knows_the_checksum_of_the_whole_object(store: Store, s3_server: S3Server, uri: str) -> None:
    info = store.put("a", os.urandom(2 * PART))
    key = uri.removeprefix(f"s3://{s3_server.bucket}/") + "/a"
    head = s3_server.client().head_object(Bucket=s3_server.bucket, Key=key, ChecksumMode="ENABLED")
    assert (head["ChecksumType"], info.checksum) == ("FULL_OBJECT", f"crc32:{s3.base64.b64decode(head['ChecksumCRC32']).hex()}")


def test_the_memory_of_a_piece_may_be_used_again_once_the_next_is_asked_for(store: Store) -> None:
    memory = bytearray(MB)

    def reused() -> Iterator[memoryview]:
        for number in range(12):
            memory[:] = bytes([number]) * MB
            yield memoryview(memory)

    store.put("a", reused())
    assert store.get("a") == b"".join(bytes([number]) * MB for number in range(12))


def test_a_put_reads_ahead_no_more_than_its_parts_in_flight_and_one(far_store: Store, proxy: FaultyProxy) -> None:
    proxy.faults.append(Fault("slow", "PUT", times=100))
    ahead = []

    def counted() -> Iterator[memoryview]:
        piece = memoryview(bytes(PART))
        for asked in range(14):
            ahead.append(asked - len([target for method, target in proxy.answered if method == "PUT"]))
            yield piece

    far_store.put("a", counted())
    threads = StoreConfig().threads
    assert max(ahead) <= threads + 1
    assert max(ahead) >= threads, "parts travel at the same time"


def test_a_put_that_fails_after_some_parts_leaves_no_upload(store: Store, s3_server: S3Server, uri: str) -> None:
    def breaking() -> Iterator[memoryview]:
        yield memoryview(bytes(3 * PART))
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="source broke"):
        store.put("a", breaking())
    assert store.list("") == []
    assert unfinished_uploads(s3_server, uri) == []


def test_more_objects_than_one_answer_lists_are_listed_and_deleted(store: Store, s3_server: S3Server, uri: str) -> None:
    client, prefix = s3_server.client(), uri.removeprefix(f"s3://{s3_server.bucket}/")
    names = [f"a/{number:04d}" for number in range(1001)]
    for name in names:
        client.put_object(Bucket=s3_server.bucket, Key=f"{prefix}/{name}", Body=b"")
    assert [info.key for info in store.list("a")] == names
    store.delete("a")
    assert store.list("") == []


# Kills


def test_a_killed_put_shows_nothing_and_its_upload_goes_with_its_prefix(store: Store, s3_server: S3Server, uri: str) -> None:
    program = """
import os, sys, time
from trainer.config.store import StoreConfig
from trainer.store.open import open_store
def killed():
    yield memoryview(bytes(12_000_000))
    time.sleep(1)
    os.kill(os.getpid(), 9)
open_store(sys.argv[1], StoreConfig(endpoint_url=sys.argv[2], region="us-east-1", part_mb=5)).put("a/b", killed())
"""
    command = [sys.executable, "-c", program, uri, s3_server.endpoint_url]
    assert subprocess.run(command, check=False).returncode == -9
    assert store.list("") == []
    store.delete("a/bb")
    assert unfinished_uploads(s3_server, uri) == ["a/b"]
    store.delete("a")
    assert unfinished_uploads(s3_server, uri) == []


def test_a_put_outlives_a_server_that_is_killed_and_started_again(store: Store, s3_server: S3Server) -> None:
    data = os.urandom(6 * PART)

    def restarting() -> Iterator[memoryview]:
        for number, piece in enumerate(pieces(data, PART)):
            if number == 3:
                s3_server.kill()
                s3_server.start()
            yield piece

    store.put("a", restarting())
    assert store.get("a") == data


def test_a_server_that_is_not_there_is_a_reason_to_try_again(uri: str) -> None:
    store = open_store(uri, StoreConfig(endpoint_url="http://127.0.0.1:9", region="us-east-1", max_attempts=2))
    asked: list[Callable[[], Any]] = [lambda: store.put("a", b""), lambda: store.get("a"), lambda: store.list("a")]
    for ask in asked:
        with pytest.raises(StoreError, match=r"asked to .*endpoint_url.* start the same job again") as caught:
            ask()
        assert caught.value.exit_code == 75


def test_a_server_that_hangs_is_a_reason_to_try_again(s3_server: S3Server, uri: str) -> None:
    store = open_store(uri, s3_server.config(timeout_s=0.5, max_attempts=1))
    store.put("a", b"1")
    s3_server.freeze()
    try:
        with pytest.raises(StoreError, match="timeout"):
            store.get("a")
    finally:
        s3_server.thaw()
    assert store.get("a") == b"1"


def test_a_child_of_a_fork_speaks_to_the_server_on_its_own(store: Store) -> None:
    store.put("a", b"parent")
    child = multiprocessing.get_context("fork").Process(target=store.put, args=("b", b"child"))
    child.start()
    child.join()
    assert (child.exitcode, store.get("b"), store.get("a")) == (0, b"child", b"parent")


# Faults on the way


def test_a_busy_server_is_asked_again(far_store: Store, proxy: FaultyProxy) -> None:
    proxy.faults += [Fault("slow down", "PUT", times=2), Fault("slow down", "GET", times=2)]
    far_store.put("a", b"1")
    assert far_store.get("a") == b"1"


def test_a_server_that_stays_busy_is_a_reason_to_try_again(proxy: FaultyProxy, uri: str) -> None:
    proxy.faults.append(Fault("slow down", "PUT", times=100))
    store = open_store(uri, StoreConfig(endpoint_url=proxy.url, region="us-east-1", max_attempts=2))
    with pytest.raises(StoreError, match=r"SlowDown.*start the same job again"):
        store.put("a", b"1")


@pytest.mark.parametrize("kind", ["cut answer", "drop answer", "flip in answer"])
def test_an_answer_that_is_spoilt_is_asked_for_again(far_store: Store, proxy: FaultyProxy, kind: Any) -> None:
    far_store.put("a", bytes(1000))
    proxy.faults.append(Fault(kind, "GET", times=2))
    assert far_store.get("a") == bytes(1000)


def test_a_part_of_a_large_get_that_breaks_off_is_asked_for_again(far_store: Store, proxy: FaultyProxy) -> None:
    data = os.urandom(3 * PART)
    far_store.put("a", data)
    proxy.faults.append(Fault("cut answer", "GET", times=3))
    assert far_store.get("a", 1) == data[1:]


@pytest.mark.parametrize("kind", ["cut answer", "drop answer", "slow down"])
def test_places_are_filled_from_their_beginning_again_when_an_answer_breaks_off(
    far_store: Store, proxy: FaultyProxy, kind: Any
) -> None:
    data = os.urandom(5 * MB)
    far_store.put("a", data)
    proxy.faults.append(Fault(kind, "GET", times=2))
    places = [bytearray(3 * MB), bytearray(7), bytearray(MB)]
    far_store.read_into("a", 11, [memoryview(place) for place in places])
    assert proxy.faults[0].times == 0
    assert b"".join(places) == data[11 : 11 + 4 * MB + 7]


def test_places_are_filled_without_a_second_copy_of_the_object(store: Store) -> None:
    store.put("a", bytes(48 * MB))
    place = memoryview(bytearray(48 * MB))
    store.read_into("a", 0, [place[:MB]])  # connect
    tracemalloc.start()
    store.read_into("a", 0, [place])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * MB


def test_an_answer_that_is_spoilt_every_time_is_a_reason_to_try_again(far_store: Store, proxy: FaultyProxy) -> None:
    far_store.put("a", bytes(1000))
    proxy.faults.append(Fault("cut answer", "GET", times=100))
    with pytest.raises(StoreError, match=r"broke off.*start the same job again"):
        far_store.get("a")


@pytest.mark.parametrize("kind", ["drop request", "drop answer", "flip in request"])
@pytest.mark.parametrize("size", [1000, 2 * PART])
def test_a_request_that_is_spoilt_is_sent_again(far_store: Store, proxy: FaultyProxy, kind: Any, size: int) -> None:
    data = os.urandom(size)
    proxy.faults.append(Fault(kind, "PUT", times=2))
    far_store.put("a", data)
    assert proxy.faults[0].times == 0
    assert far_store.get("a") == data


def test_a_completion_whose_answer_is_lost_counts(far_store: Store, proxy: FaultyProxy) -> None:
    data = os.urandom(2 * PART)
    proxy.faults.append(Fault("drop answer", "POST", target="uploadId="))
    far_store.put("a", data)
    assert proxy.faults[0].times == 0
    assert far_store.get("a") == data


def test_an_exclusive_put_whose_answer_is_lost_counts_and_that_of_another_does_not(far_store: Store, proxy: FaultyProxy) -> None:
    proxy.faults.append(Fault("drop answer", "PUT"))
    far_store.put("a", b"ours", exclusive=True)
    assert [method for method, _ in proxy.answered].count("PUT") == 2
    with pytest.raises(ObjectExistsError, match="another writer"):
        far_store.put("a", b"another's", exclusive=True)
    assert far_store.get("a") == b"ours"


def test_of_many_exclusive_puts_at_once_one_wins(store: Store) -> None:
    def won(number: int) -> bool:
        try:
            store.put("a", str(number).encode(), exclusive=True)
        except ObjectExistsError:
            return False
        return True

    with s3.ThreadPoolExecutor(8) as threads:
        winners = list(itertools.compress(range(8), threads.map(won, range(8))))
    assert [store.get("a")] == [str(number).encode() for number in winners]


# Wrong configs


def test_a_wrong_secret_is_a_wrong_config(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    become(Keys(OWNER.access, "wrong"), monkeypatch)
    with pytest.raises(ConfigError, match=r"SignatureDoesNotMatch.*give the credentials"):
        store.put("a", b"")


def test_an_unknown_user_is_a_wrong_config(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    become(Keys("nobody", "wrong"), monkeypatch)
    with pytest.raises(ConfigError, match=r"InvalidAccessKeyId.*give the credentials"):
        store.list("")


def test_no_credentials_at_all_are_a_wrong_config(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OWNER.environment:
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match="Unable to locate credentials; give the credentials"):
        store.get("a")


def test_a_bucket_that_is_not_there_is_a_wrong_config(s3_server: S3Server) -> None:
    store = open_store("s3://no-such-bucket/run", s3_server.config(part_mb=5))
    asked: list[Callable[[], Any]] = [
        lambda: store.put("a", b""),
        lambda: store.put("a", bytes(2 * PART)),
        lambda: store.get("a"),
        lambda: store.list(""),
        lambda: store.delete("a"),
    ]
    for ask in asked:
        with pytest.raises(BucketMissingError, match=r"s3://no-such-bucket/run was asked .*NoSuchBucket.*create the bucket"):
            ask()


def test_a_user_who_may_only_read_is_told_the_permission_that_is_missing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("a", b"1")
    become(READER, monkeypatch)
    assert store.get("a") == b"1"
    with pytest.raises(ConfigError, match=r"asked to write b .*AccessDenied.*allow this user s3:PutObject"):
        store.put("b", b"")
    with pytest.raises(ConfigError, match=r"asked to write b .*AccessDenied.*allow this user s3:PutObject"):
        store.put("b", bytes(2 * PART))
    with pytest.raises(ConfigError, match=r"asked to delete a .*AccessDenied.*allow this user s3:"):
        store.delete("a")
    assert store.get("a") == b"1"


def test_a_bucket_with_a_wrong_name_is_a_wrong_config(s3_server: S3Server) -> None:
    with pytest.raises(ConfigError, match="give s3://bucket/prefix"):
        open_store("s3://no bucket/run", s3_server.config()).list("")


def test_a_key_without_its_kind_of_encryption_is_a_wrong_config() -> None:
    with pytest.raises(ValidationError, match="aws:kms"):
        StoreConfig(kms_key_id="key")
    assert StoreConfig(kms_key_id="key", sse="aws:kms").kms_key_id == "key"


def test_a_config_is_read_and_a_store_opened_without_boto3() -> None:
    program = "import sys; from trainer.store.open import open_store; open_store('s3://b/p'); sys.exit('boto3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    program = "import sys, trainer.config.store; sys.exit(bool({'boto3', 'torch', 'tenacity'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# What a cluster brings along


def test_credentials_that_expire_are_fetched_again_in_mid_run(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As web identities and instance roles do: the chain asks its source again before what it has runs out."""
    calls = tmp_path / "calls"
    source = tmp_path / "credentials.py"
    source.write_text(
        "import datetime, json\n"
        f"open({str(calls)!r}, 'a').write('x')\n"
        "soon = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=1)\n"
        f"print(json.dumps(dict(Version=1, AccessKeyId={OWNER.access!r}, SecretAccessKey={OWNER.secret!r}, Expiration=soon.isoformat())))\n"
    )
    config = tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = {sys.executable} {source}\n")
    for name in OWNER.environment:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    forget_clients()
    store.put("a", b"1")
    fetched = len(calls.read_text())
    store.put("b", b"2")
    assert [info.key for info in store.list("")] == ["a", "b"]
    assert len(calls.read_text()) > fetched > 0


def test_encryption_is_asked_for_with_every_object(s3_server: S3Server, uri: str) -> None:
    store = open_store(uri, s3_server.config(part_mb=5, sse="aws:kms", kms_key_id="key-7", max_attempts=1))
    asked: list[tuple[str, str | None, str | None]] = []

    def note(model: Any, params: Any, **_: Any) -> None:
        headers = params["headers"]
        name = "x-amz-server-side-encryption"
        asked.append((model.name, headers.get(name), headers.get(f"{name}-aws-kms-key-id")))

    s3._client(store._config, os.getpid()).meta.events.register("before-call.s3", note)  # type: ignore[attr-defined]
    for payload in (b"small", bytes(PART + 1)):
        with contextlib.suppress(ConfigError, StoreError):  # this server has no such key
            store.put("a", payload)
    begun = {call for call in asked if call[0] in ("PutObject", "CreateMultipartUpload")}
    assert begun == {("PutObject", "aws:kms", "key-7"), ("CreateMultipartUpload", "aws:kms", "key-7")}


def test_certificates_and_proxy_of_the_config_reach_the_connections(s3_server: S3Server, tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.touch()
    config = s3_server.config(ca_bundle=str(authority), proxy_url="http://127.0.0.1:9", max_attempts=1, timeout_s=2)
    client = s3._client(config, os.getpid())
    assert client._endpoint.http_session._verify == str(authority)
    with pytest.raises(StoreError, match="proxy"):
        open_store(f"s3://{s3_server.bucket}/a", config).put("a", b"1")
