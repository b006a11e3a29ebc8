"""Image pairs from a plain folder: read in order, and a list that is wrong is named with its line."""

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.trainer.data.dataroot import ramp
from trainer.config.data import AugmentConfig, ClipConfig, ImagePairsData
from trainer.data.build import build_source
from trainer.data.image_pairs import ImagePairSource
from trainer.data.pair_source import PAIR_FIELDS
from trainer.errors import ClipError, DataError

LISTING = """\
# target reference
left/a.png right/a.jpg

  left/b.png   right/b.jpg
left/gone.png right/a.jpg
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in (
        ("left/a.png", (40, 30)),
        ("right/a.jpg", (80, 24)),
        ("left/b.png", (17, 33)),
        ("right/b.jpg", (64, 64)),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(ramp(*size)).save(tmp_path / name)
    (tmp_path / "pairs.txt").write_text(LISTING)
    return tmp_path


def source_of(folder: Path, *, augment: bool = True, **changes: object) -> ImagePairSource:
    config = ImagePairsData(root=folder, clip=ClipConfig(height_px=16, width_px=24), **changes)
    source = build_source(config, "train", PAIR_FIELDS, augment=augment)
    assert isinstance(source, ImagePairSource)
    return source


def test_pairs_of_any_size_become_samples_of_one_shape(folder: Path) -> None:
    source = source_of(folder)
    assert len(source) == 3
    for index, line in ((0, 2), (1, 4)):
        sample = source.load(index, np.random.default_rng(0))
        assert set(sample) == source.offers
        assert sample["target_images"].shape == sample["reference_images"].shape == (1, 1, 3, 16, 24)
        assert sample["scene"] == line
    assert source.name(1) == "line 4 left/b.png"
    assert source.describe()["samples"] == 3


def test_the_same_stream_gives_the_same_pair_and_flips_go_together(folder: Path) -> None:
    flipped = dataclasses.replace(source_of(folder), augment=AugmentConfig(flip_probability=1.0, colour_jitter=0.0))
    for view in ("target_images", "reference_images"):
        first, again = (flipped.load(0, np.random.default_rng(3))[view][0, 0] for _ in range(2))
        np.testing.assert_array_equal(first, again)
        assert first[0, 8, 0] > first[0, 8, -1], "red falls to the right in a mirrored ramp"


def test_without_augmentation_the_stream_does_not_matter(folder: Path) -> None:
    source = source_of(folder, augment=False)
    first, second = (source.load(0, np.random.default_rng(seed)) for seed in (1, 2))
    np.testing.assert_array_equal(first["target_images"], second["target_images"])
    np.testing.assert_array_equal(first["reference_images"], second["reference_images"])


def test_a_source_survives_pickling(folder: Path) -> None:
    source = source_of(folder)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(
        copy.load(0, np.random.default_rng(1))["target_images"],
        source.load(0, np.random.default_rng(1))["target_images"],
    )


def test_a_missing_image_is_a_clip_error_that_names_the_line(folder: Path) -> None:
    with pytest.raises(ClipError, match=r"clip line 5 left/gone\.png: .*left/gone\.png cannot be read"):
        source_of(folder).load(2, np.random.default_rng(0))


def test_a_file_that_is_no_image_is_a_clip_error(folder: Path) -> None:
    (folder / "right" / "a.jpg").write_text("no picture")
    with pytest.raises(ClipError, match=r"clip line 2 .*right/a\.jpg is no image"):
        source_of(folder).load(0, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a.png b.png\na.png\n", r"pairs\.txt line 2 was to name two images and has 1 columns: 'a\.png'"),
        ("\n# x\na.png b.png c.png\n", r"line 3 .* has 3 columns: 'a\.png b\.png c\.png'"),
        ("\n# nothing here\n", r"was to list image pairs and has none in its 2 lines"),
        ("", r"has none in its 0 lines"),
    ],
)
def test_a_list_that_is_wrong_is_named_with_its_line(folder: Path, text: str, sentence: str) -> None:
    (folder / "pairs.txt").write_text(text)
    with pytest.raises(DataError, match=sentence):
        source_of(folder)


def test_a_list_that_is_missing_or_no_text_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"more\.txt was to be read and cannot be: .*No such file.*data\.train_list"):
        source_of(folder, train_list="more.txt")
    (folder / "pairs.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"pairs\.txt was to be read and cannot be: .*utf-8"):
        source_of(folder)


def test_a_validation_list_is_optional(folder: Path) -> None:
    config = ImagePairsData(root=folder)
    assert build_source(config, "val", PAIR_FIELDS, augment=False) is None
    (folder / "val.txt").write_text("left/a.png right/a.jpg\n")
    held_out = build_source(config.model_copy(update={"val_list": "val.txt"}), "val", PAIR_FIELDS, augment=False)
    assert held_out is not None and len(held_out) == 1
