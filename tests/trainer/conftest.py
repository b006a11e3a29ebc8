"""What tests of whole runs share: a small synthetic city, and runs that several tests look at."""

from pathlib import Path

import pytest

from tests.runs import Runner


@pytest.fixture(scope="session")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four short scenes of a synthetic city, one of them held out."""
    from tests.trainer.data.dataroot import make_tables, write_dataroot
    root = tmp_path_factory.mktemp("city")
    return write_dataroot(root, make_tables(), {"train": ["scene-0001"], "val": ["scene-0002"]})


@pytest.fixture(scope="session")
def runner(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("runs"), city)
