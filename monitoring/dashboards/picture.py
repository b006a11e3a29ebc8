"""A dashboard as a person sees it, without Grafana: its committed JSON, its real queries, a real Prometheus.

    .venv/bin/python -m monitoring.dashboards.picture http://localhost:9090 --run first --minutes 30 --out pictures

Panels stand where the JSON puts them; their queries are asked as Grafana asks them, a few hundred points over the time that is shown;
units, thresholds, legends, stacking and annotations are those of the JSON. What Grafana has beside that (hovering, zooming) is not here.

Left to whom: how one panel looks is `drawing`.
"""

import argparse
import json
import textwrap
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from monitoring.dashboards.answers import Series, Span, ask
from monitoring.dashboards.drawing import BACKGROUND, FAINT, GRID, INK, PANEL, Mark, draw_curves, draw_figure, draw_table

FOLDER = Path(__file__).parent
_POINTS = 300
_WIDTH_PX, _COLUMNS, _ROW_PX, _GAP_PX, _HEADER_PX = 1680, 24, 36, 4, 66
_DPI = 100
_INSETS_PX = {"timeseries": (66, 70, 16, 34), "stat": (0, 0, 0, 0), "table": (6, 4, 6, 34)}
"""Left, bottom, right and top of what is drawn in a panel: room for ticks, legend and title."""


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prometheus", help="address of a Prometheus that has scraped runs")
    parser.add_argument("--run", required=True, help="name of the run that is shown where a dashboard shows one")
    parser.add_argument("--minutes", type=float, default=30.0, help="how far back from now")
    parser.add_argument("--out", type=Path, required=True, help="folder for dashboard_run.png and its like")
    arguments = parser.parse_args()
    draw_all(arguments.prometheus, arguments.out, run=arguments.run, seconds=60 * arguments.minutes)


def draw_all(url: str, folder: Path, *, run: str, seconds: float) -> None:
    """A picture of every dashboard beside this file, over the last `seconds`; those of several runs show all."""
    end_s = time.time()
    span = Span(end_s - seconds, end_s, seconds / _POINTS)
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(FOLDER.glob("odonata-*.json")):
        board = json.loads(path.read_text())
        several = any(each.get("multi") for each in board["templating"]["list"] if each["name"] == "run")
        picture = folder / f"dashboard_{path.stem.removeprefix('odonata-')}.png"
        draw(board, url, span, picture, run=".*" if several else run)


def draw(board: Mapping[str, Any], url: str, span: Span, path: Path, *, run: str) -> None:
    """One dashboard into the PNG `path`; OSError where Prometheus refuses a query."""
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    height_px = _HEADER_PX + rows * _ROW_PX + _GAP_PX
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(_WIDTH_PX / _DPI, height_px / _DPI), dpi=_DPI, facecolor=BACKGROUND)
        FigureCanvasAgg(figure)
        marks = [_find_mark(each, url, span, run) for each in board["annotations"]["list"]]
        _draw_header(figure, board, span, marks, run)
        for panel in board["panels"]:
            answers = [
                ask(url, fill(target["expr"], run), span, legend=target.get("legendFormat", "")) for target in panel["targets"]
            ]
            _draw_panel(figure, panel, answers, span, marks)
        figure.savefig(path)


def fill(expression: str, run: str) -> str:
    """`expression` with its variables filled in: one run or several, all ranks."""
    return expression.replace("$run", run).replace("$rank", ".*")


def _find_mark(annotation: Mapping[str, Any], url: str, span: Span, run: str) -> Mark:
    """The moments at which the annotation's query begins to hold; what holds at the first is not known to begin."""
    series = ask(url, fill(annotation["expr"], run), span)
    holds = np.isfinite([one.values for one in series]).any(axis=0) if series else np.zeros(len(span.times_s), dtype=bool)
    begins = holds[1:] & ~holds[:-1]
    return Mark(annotation["name"], annotation["iconColor"], tuple(span.times_s[1:][begins].tolist()))


def _draw_panel(
    figure: Figure, panel: Mapping[str, Any], answers: Sequence[Sequence[Series]], span: Span, marks: Sequence[Mark]
) -> None:
    left, bottom, right, top = _edges_px(figure, panel["gridPos"])
    insets = _INSETS_PX[panel["type"]]
    _draw_frame(figure, (left, bottom, right, top))
    axes = _add_axes(figure, (left + insets[0], bottom + insets[1], right - insets[2], top - insets[3]))
    match panel["type"]:
        case "timeseries":
            draw_curves(axes, panel, [one for series in answers for one in series], span, marks)
        case "stat":
            draw_figure(axes, panel, [one for series in answers for one in series])
        case "table":
            titles = [style["matcher"]["options"] for style in panel["fieldConfig"]["overrides"]]
            draw_table(axes, panel, dict(zip(titles, answers, strict=True)))
    _write(figure, left + 10, top - 9, panel["title"], INK, 10, weight="bold")


def _draw_header(figure: Figure, board: Mapping[str, Any], span: Span, marks: Sequence[Mark], run: str) -> None:
    height_px = figure.get_size_inches()[1] * _DPI
    chosen = {"run": run if run != ".*" else "All", "rank": "All"}
    variables = [each for each in board["templating"]["list"] if each["name"] in chosen]
    words = [f"{each['label']}: {chosen[each['name']]}" for each in variables]
    words += [f"▲ {mark.name}s: {len(mark.times_s)}" for mark in marks]
    _write(figure, 12, height_px - 12, board["title"], INK, 14, weight="bold")
    _write(figure, 12, height_px - 38, textwrap.shorten(board["description"], 120), FAINT, 9.5)
    shown = [datetime.fromtimestamp(time_s, UTC).strftime("%H:%M:%S") for time_s in (span.start_s, span.end_s)]
    _write(figure, _WIDTH_PX - 12, height_px - 14, f"{shown[0]} to {shown[1]} UTC", INK, 9.5, ha="right")
    _write(figure, _WIDTH_PX - 12, height_px - 38, "     ".join(words), FAINT, 9.5, ha="right")


def _edges_px(figure: Figure, place: Mapping[str, int]) -> tuple[float, float, float, float]:
    """Left, bottom, right, top; pixels from the lower left."""
    column_px = _WIDTH_PX / _COLUMNS
    top = figure.get_size_inches()[1] * _DPI - _HEADER_PX - place["y"] * _ROW_PX
    left = place["x"] * column_px
    right, bottom = left + place["w"] * column_px, top - place["h"] * _ROW_PX
    return left + _GAP_PX, bottom + _GAP_PX, right - _GAP_PX, top - _GAP_PX


def _add_axes(figure: Figure, edges: tuple[float, float, float, float]) -> Axes:
    left, bottom, right, top = edges
    width, height = figure.get_size_inches() * _DPI
    return figure.add_axes((left / width, bottom / height, (right - left) / width, (top - bottom) / height))


def _draw_frame(figure: Figure, edges: tuple[float, float, float, float]) -> None:
    left, bottom, right, top = edges
    box = FancyBboxPatch(
        (left, bottom),
        right - left,
        top - bottom,
        boxstyle="round,pad=0,rounding_size=3",
        facecolor=PANEL,
        edgecolor=GRID,
        zorder=-1,
    )
    box.set_transform(None)
    figure.add_artist(box)


def _write(figure: Figure, x: float, y: float, text: str, colour: str, size: float, **style: Any) -> None:
    width, height = figure.get_size_inches() * _DPI
    figure.text(x / width, y / height, text, color=colour, fontsize=size, va="top", **style)


if __name__ == "__main__":
    main()
