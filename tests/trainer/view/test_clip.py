"""The page of a clip: its cameras as they stand on the car, what is known of the street, and in a browser."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer.view.test_page import CHROMIUM, Page, browse
from trainer.config.load import parse_data_config
from trainer.errors import CheckpointError, ConfigError
from trainer.store.open import open_store
from trainer.view.clip import arrange_rig, draw_points_above, find_clip, open_surround, paint_lidar, write_clip_page

CAMERAS = ["CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"]


def data_of(root: Path) -> list[str]:
    return [f"root={root}", "clip.height_px=32", "clip.width_px=48"]


def looking(*degrees: float) -> np.ndarray:
    """ego_from_cam of cameras that look so far to the left of straight ahead."""
    poses = np.zeros((len(degrees), 4, 4))
    for pose, angle in zip(poses, np.radians(degrees), strict=True):
        pose[:2, 2] = math.cos(angle), math.sin(angle)
    return poses


def test_cameras_lie_on_the_page_as_they_stand_on_the_car() -> None:
    assert arrange_rig(looking(0, -55, -110, 180, 110, 55)) == [[5, 0, 1], [4, 3, 2]]
    assert arrange_rig(looking(10, -10)) == [[0, 1]]
    assert arrange_rig(looking(170)) == [[0]]


def test_a_point_is_painted_where_it_is_seen_and_the_nearer_one_on_top() -> None:
    pix_from_lidar = torch.tensor([[[10.0, 0, 5, 0], [0, 10, 5, 0], [0, 0, 1, 0]]])  # z is ahead, the middle is (5, 5)
    both = torch.tensor([[0.0, 0, 5], [0, 0, 50], [0, 0, -5]])
    black = torch.zeros(1, 3, 10, 10)
    painted = paint_lidar(black, both, pix_from_lidar)
    near = paint_lidar(black, both[:1], pix_from_lidar)
    assert torch.equal(painted, near) and near[0, :, 5, 5].any()
    assert not near[0, :, 0, 0].any()
    assert not paint_lidar(black, both[2:], pix_from_lidar).any()


def test_from_above_ahead_is_up_and_left_is_left() -> None:
    ground = draw_points_above(torch.tensor([[25.0, 0, 0], [0, 25, 0], [0, 80, 0]]), torch.eye(4))
    bright = torch.nonzero(ground[0] > 0.1).tolist()
    assert bright == [[200, 400], [400, 200]]


def test_the_page_of_a_clip_has_every_camera_twice_and_its_calibration(city: Path) -> None:
    page = Page(write_clip_page("0", data=[*data_of(city), "clip.frames=2"]))
    assert len([word for word in page.words["h2"] if word.startswith("Frame")]) == 2
    assert page.words["figcaption"] == [*CAMERAS, *CAMERAS, "From above"] * 2
    assert page.tags.count("img") == 2 * 13
    assert page.words["h2"][-1] == "Calibration and times"
    assert sorted(word for word in page.words["td"] if word.startswith("CAM_")) == sorted(CAMERAS * 2)
    legends = [word for word in page.words["span"] if "from above" not in word]
    assert len(legends) == 2 and all(re.search(r"[1-9]\d* lines of the map$", legend) for legend in legends)
    assert not [one for one in page.references if not one.startswith("data:")]


def test_a_clip_goes_by_its_number_or_its_name_and_a_wrong_one_names_near_ones(city: Path) -> None:
    source = open_surround(parse_data_config({"kind": "synthetic", "train_split": "all"}, data_of(city)))
    name = source.name(3)
    assert find_clip(source, "3") == find_clip(source, name) == find_clip(source, " ".join(name.split()[:2])) == 3
    near = " ".join(source.name(0).split()[:2])
    for wrong in (near[:-1], near + "0", str(len(source))):
        with pytest.raises(
            ConfigError, match=rf"the clip {wrong} was to be shown .*; numbers are 0 to {len(source) - 1}, near names scene-"
        ):
            find_clip(source, wrong)
    with pytest.raises(ConfigError, match=near):
        find_clip(source, near[:-1])


def test_data_that_cannot_be_shown_is_a_sentence(city: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key; did you mean root"):
        write_clip_page("0", data=["rooot=city"])
    with pytest.raises(ConfigError, match=r"data\.root: required and not given; give --data root="):
        write_clip_page("0", data=["kind=synthetic"])
    with pytest.raises(CheckpointError, match=r"there is no config\.yaml; give a run, or --data alone"):
        write_clip_page("0", run=open_store(tmp_path))


def test_a_real_clip_has_its_boxes_and_points(keyframe_dataroot: Path) -> None:
    page = Page(write_clip_page("scene-0061", data=data_of(keyframe_dataroot)))
    assert page.words["h1"] == ["scene-0061 1532402927612460"]
    assert "34,688" in page.words["dd"]
    assert any("34,688 points by height, 68 boxes" in word for word in page.words["span"])


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on PATH; launch/system.sh installs it")
def test_a_browser_shows_the_page_of_a_clip_and_has_nothing_to_say(city: Path, tmp_path: Path) -> None:
    path = tmp_path / "clip.html"
    path.write_text(write_clip_page("0", data=data_of(city)))
    document, console = browse(path)
    assert not console
    assert Page(document).tags.count("img") == 13
