"""A small data set, and the unmodified devkit looking at it."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from trainer.synthesis.config import SynthesisConfig
from trainer.synthesis.dataroot import VERSION, synthesize

if TYPE_CHECKING:
    from nuscenes import NuScenes

CONFIG = SynthesisConfig(scenes=2, duration_s=2.0, scale=0.12, seed=5)


@pytest.fixture(scope="session")
def town(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes; nobody may change them."""
    root = tmp_path_factory.mktemp("town")
    synthesize(root, CONFIG, workers=2, progress=False)
    return root


@pytest.fixture(scope="session")
def devkit(town: Path) -> "NuScenes":
    from nuscenes import NuScenes

    return NuScenes(version=VERSION, dataroot=str(town), verbose=False)
