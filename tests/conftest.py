"""What all tests share: a clean environment, a small synthetic city, the two sets of outside data, and hypothesis without deadlines.

The keyframe and the oracles are not part of the project (the first is under a non-commercial licence). Tests that need them
skip with a reason where they are absent; the variables below say where they are, a folder `shared` beside the checkout is the default.
"""

import logging
import os
from collections.abc import Iterator

# Before torch is loaded: models here are small, several tests run at a time, and threads that wait would spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from pathlib import Path

import pytest
from hypothesis import settings

from tests.whole import LONG

ROOT = Path(__file__).parents[1]
_LAUNCHER_PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "TORCHELASTIC_", "GROUP_", "ROLE_", "MASTER_", "NCCL_")
_LAUNCHER_NAMES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "CUDA_LAUNCH_BLOCKING"}

settings.register_profile("odonata", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("odonata")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first."""
    items.sort(
        key=lambda item: f"{item.path.parent.relative_to(ROOT / 'tests')}/{item.path.stem.removeprefix('test_')}" not in LONG
    )


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test inherits what a launcher, or another test, has set."""
    for name in os.environ:
        if name in _LAUNCHER_NAMES or name.startswith(_LAUNCHER_PREFIXES):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def clean_logging() -> Iterator[None]:
    """No test inherits the log handler of a command that another has run: it writes to what was stderr then, and is closed now."""
    yield
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.name == "odonata"]:
        root.removeHandler(handler)


@pytest.fixture(scope="session")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three short scenes of a synthetic city, one of them held out."""
    from trainer.synthesis.config import SynthesisConfig
    from trainer.synthesis.dataroot import synthesize

    root = tmp_path_factory.mktemp("city")
    synthesize(root, SynthesisConfig(scenes=3, duration_s=2.0, scale=0.06), workers=2, progress=False)
    return root


@pytest.fixture(scope="session")
def keyframe_dataroot() -> Path:
    """One real nuScenes keyframe as a dataroot."""
    return _outside_data("ODONATA_NUSCENES_KEYFRAME", "nuscenes-keyframe")


@pytest.fixture(scope="session")
def oracle_dir() -> Path:
    """Inputs, weights and outputs of the official CroCo model."""
    return _outside_data("ODONATA_CROCO_ORACLES", "oracles")


def _outside_data(variable: str, name: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT.parent / "shared" / name))
    if not folder.is_dir():
        pytest.skip(f"{name} is not at {folder}; {variable} says where it is")
    return folder
