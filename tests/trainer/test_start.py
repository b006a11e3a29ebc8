"""Starting a run: what is refused, and what is said, before the first step."""

import logging
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from models.pretraining import build_preparations
from tests.runs import SMALL_RUN
from tests.trainer.data.dataroot import SPEED_M_S, YAWS, make_tables, write_dataroot
from trainer.config.load import load_run_config, parse_run_config
from trainer.config.run import RunConfig
from trainer.errors import DataError
from trainer.start import open_sources, warn_of_fewer_negatives

RUNS = Path(__file__).parents[2] / "launch" / "runs"


def simipu_on(data: dict[str, object]) -> RunConfig:
    """The small run of the tests, with SimIPU alone on other data."""
    small = yaml.safe_load(SMALL_RUN)
    changed = {"data": data, "objectives": [{"kind": "simipu", "points": "tiny"}], "encoder": {"size": "tiny", "patch_px": 8}}
    return parse_run_config({**small, **changed, "run": {"uri": "unused"}}, origin="a test")


def open_sources_of(config: RunConfig) -> None:
    open_sources(config, build_preparations(config.objectives, config.token_grid, config.encoder, cameras=config.cameras))


def test_image_pairs_cannot_serve_an_objective_that_contrasts_them_with_points(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.jpg")
    (tmp_path / "pairs.txt").write_text("a.jpg a.jpg\n")
    config = simipu_on({"kind": "image_pairs", "root": str(tmp_path), "clip": {"height_px": 32, "width_px": 32}})
    with pytest.raises(
        DataError, match=r"objective simipu needs .* data\.kind image_pairs offers .*missing: .*points_lidar.*take another"
    ):
        open_sources_of(config)


def test_a_dataroot_without_lidar_cannot_serve_simipu(tmp_path: Path) -> None:
    tables = make_tables()
    tables["sample_data"] = [row for row in tables["sample_data"] if "LIDAR" not in row["token"]]
    root = write_dataroot(tmp_path / "root", tables, {"train": list(SPEED_M_S)})
    data = {
        "kind": "nuscenes",
        "root": str(root),
        "cameras": list(YAWS),
        "val_split": None,
        "index_folder": str(tmp_path / "index"),
    }
    config = simipu_on({**data, "clip": {"frames": 1, "height_px": 32, "width_px": 32}})
    with pytest.raises(DataError, match=r"an objective needs LiDAR and .* has no LiDAR sweep; take data that has some"):
        open_sources_of(config)


@pytest.mark.parametrize(
    ("run", "accumulated", "says"),
    [
        ("simipu_tiny", 1, None),
        ("simipu_tiny", 4, "simipu takes its negatives from one micro-step, and 4 of them .* of 2 samples, not of all 8"),
        ("simipu_reference_base", 4, None),  # its negatives are those of one rank anyhow
        ("croco_video_tiny", 4, None),
    ],
)
def test_accumulation_is_warned_of_where_samples_are_compared_with_each_other(
    run: str, accumulated: int, says: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_run_config(RUNS / f"{run}.yaml")
    with caplog.at_level(logging.WARNING):
        warn_of_fewer_negatives(config, accumulated=accumulated)
    assert len(caplog.messages) == bool(says)
    if says:
        assert re.search(says, caplog.messages[0])
