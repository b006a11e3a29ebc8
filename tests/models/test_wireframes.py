"""Wireframes: edges where projection puts them, nothing from behind a camera, and the car drives up in a picture from above."""

import pytest
import torch

from models.wireframes import draw_boxes, draw_from_above

FOCAL, WIDTH, HEIGHT = 50.0, 100, 80
AHEAD = torch.tensor([[WIDTH / 2, -FOCAL, 0, 0], [HEIGHT / 2, 0, -FOCAL, 0], [1, 0, 0, 0]])
"""A camera at the origin that looks along x: (x, y, z) falls on (50 - 50 y / x, 40 - 50 z / x)."""
CAR, WALKER = 0, 5


def box(x: float, y: float = 0.0, yaw: float = 0.0) -> torch.Tensor:
    """4 m long, 2 m wide and high."""
    return torch.tensor([[x, y, 0.0, 4.0, 2.0, 2.0, yaw, 0.0, 0.0]])


def drawn(*boxes: torch.Tensor, kinds: tuple[int, ...] = (CAR,), matrix: torch.Tensor = AHEAD) -> torch.Tensor:
    """Which pixels have a colour, H W."""
    images = draw_boxes(torch.zeros(1, 3, HEIGHT, WIDTH), torch.cat(boxes), torch.tensor(kinds), matrix[None])
    return images[0].amax(0) > 0


def bounds(shown: torch.Tensor) -> tuple[int, int, int, int]:
    rows, columns = shown.nonzero().unbind(1)
    return int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())


def test_a_box_ahead_is_as_large_as_its_near_face() -> None:
    shown = drawn(box(12.0))  # its near face is 10 m away: 1 m is 5 px
    top, bottom, left, right = bounds(shown)
    assert (top, left) == (35, 45) and bottom in (44, 45) and right in (54, 55)
    assert not shown[38:42, 47:49].any()  # the middle of the face is left as it is


def test_nothing_is_drawn_of_what_is_behind_a_camera_and_the_front_part_of_what_is_beside_it() -> None:
    assert not drawn(box(-12.0)).any()
    beside = drawn(box(0.5, 1.6))
    assert beside.any() and not beside[:, WIDTH // 2 :].any()


def test_the_nearer_box_lies_over_the_farther_one() -> None:
    both = torch.cat([box(12.0), box(22.0)])
    images = draw_boxes(torch.zeros(1, 3, HEIGHT, WIDTH), both, torch.tensor([CAR, WALKER]), AHEAD[None])
    swapped = draw_boxes(torch.zeros(1, 3, HEIGHT, WIDTH), both.flip(0), torch.tensor([WALKER, CAR]), AHEAD[None])
    assert torch.equal(images, swapped)


def test_from_above_ahead_is_up_and_left_is_left() -> None:
    ahead = draw_from_above(torch.zeros(3, 200, 200), box(25.0), torch.tensor([CAR]), 50.0).amax(0) > 0
    left = draw_from_above(torch.zeros(3, 200, 200), box(0.0, 25.0), torch.tensor([CAR]), 50.0).amax(0) > 0
    ahead[90:110, 90:110] = left[90:110, 90:110] = False  # the car itself
    assert bounds(ahead) == pytest.approx(
        (46, 54, 98, 102), abs=1
    )  # 23 to 27 m ahead, half a metre a pixel, of which borders are two's
    assert bounds(left) == pytest.approx((96, 104, 48, 52), abs=1)


def test_without_boxes_images_stay_as_they_are() -> None:
    images = torch.rand(2, 3, 8, 8)
    nothing = torch.zeros(0, 9), torch.zeros(0, dtype=torch.long)
    assert torch.equal(draw_boxes(images, *nothing, AHEAD.expand(2, -1, -1)), images)
