"""Positions against their formulas, written here once more and token by token."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.config import DECODER_SHAPES, ENCODER_SHAPES, Grid
from models.positions import (
    ROPE_BASE,
    LearnedTable,
    PositionTables,
    Rotation,
    coordinates,
    resample_table,
    rotary_parts,
    rotary_table,
    rotate,
    sincos_table,
)

CPU = torch.device("cpu")
grids = st.builds(Grid, st.integers(1, 3), st.integers(1, 2), st.integers(1, 4), st.integers(1, 4))


def sincos(place: int, width: int) -> list[float]:
    angles = [place / 10000 ** (i / (width / 2)) for i in range(width // 2)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


@given(grids)
def test_tokens_lie_in_the_order_time_camera_row_column(grid: Grid) -> None:
    expected = [(t, v, y, x) for t in range(grid.t) for v in range(grid.v) for y in range(grid.h) for x in range(grid.w)]
    assert [tuple(row) for row in coordinates(grid)] == expected
    assert len(expected) == grid.tokens


def test_the_first_half_of_an_image_table_says_the_column_and_the_second_the_row() -> None:
    table = sincos_table(Grid(1, 1, 3, 5), 16, CPU)
    for y in range(3):
        for x in range(5):
            expected = torch.tensor(sincos(x, 8) + sincos(y, 8))
            torch.testing.assert_close(table[y * 5 + x], expected, atol=1e-7, rtol=0)


@given(grids)
def test_time_and_camera_add_their_own_terms_and_none_at_zero(grid: Grid) -> None:
    table = sincos_table(grid, 16, CPU)
    image = sincos_table(Grid(1, 1, grid.h, grid.w), 16, CPU)
    for t in range(grid.t):
        for v in range(grid.v):
            terms = torch.tensor([sincos(t, 16), sincos(v, 16)]).sum(0) - 2 * torch.tensor(sincos(0, 16))
            start = (t * grid.v + v) * grid.h * grid.w
            torch.testing.assert_close(table[start : start + len(image)], image + terms, atol=1e-6, rtol=0)
    assert torch.equal(table[: len(image)], image)


@given(st.integers(0, 200), st.integers(0, 200), st.booleans())
def test_rotation_is_a_complex_product_of_each_part(y: int, x: int, has_time: bool) -> None:
    head_width = 16 if has_time else 8
    grid = Grid(2, 1, y + 1, x + 1)
    table = rotary_table(grid, head_width, CPU, has_time=has_time)
    token = grid.tokens - 1  # (t, y, x) = (1, y, x)
    values = torch.linspace(-1, 2, head_width, dtype=torch.float64)
    found = rotate(values.view(1, 1, -1), Rotation(table.cos[token:], table.sin[token:], table.parts)).flatten().double()
    places = (1, y, x) if has_time else (y, x)
    expected, start = [], 0
    for place, part in zip(places, table.parts, strict=True):
        a, b = values[start : start + part].view(2, -1).numpy()
        turned = (a + 1j * b) * np.exp(1j * place / ROPE_BASE ** (2 * np.arange(part // 2) / part))
        expected += [*turned.real, *turned.imag]
        start += part
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
def test_scores_depend_on_the_difference_of_positions_alone(y: int, x: int, dy: int, dx: int) -> None:
    grid = Grid(1, 1, 8, 8)
    table = rotary_table(grid, 16, CPU, has_time=False)
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def turned(values: torch.Tensor, y: int, x: int) -> torch.Tensor:
        place = slice(y * 8 + x, y * 8 + x + 1)
        return rotate(values, Rotation(table.cos[place], table.sin[place], table.parts))

    here = (turned(q, y + dy, x + dx) * turned(k, y, x)).sum()
    at_zero = (turned(q, dy, dx) * turned(k, 0, 0)).sum()
    torch.testing.assert_close(here, at_zero, atol=1e-5, rtol=0)


def test_an_image_head_gives_its_first_half_to_rows_and_its_second_to_columns() -> None:
    table = rotary_table(Grid(1, 1, 2, 2), 8, CPU, has_time=False)
    cos = table.cos[:, 0].view(2, 2, 8)  # (y, x, D)
    assert torch.equal(cos[0, 0, :4], cos[0, 1, :4])
    assert not torch.equal(cos[0, 0, :4], cos[1, 0, :4])
    assert torch.equal(cos[0, 0, 4:], cos[1, 0, 4:])
    assert not torch.equal(cos[0, 0, 4:], cos[0, 1, 4:])


def test_a_video_head_of_64_gives_16_to_time_and_24_to_each_direction() -> None:
    assert rotary_parts(64, has_time=True) == (16, 24, 24)
    assert rotary_parts(64, has_time=False) == (32, 32)


@pytest.mark.parametrize("shape", [*ENCODER_SHAPES.values(), *DECODER_SHAPES.values()])
@pytest.mark.parametrize("has_time", [False, True])
def test_parts_of_every_shipped_head_fill_it_with_pairs(shape: object, has_time: bool) -> None:
    head_width = shape.width // shape.heads  # type: ignore[attr-defined]
    parts = rotary_parts(head_width, has_time=has_time)
    assert sum(parts) == head_width
    assert all(part > 0 and part % 2 == 0 for part in parts)


def test_cameras_of_one_instant_share_their_angles() -> None:
    one, two = (rotary_table(Grid(1, v, 2, 3), 16, CPU, has_time=True) for v in (1, 2))
    assert torch.equal(two.cos, one.cos.repeat(2, 1, 1))


@given(st.data())
def test_a_masked_clip_takes_the_rotations_of_its_visible_tokens(data: st.DataObject) -> None:
    table = rotary_table(Grid(2, 1, 2, 2), 16, CPU, has_time=True)
    visible = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, 7), min_size=3, max_size=3), min_size=1, max_size=3)))
    taken = table.of(visible, len(visible))
    assert torch.equal(taken.cos, table.cos[visible.flatten()])
    assert torch.equal(table.of(None, 2).sin, table.sin.repeat(2, 1, 1))


def test_bf16_tokens_turn_by_float32_angles() -> None:
    grid, generator = Grid(1, 1, 1, 128), torch.Generator().manual_seed(0)
    table = rotary_table(grid, 64, CPU, has_time=False)
    x = torch.rand(128, 1, 64, generator=generator).mul(2).sub(1).bfloat16()
    exact = rotate(x.double(), Rotation(table.cos.double(), table.sin.double(), table.parts))
    turned = rotate(x, table)
    assert turned.dtype == torch.bfloat16
    # |values| < sqrt 2 < 2, where neighbouring bf16 numbers are 2^-7 apart: rounding is all that may be lost
    assert (turned.double() - exact.double()).abs().max() <= 2**-8 + 1e-6


def test_a_module_makes_its_tables_once_and_of_one_kind() -> None:
    grid, shape = Grid(1, 1, 2, 2), DECODER_SHAPES["tiny"]
    for kind, other in (("rope", "added"), ("sincos", "rotation")):
        tables = PositionTables(kind, shape, has_time=False)
        mine = tables.rotation if kind == "rope" else tables.added
        assert mine(grid, CPU) is mine(grid, CPU)
        assert getattr(tables, other)(grid, CPU) is None


def test_a_learned_table_of_the_clips_own_grid_is_taken_as_it_is_by_every_camera() -> None:
    table = LearnedTable(Grid(2, 1, 3, 4), 8)
    added = table(Grid(2, 2, 3, 4)).view(2, 2, 3, 4, 8)
    assert torch.equal(added[:, 0], table.weight)
    assert torch.equal(added[:, 1], table.weight)


def test_resampling_keeps_what_does_not_vary_and_follows_what_varies_linearly_in_time() -> None:
    flat = torch.full((2, 3, 4, 1), 5.0)
    torch.testing.assert_close(resample_table(flat, Grid(3, 1, 7, 5)), torch.full((3, 7, 5, 1), 5.0))
    times = torch.arange(4.0)[:, None, None, None].expand(4, 2, 2, 1)
    # Half as many places lie half-way between the old ones: means of neighbours.
    torch.testing.assert_close(resample_table(times, Grid(2, 1, 2, 2))[:, 0, 0, 0], torch.tensor([0.5, 2.5]))


def test_resampling_to_more_places_and_back_gives_nearly_the_table_again() -> None:
    y, x = torch.meshgrid(torch.linspace(0, 3, 14), torch.linspace(0, 2, 14), indexing="ij")
    smooth = torch.stack([y.sin(), x.cos()], dim=-1)[None]
    again = resample_table(resample_table(smooth, Grid(1, 1, 28, 35)), Grid(1, 1, 14, 14))
    assert (again - smooth).abs().max() < 0.03
