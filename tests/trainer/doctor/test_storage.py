"""Which rights a store does not give, and how far its clock is off."""

import time
from pathlib import Path

import pytest

from tests.s3_server import READER, S3Server, forget_clients
from tests.trainer.doctor.configs import config_of
from trainer.doctor.finding import look
from trainer.doctor.storage import check_clock, check_data, check_store, open_run_store
from trainer.store import s3
from trainer.store.base import Store
from trainer.store.local import LocalStore
from trainer.store.open import open_store

pytestmark = pytest.mark.usefixtures("s3_owner")


@pytest.fixture
def store(s3_server: S3Server) -> Store:
    return open_store(f"s3://{s3_server.bucket}/doctor", s3_server.config().impatient)


def test_a_store_that_gives_all_rights_is_measured_and_left_as_it_was(store: Store) -> None:
    found = check_store(store)
    assert found.cure == "" and "conditional put" in found.value and "MB/s" in found.value
    assert store.list("") == []


def test_a_right_that_is_missing_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in READER.environment.items():
        monkeypatch.setenv(name, value)
    forget_clients()
    found = look("store", lambda: check_store(store))
    assert "allow this user s3:PutObject" in found.cure and not found.may_pass


def test_a_server_that_is_away_may_come_back(s3_server: S3Server, tmp_path: Path) -> None:
    config = config_of(
        tmp_path, tmp_path, "run.uri=s3://bucket/x", "store.endpoint_url=http://127.0.0.1:9", "store.region=us-east-1"
    )
    found = look("store", lambda: check_store(open_run_store(config)))
    assert found.cure and found.may_pass


def test_the_server_s_clock_is_compared_with_ours(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_clock(store, tolerance_s=30.0).cure == ""
    now_s = time.time()
    monkeypatch.setattr(s3, "time", type("Clock", (), {"time": staticmethod(lambda: now_s + 100)}))
    found = check_clock(store, tolerance_s=30.0)
    assert "ahead of the store's" in found.value and "set the clock of this machine" in found.cure


def test_a_folder_has_our_own_clock(tmp_path: Path) -> None:
    assert check_clock(LocalStore(tmp_path), tolerance_s=30.0).value == "the store is a folder: nothing to compare"


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert check_data(config_of(tmp_path, tmp_path)).value == str(tmp_path)
    found = look("data", lambda: check_data(config_of(tmp_path / "nothing", tmp_path)))
    assert found.cure == "give one that all nodes see"
    shards = ("data.kind=shards", f"data.datasets=[{{uri: {tmp_path}/nothing}}]")
    packed = config_of(tmp_path, tmp_path, *shards)
    assert f"{tmp_path}/nothing" in look("data", lambda: check_data(packed)).value
