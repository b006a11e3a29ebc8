"""Curves over steps as SVG inside a page.

Drawn by matplotlib, which nuscenes-devkit brings anyhow: its SVG needs no script, so that a page opens offline, in mail and under any
content policy, at 10 to 40 kB a plot, where plotly would add 4 MB to each page. What a pointer would say is written instead: names and
last values stand beside the plot, as text of the page (`page.html`). Axes take the colour of the page's text, be it dark or light.

A curve of more than POINTS steps is drawn as the means of as many equal groups, over a band from the least to the greatest value of
each, so that no spike is lost. Values that are no numbers, as those of a skipped step, are gaps.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

POINTS = 400
Kind = Literal["training", "held-out", "probe", "trivial answer"]
COLOURS: Mapping[Kind, str] = {
    "training": to_hex("tab:blue"),
    "held-out": to_hex("tab:orange"),
    "probe": to_hex("tab:green"),
    "trivial answer": to_hex("tab:gray"),
}
_SIZE_INCHES = (4.2, 2.2)
_FEW = 40
"""Up to so many points are marked."""
_INK = "#7a7b7c"
_STYLE = {
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "odonata",  # the same curves, the same bytes
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), _INK),
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Curve:
    """What one figure came to, step by step."""

    kind: Kind
    steps: Float[np.ndarray, " n"]
    values: Float[np.ndarray, " n"]
    """NaN where there was no number."""

    @property
    def last(self) -> float | None:
        """Its last number."""
        numbers = self.values[np.isfinite(self.values)]
        return float(numbers[-1]) if len(numbers) else None


def read_curve(kind: Kind, lines: Sequence[Mapping[str, Any]], values: Sequence[float | None]) -> Curve:
    """The curve of `values`, one of each of the journal's `lines`; None is no number."""
    steps = np.array([line["step"] for line in lines], dtype=np.float64)
    return Curve(kind, steps, np.array([np.nan if value is None else value for value in values], dtype=np.float64))


def draw_curves(curves: Sequence[Curve]) -> str:
    """An <svg> of `curves` on common axes."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for curve in curves:
            _draw_curve(axes, curve, COLOURS[curve.kind])
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter("{x:.5g}")
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
    return _for_a_page(file.getvalue())


def thin(curve: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, means, least and greatest values of at most POINTS groups."""
    if len(curve.steps) <= POINTS:
        return curve.steps, curve.values, curve.values, curve.values
    groups = [np.ma.masked_invalid(group) for group in np.array_split(curve.values, POINTS)]
    means, least, greatest = (
        np.array([np.ma.filled(measure(group), np.nan) for group in groups]) for measure in (np.ma.mean, np.ma.min, np.ma.max)
    )
    return np.array([group.mean() for group in np.array_split(curve.steps, POINTS)]), means, least, greatest


def _draw_curve(axes: Axes, curve: Curve, colour: str) -> None:
    steps, means, least, greatest = thin(curve)
    axes.plot(steps, means, color=colour, linewidth=1.4, marker="o" if len(steps) <= _FEW else None, markersize=2.5)
    if len(steps) < len(curve.steps):
        axes.fill_between(steps, least, greatest, color=colour, alpha=0.2, linewidth=0)


def _for_a_page(svg: str) -> str:
    """The element alone: a page knows its namespaces, and its text has a colour."""
    element = svg[svg.index("<svg") :]
    for name in ('xmlns="http://www.w3.org/2000/svg"', 'xmlns:xlink="http://www.w3.org/1999/xlink"'):
        element = element.replace(name, "")
    return element.replace(_INK, "currentColor")
