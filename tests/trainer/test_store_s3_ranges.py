"""Ranges read past botocore, and what is left to it."""

import os
import secrets
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ConnectionClosedError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from urllib3.exceptions import IncompleteRead

from tests.s3_server import S3Server
from trainer.store import s3
from trainer.store.base import ObjectMissingError, Store
from trainer.store.open import open_store
from trainer.store.s3_ranges import RangeReader

DATA = bytes(range(256)) * 40

pytestmark = pytest.mark.usefixtures("s3_owner")


@pytest.fixture(scope="module")
def folder() -> str:
    return secrets.token_hex(8)


@pytest.fixture
def store(s3_server: S3Server, folder: str) -> Store:
    store = open_store(f"s3://{s3_server.bucket}/{folder}", s3_server.config())
    store.put("object", DATA)
    return store


@pytest.fixture
def client(s3_server: S3Server) -> Any:
    return s3._client(s3_server.config(), os.getpid())


@pytest.fixture
def reader(s3_server: S3Server, store: Store, client: Any) -> RangeReader:
    return RangeReader(client, s3_server.bucket)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(offset=st.integers(0, len(DATA) - 1), length=st.integers(1, 2 * len(DATA)))
def test_a_range_is_that_of_the_object_up_to_its_end(reader: RangeReader, folder: str, offset: int, length: int) -> None:
    found = reader.read(f"{folder}/object", offset, length)
    assert found is not None
    assert found.data == DATA[offset : offset + length]
    assert found.object_bytes == len(DATA)
    assert found.etag


def test_a_url_is_signed_once_for_all_ranges_of_an_object(
    reader: RangeReader, client: Any, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = []
    sign = client.generate_presigned_url
    monkeypatch.setattr(client, "generate_presigned_url", lambda *given, **named: signed.append(1) or sign(*given, **named))
    assert all(reader.read(f"{folder}/object", offset, 10) for offset in range(20))
    assert len(signed) == 1


def test_a_store_reads_ranges_without_asking_botocore(store: Store, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "get_object", None)
    assert store.get("object", 100, 200) == DATA[100:300]


def refuse_to_answer(request: Any) -> None:
    raise ConnectionClosedError(endpoint_url=request.url)


def end_early(request: Any) -> Any:
    del request
    return answer(206, lambda: DATA[100:200])


def break_off(request: Any) -> Any:
    del request

    def read() -> bytes:
        raise IncompleteRead(partial=100, expected=100)

    return answer(206, read)


def find_no_credentials(request: Any) -> Any:
    del request
    return answer(403, lambda: b"<Error/>")


def answer(status: int, read: Callable[[], bytes]) -> Any:
    headers = {"Content-Range": f"bytes 100-299/{len(DATA)}", "ETag": "x"} if status == 206 else {}
    return SimpleNamespace(status_code=status, headers=headers, raw=SimpleNamespace(read=read))


@pytest.mark.parametrize("send", [refuse_to_answer, end_early, break_off, find_no_credentials])
def test_what_goes_wrong_is_left_to_botocore(
    s3_server: S3Server, store: Store, client: Any, monkeypatch: pytest.MonkeyPatch, send: Callable[[Any], Any]
) -> None:
    asked = []
    get = client.get_object
    monkeypatch.setattr(client, "get_object", lambda **named: asked.append(named["Range"]) or get(**named))
    reader = s3._range_reader(s3_server.config(), s3_server.bucket, os.getpid())
    monkeypatch.setattr(reader, "_http", SimpleNamespace(send=send))
    assert store.get("object", 100, 200) == DATA[100:300]
    assert asked == ["bytes=100-299"]


def test_a_signature_that_the_server_refuses_is_made_anew(
    reader: RangeReader, client: Any, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign = client.generate_presigned_url
    monkeypatch.setattr(client, "generate_presigned_url", lambda *given, **named: sign(*given, **named)[:-4] + "0000")
    assert reader.read(f"{folder}/object", 0, 10) is None
    monkeypatch.setattr(client, "generate_presigned_url", sign)
    assert reader.read(f"{folder}/object", 0, 10) is not None


def test_what_is_not_there_is_told_as_before(store: Store) -> None:
    with pytest.raises(ObjectMissingError, match="other"):
        store.get("other", 100, 200)
    with pytest.raises(ObjectMissingError, match="object"):
        store.get("object", len(DATA) + 5, 10)
