"""What tests of layouts share: an encoder size of three small blocks, so that a ViT takes milliseconds."""

import pytest

import models.config
from tests.models.layouts.vits import SHAPE


@pytest.fixture(autouse=True)
def tiny_is_tinier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of published sizes would take a minute."""
    monkeypatch.setitem(models.config.ENCODER_SHAPES, "tiny", SHAPE)
