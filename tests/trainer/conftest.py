"""What tests of whole runs share: a small synthetic city, and runs that several tests look at."""

from pathlib import Path

import pytest

from tests.runs import Runner


@pytest.fixture(scope="session")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three short scenes of a synthetic city, one of them held out."""
    from trainer.synthesis.config import SynthesisConfig
    from trainer.synthesis.dataroot import synthesize

    root = tmp_path_factory.mktemp("city")
    synthesize(root, SynthesisConfig(scenes=3, duration_s=2.0, scale=0.06), workers=2, progress=False)
    return root


@pytest.fixture(scope="session")
def runner(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("runs"), city)
