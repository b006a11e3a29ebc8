"""Curves: what is drawn is what was recorded, gaps and spikes included."""

import math
import re

import numpy as np
import pytest

from trainer.view.curves import COLOURS, POINTS, Curve, Kind, draw_curves, read_curve, thin


def curve(values: list[float | None], kind: Kind = "training") -> Curve:
    return read_curve(kind, [{"step": step} for step in range(1, len(values) + 1)], values)


def drawn_lines(svg: str) -> list[str]:
    """The paths of curves, which are the thick ones."""
    return re.findall(r'<path d="([^"]*)"[^>]*stroke-width: 1\.4', svg)


def test_a_short_curve_is_drawn_as_it_is() -> None:
    steps, means, least, greatest = thin(curve([3.0, None, 1.0]))
    np.testing.assert_array_equal(steps, [1, 2, 3])
    for values in (means, least, greatest):
        np.testing.assert_array_equal(values, [3, math.nan, 1])


def test_a_long_curve_is_means_and_its_band_keeps_every_spike() -> None:
    values: list[float | None] = [float(step % 10) for step in range(10 * POINTS)]
    values[4 * POINTS + 1] = 1e6
    values[:10] = [None] * 10
    steps, means, least, greatest = thin(curve(values))
    assert len(steps) == POINTS
    assert math.isnan(means[0]) and math.isnan(greatest[0])
    assert means[1] == pytest.approx(4.5) and (least[1], greatest[1]) == (0, 9)
    assert steps[1] == pytest.approx(sum(range(11, 21)) / 10)
    assert np.nanmax(greatest) == 1e6


def test_a_gap_parts_a_curve_in_two() -> None:
    whole, parted = (
        drawn_lines(draw_curves([curve(values)]))[0] for values in ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, None, 4.0, 5.0])
    )
    assert whole.count("M") == 1 and parted.count("M") == 2


def test_each_curve_has_a_line_of_its_colour() -> None:
    svg = draw_curves([curve([1.0, 2.0]), curve([2.0, 1.0], "held-out")])
    assert len(drawn_lines(svg)) == 2
    assert COLOURS["training"] in svg and COLOURS["held-out"] in svg


def test_a_drawing_is_an_element_of_a_page_without_scripts_and_references() -> None:
    svg = draw_curves([curve([1.0, 2.0])])
    assert svg.startswith("<svg") and "http" not in svg and "<script" not in svg
    assert "currentColor" in svg


@pytest.mark.parametrize("values", [[], [None], [None, None], [1.0], [0.0, 0.0], [1e30, -1e30]])
def test_a_curve_of_little_or_nothing_is_drawn(values: list[float | None]) -> None:
    numbers = [value for value in values if value is not None]
    assert draw_curves([curve(values)]).rstrip().endswith("</svg>")
    assert curve(values).last == (numbers[-1] if numbers else None)


def test_the_last_number_passes_over_what_is_none() -> None:
    assert curve([1.0, 2.5, None]).last == 2.5
