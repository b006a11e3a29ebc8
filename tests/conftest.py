from pathlib import Path

import pytest

R = Path(__file__).parents[1]


@pytest.fixture
def oracle_dir():
    return R.parent / "shared" / "oracles"


@pytest.fixture
def keyframe_dataroot():
    return R.parent / "shared" / "nuscenes-keyframe"
