"""A small data set of each rig, and the unmodified devkit looking at it."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from trainer.synthesis.config import SynthesisConfig
from trainer.synthesis.dataroot import VERSION, synthesize
from trainer.synthesis.rig import RIGS, RigName

if TYPE_CHECKING:
    from nuscenes import NuScenes

CONFIG = SynthesisConfig(scenes=2, duration_s=2.0, scale=0.12, seed=5)
CONFIGS: dict[RigName, SynthesisConfig] = {
    "nuscenes": CONFIG,
    "five": SynthesisConfig(scenes=1, duration_s=1.0, scale=0.12, seed=5, rig="five"),
    "seven": SynthesisConfig(scenes=1, duration_s=1.0, scale=0.1, seed=5, rig="seven"),
}
WITH_LIDAR = [name for name, rig in RIGS.items() if rig.lidar]

OpenTown = Callable[[RigName], "NuScenes"]


@pytest.fixture(scope="session")
def open_town(tmp_path_factory: pytest.TempPathFactory) -> OpenTown:
    """The devkit on the data set of a rig; nobody may change it."""

    @cache
    def open_town(rig: RigName) -> "NuScenes":
        from nuscenes import NuScenes

        root = tmp_path_factory.mktemp(rig)
        synthesize(root, CONFIGS[rig], workers=2, progress=False)
        return NuScenes(version=VERSION, dataroot=str(root), verbose=False)

    return open_town


@pytest.fixture(scope="session")
def devkit(open_town: OpenTown) -> "NuScenes":
    return open_town("nuscenes")


@pytest.fixture(scope="session")
def town(devkit: "NuScenes") -> Path:
    """Two scenes of nuScenes' own rig; nobody may change them."""
    return Path(devkit.dataroot)
