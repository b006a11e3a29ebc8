"""Contact sheets: sizes that follow from the images, every picture in its place, words on them."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.trainer.observe_fakes import sheets
from trainer.observe import pictures
from trainer.observe.pictures import Pictures, draw_sheet, lay_out, spread_frames
from trainer.store.open import open_store

LEFT = pictures.MARGIN_PX + pictures.LABEL_PX
TOP = pictures.MARGIN_PX + 2 * pictures.LINE_PX


def plain(
    colour: tuple[float, float, float], *, clips: int = 1, frames: int = 1, height: int = 32, width: int = 48
) -> np.ndarray:
    return np.broadcast_to(np.array(colour, dtype=np.float32)[:, None, None], (clips, frames, 3, height, width)).copy()


def test_a_sheet_is_as_large_as_its_rows_and_columns() -> None:
    columns = sheets(clips=3, frames=4, height=32, width=48)["croco"]
    # 4 columns of 48 are 192 px, five times which is the first multiple above 900
    row_width, row_height, rows = 48 * 5, 32 * 5, 3 * pictures.MAX_FRAMES
    width = LEFT + 4 * row_width + 3 * pictures.FRAME_GAP_PX + pictures.MARGIN_PX
    gaps = 2 * pictures.CLIP_GAP_PX + (rows - 3) * pictures.FRAME_GAP_PX
    assert draw_sheet(columns, caption="").size == (width, TOP + rows * row_height + gaps + pictures.MARGIN_PX)


def test_small_images_are_enlarged_by_a_whole_factor_and_stay_sharp() -> None:
    board = np.indices((32, 48)).sum(axis=0) % 2
    image = np.broadcast_to(board, (1, 1, 3, 32, 48)).astype(np.float32)
    sheet = np.asarray(draw_sheet({"a": image, "b": image}, caption=""))
    factor = math.ceil(pictures.MIN_WIDTH_PX / (2 * 48))
    seen = sheet[TOP : TOP + 32 * factor, LEFT : LEFT + 48 * factor, 0]
    assert (seen == np.kron(board, np.ones((factor, factor))) * 255).all()


def test_large_images_are_reduced_to_a_width_that_fits_a_screen() -> None:
    layout = lay_out(dict.fromkeys("abcd", (900, 1600)), clips=1, frames=1)
    assert sum(layout.widths) == pictures.MAX_WIDTH_PX
    assert layout.widths[0] / layout.row_height == pytest.approx(1600 / 900, rel=0.01)


def test_columns_of_different_sizes_share_the_height_of_a_row() -> None:
    layout = lay_out({"a": (32, 48), "b": (64, 64)}, clips=1, frames=1)
    assert layout.widths[0] / layout.row_height == pytest.approx(48 / 32)
    assert layout.widths[1] / layout.row_height == pytest.approx(1)


def test_a_title_that_is_wider_than_its_images_is_not_cut() -> None:
    wide, narrow = plain((0, 0, 0), height=32, width=256), plain((0, 0, 0), height=32, width=4)
    short, long = (draw_sheet({"a": wide, title: narrow}, caption="") for title in ("b", "what is learnt of it, seen from above"))
    assert long.width > short.width and short.height == long.height
    right = np.asarray(long)[pictures.MARGIN_PX + pictures.LINE_PX : TOP, -pictures.MARGIN_PX :]
    assert (right == 255).all(), "the title ends before the margin"


def test_every_image_stands_in_its_column_and_row() -> None:
    clips, frames = 3, 2
    columns = {}
    for place, title in enumerate(("masked input", "target")):
        columns[title] = plain((0, 0, 0), clips=clips, frames=frames)
        for clip in range(clips):
            for frame in range(frames):
                columns[title][clip, frame] = (place * 6 + clip * 2 + frame) / 12
    sheet = draw_sheet(columns, caption="")
    layout = lay_out({"a": (32, 48), "b": (32, 48)}, clips=clips, frames=frames)
    for place in range(2):
        for clip in range(clips):
            for frame in range(frames):
                middle = layout.left(place) + layout.widths[place] // 2, layout.top(clip, frame) + layout.row_height // 2
                grey = round((place * 6 + clip * 2 + frame) / 12 * 255)
                assert sheet.getpixel(middle) == (grey, grey, grey)


def test_frames_are_spread_from_the_first_to_the_last() -> None:
    assert spread_frames(1) == [0]
    assert spread_frames(2) == [0, 1]
    assert spread_frames(16)[0] == 0
    assert spread_frames(16)[-1] == 15
    assert len(spread_frames(16)) == pictures.MAX_FRAMES


def test_a_column_with_one_frame_stands_beside_the_first() -> None:
    sheet = draw_sheet({"clip": plain((0, 0, 0), frames=2), "image": plain((0, 1, 0))}, caption="")
    layout = lay_out({"a": (32, 48), "b": (32, 48)}, clips=1, frames=2)
    x = layout.left(1) + layout.widths[1] // 2
    assert sheet.getpixel((x, layout.top(0, 0) + layout.row_height // 2)) == (0, 255, 0)
    assert sheet.getpixel((x, layout.top(0, 1) + layout.row_height // 2)) == (255, 255, 255)


def test_pixels_out_of_range_are_clipped_and_those_not_finite_are_magenta() -> None:
    image = plain((-1, 0.5, 2))
    image[0, 0, 1, 16:] = math.nan
    sheet = draw_sheet({"a": image}, caption="")
    layout = lay_out({"a": (32, 48)}, clips=1, frames=1)
    x = layout.left(0) + layout.widths[0] // 2
    assert sheet.getpixel((x, layout.top(0, 0) + layout.row_height // 4)) == (0, 128, 255)
    assert sheet.getpixel((x, layout.top(0, 0) + layout.row_height * 3 // 4)) == (255, 0, 255)


def test_each_column_has_a_title_and_each_row_a_label() -> None:
    columns = {"one": plain((1, 1, 1), clips=2, frames=2), "two": plain((1, 1, 1), clips=2, frames=2)}
    dark = np.asarray(draw_sheet(columns, caption="croco after step 1").convert("L")) < 128
    layout = lay_out({"a": (32, 48), "b": (32, 48)}, clips=2, frames=2)
    assert dark[: pictures.MARGIN_PX + pictures.LINE_PX].any(), "no caption"
    for column in range(2):
        left = layout.left(column)
        assert dark[pictures.MARGIN_PX + pictures.LINE_PX : TOP, left : left + layout.widths[column]].any(), "no title"
    for clip in range(2):
        for row in range(2):
            top = layout.top(clip, row)
            assert dark[top : top + layout.row_height, pictures.MARGIN_PX : LEFT].any(), "no label"


def test_sheets_lie_in_the_run_folder_by_step_and_objective(tmp_path: Path) -> None:
    Pictures(open_store(tmp_path)).pictures(100, sheets() | {"mim4d": sheets()["croco"]})
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["step-000100-croco.png", "step-000100-mim4d.png"]
    with Image.open(tmp_path / "pictures" / "step-000100-croco.png") as image:
        assert image.format == "PNG"
        assert image.width >= pictures.MIN_WIDTH_PX
