"""What tests of the trainer share: runs that several tests look at, and a server that speaks S3."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import Runner
from tests.s3_server import OWNER, S3Server, find_weed, forget_clients, running_server
from tests.trainer.packed import loose, packed_again, packed_folder, packed_s3, recording

__all__ = ["loose", "packed_again", "packed_folder", "packed_s3", "recording"]  # fixtures


@pytest.fixture(scope="session")
def runner(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("runs"), f"data.root={city}")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running SeaweedFS with one bucket."""
    weed = find_weed()
    if weed is None:
        assert not os.environ.get("CI"), "SeaweedFS is missing: install the extra `test`"
        pytest.skip("SeaweedFS is not installed; the extra `test` brings it")
    with running_server(weed, tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_owner(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment of who owns the bucket; nothing of this machine's own AWS settings is in it."""
    for name in os.environ:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    settings = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in {**OWNER.environment, **settings, "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    forget_clients()
    yield
    forget_clients()
