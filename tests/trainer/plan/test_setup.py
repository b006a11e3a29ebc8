"""What the plan believes of DeepSpeed is what the shipped files say."""

import json
from pathlib import Path

import pytest

from trainer.plan.setup import ZeroOptions

ZERO_FILES = sorted((Path(__file__).parents[3] / "launch" / "deepspeed").glob("zero?.json"))


@pytest.mark.parametrize("path", ZERO_FILES, ids=lambda path: path.stem)
def test_the_shipped_options_are_the_assumed_ones(path: Path) -> None:
    assert ZeroOptions.read(json.loads(path.read_text())["zero_optimization"]) == ZeroOptions()


def test_options_that_are_given_are_read() -> None:
    assert ZeroOptions.read({"stage": 2, "reduce_bucket_size": 1e6}).reduce_bucket_size == 1_000_000
