"""One hand-made dataroot that the tests of sources read, and a config for it."""

from pathlib import Path

import pytest
from hypothesis import settings

from tests.trainer.data.dataroot import YAWS, make_tables, write_dataroot
from trainer.config.data import AugmentConfig, ClipConfig, NuscenesData, PairConfig
from trainer.data.nuscenes import build_index

settings.register_profile("shared machine", deadline=None)  # an example that waits for a busy core has not failed
settings.load_profile("shared machine")

SPLITS = {"train": ["scene-0001"], "val": ["scene-0002"]}


@pytest.fixture(scope="session")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataroot; nobody may change it."""
    return write_dataroot(tmp_path_factory.mktemp("drive") / "root", make_tables(), SPLITS)


@pytest.fixture(scope="session")
def data(drive: Path, tmp_path_factory: pytest.TempPathFactory) -> NuscenesData:
    """A config that finds pairs of both kinds in `drive`, with its index built."""
    config = NuscenesData(
        root=drive,
        cameras=tuple(YAWS),
        clip=ClipConfig(frames=1, height_px=16, width_px=32),
        pairs=PairConfig(min_overlap=0.1, max_overlap=0.95, max_gap_s=1.0, min_motion_m=0.5),
        augment=AugmentConfig(),
        index_folder=tmp_path_factory.mktemp("index"),
    )
    build_index(config)
    return config
