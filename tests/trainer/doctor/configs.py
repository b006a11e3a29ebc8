"""The run that the doctor's tests look at."""

from pathlib import Path

import yaml

from tests.runs import SMALL_RUN
from trainer.config.load import override_run_config
from trainer.config.run import RunConfig


def config_of(root: Path, folder: Path, *overrides: str) -> RunConfig:
    """The small run on the data in `root`, which lives in `folder`."""
    content = yaml.safe_load(SMALL_RUN)
    content["data"]["root"], content["run"]["uri"] = str(root), str(folder / "run")
    return override_run_config(content, overrides, origin="the small run")
