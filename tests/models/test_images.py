"""Images: normalised and back, and colours that change as a sequence of three operations would change them, in any order."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.images import denormalise, normalise, paint_lines, plan_recolouring, recolour, turn_up

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LUMA = np.array([0.299, 0.587, 0.114])
SHAPE = (3, 2, 2, 3, 4, 5)

seeds = st.integers(0, 2**32 - 1)
factors = st.tuples(*[st.floats(0.625, 1.375, width=32)] * 3)


def clips(seed: int = 0, low: int = 0, high: int = 256) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(low, high, SHAPE, dtype=np.uint8))


def unchanged(images: Tensor) -> Tensor:
    return torch.ones(len(images), 3)


def shown(images: Tensor, colours: Tensor) -> np.ndarray:
    """From 0 to 255, after normalisation."""
    return 255 * denormalise(normalise(images, colours)).double().numpy()


def jitter_one_by_one(clip: np.ndarray, colours: tuple[float, ...], order: tuple[int, ...]) -> np.ndarray:
    """Brightness, contrast and saturation of a clip T V 3 H W, each by its definition, in this order."""
    rgb = np.moveaxis(clip.astype(np.float64), -3, -1)
    for change in order:
        factor, luma = colours[change], (rgb @ LUMA)[..., None]
        match change:
            case 0:
                rgb = factor * rgb
            case 1:
                rgb = factor * rgb + (1 - factor) * luma.mean()
            case 2:
                rgb = factor * rgb + (1 - factor) * luma
    return np.moveaxis(rgb, -1, -3)


def test_images_are_normalised_by_channel_and_back() -> None:
    images = clips()
    expected = np.stack([(images.numpy()[:, :, :, c] / 255 - MEAN[c]) / STD[c] for c in range(3)], axis=3)
    kept = images.clone()
    normalised = normalise(images, unchanged(images))
    torch.testing.assert_close(normalised, torch.from_numpy(expected).float(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(denormalise(normalised), images / 255, atol=1e-6, rtol=0)
    assert torch.equal(images, kept)


def test_denormalising_leaves_its_input_alone() -> None:
    images = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    kept = images.clone()
    denormalise(images)
    assert torch.equal(images, kept)


@given(seeds, factors)
def test_where_nothing_is_clipped_the_jitter_is_its_three_parts_in_any_order(seed: int, colours: tuple[float, ...]) -> None:
    images = clips(seed, 90, 120)  # 1.4 times brighter, further from grey and more colourful stays within bytes
    found = shown(images, torch.tensor(colours).expand(len(images), 3))
    for order in itertools.permutations(range(3)):
        expected = np.stack([jitter_one_by_one(clip, colours, order) for clip in images.numpy()])
        assert 0 < expected.min() <= expected.max() < 255
        np.testing.assert_allclose(found, expected, atol=2e-3)


@given(seeds, factors)
def test_what_leaves_the_range_is_clipped_once_at_the_end(seed: int, colours: tuple[float, ...]) -> None:
    images = clips(seed)
    expected = np.stack([jitter_one_by_one(clip, colours, (0, 1, 2)) for clip in images.numpy()]).clip(0, 255)
    np.testing.assert_allclose(shown(images, torch.tensor(colours).expand(len(images), 3)), expected, atol=2e-3)


@given(seeds)
def test_factors_of_one_change_no_bit(seed: int) -> None:
    images = clips(seed)
    plan = plan_recolouring(images, unchanged(images))
    assert torch.equal(recolour(images.float(), plan, dim=-3), images.float())


@given(seeds, factors)
def test_each_clip_has_its_own_factors_and_its_own_grey(seed: int, colours: tuple[float, ...]) -> None:
    images = clips(seed)
    of_each = torch.tensor([colours, (1.0, 1.0, 1.0), (0.7, 1.3, 0.8)])
    together = normalise(images, of_each)
    for clip in range(len(images)):
        assert torch.equal(together[clip : clip + 1], normalise(images[clip : clip + 1], of_each[clip : clip + 1]))


def test_all_frames_and_cameras_of_a_clip_are_pulled_towards_one_grey() -> None:
    """A dark and a bright frame stay apart by the factor: each towards its own mean, they would each keep its mean."""
    images = torch.zeros(1, 2, 2, 3, 4, 4, dtype=torch.uint8)
    images[:, 0], images[:, 1] = 50, 150
    changed = shown(images, torch.tensor([[1.0, 0.5, 1.0]]))
    assert changed[:, 0].mean() == pytest.approx(75, abs=1e-3)
    assert changed[:, 1].mean() == pytest.approx(125, abs=1e-3)


@given(seeds, factors)
def test_values_read_from_an_image_change_as_the_image_does(seed: int, colours: tuple[float, ...]) -> None:
    images = clips(seed)
    plan = plan_recolouring(images, torch.tensor(colours).expand(len(images), 3))
    whole = recolour(images.float(), plan, dim=-3)
    values = images[:, 1, 0, :, 2, 1:4].movedim(1, -1)  # (B, 3 places, 3)
    torch.testing.assert_close(
        recolour(values.float(), plan, dim=-1), whole[:, 1, 0, :, 2, 1:4].movedim(1, -1), atol=1e-4, rtol=1e-6
    )


def test_a_map_is_turned_until_the_car_drives_up() -> None:
    seen = torch.zeros(1, 1, 4, 6)  # rows run to the left, columns ahead
    seen[0, 0, 3, 5] = 1  # ahead and to the left
    turned = turn_up(seen)
    assert turned.shape == (1, 1, 6, 4)
    assert turned.nonzero().tolist() == [[0, 0, 0, 0]]


def test_lines_are_painted_where_they_lie_and_later_ones_over_earlier_ones() -> None:
    across, ahead = torch.tensor([(2.0, -3.0), (2.0, 3.0)]), torch.tensor([(-5.0, 1.0), (5.0, 1.0)])
    red, blue = torch.eye(3)[0], torch.eye(3)[2]
    picture = paint_lines(torch.stack([across, ahead]), torch.stack([red, blue]), (10.0, 5.0), px_per_m=2)
    assert picture.shape == (3, 40, 20)
    assert picture[:, 16, 6].tolist() == [1, 0, 0]  # 2 m ahead, 2 m to the left
    assert picture[:, 16, 8].tolist() == picture[:, 24, 8].tolist() == [0, 0, 1]  # 1 m to the left
    assert picture[:, 0].min() == 1
    assert paint_lines(torch.zeros(0, 2, 2), torch.zeros(0, 3), (10.0, 5.0)).shape == (3, 100, 50)
