"""One panel of a dashboard on axes of matplotlib, in the manner of Grafana's dark theme.

Left to whom: where panels stand and what they were answered is `picture`'s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from monitoring.dashboards.answers import Series, Span
from monitoring.dashboards.units import format_value

BACKGROUND, PANEL, INK, FAINT, GRID = "#111217", "#181b1f", "#ccccdc", "#8e8e9c", "#2c2f34"
_LINES = ("#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#37872d", "#fade2a", "#c4162a")
COLOURS = {"green": "#73bf69", "red": "#f2495c", "blue": "#5794f2"}
_FIGURE_SHADES = {"green": "#37872d", "red": "#c4162a"}
_LEGEND_ENTRIES = 8
_EVERY_S = (10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400)
"""Seconds between two ticks of the clock."""


@dataclass(frozen=True)
class Mark:
    """What happened at some moments: an annotation."""

    name: str
    colour: str
    times_s: tuple[float, ...]


def draw_curves(axes: Axes, panel: Mapping[str, Any], series: Sequence[Series], span: Span, marks: Sequence[Mark]) -> None:
    """Lines, or areas on top of each other, with the threshold where it falls into the picture, annotations and a legend."""
    unit = panel["fieldConfig"]["defaults"]["unit"]
    _style_axes(axes, span, unit)
    if not any(np.isfinite(one.values).any() for one in series):
        axes.text(0.5, 0.5, "No data", transform=axes.transAxes, ha="center", va="center", color=FAINT, fontsize=11)
        axes.set_yticks([])
        return
    if _is_stacked(panel):
        stack = np.nan_to_num([one.values for one in series])
        axes.stackplot(span.times_s, stack, colors=[_colour(place) for place in range(len(series))], alpha=0.65, linewidth=0)
    for place, one in enumerate(series):
        values = np.nansum([other.values for other in series[: place + 1]], axis=0) if _is_stacked(panel) else one.values
        axes.plot(
            span.times_s, values, color=_colour(place), linewidth=1.2, label=f"{one.legend}  {format_value(one.last, unit)}"
        )
    _give_room(axes)
    _draw_threshold(axes, panel)
    for mark in marks:
        for time_s in mark.times_s:
            axes.axvline(time_s, color=COLOURS[mark.colour], linestyle=(0, (2, 3)), linewidth=1, alpha=0.9)
            axes.plot([time_s], [0], transform=axes.get_xaxis_transform(), marker="^", color=COLOURS[mark.colour], clip_on=False)
    _draw_legend(axes)


def draw_figure(axes: Axes, panel: Mapping[str, Any], series: Sequence[Series]) -> None:
    """The last value in large letters on the colour of its threshold, over a small curve of how it came about."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    last = series[0].last if series else float("nan")
    defaults = panel["fieldConfig"]["defaults"]
    shade = PANEL if np.isnan(last) else _FIGURE_SHADES[judge(last, defaults["thresholds"]["steps"])]
    axes.set_facecolor(shade)
    if not np.isnan(last):
        _draw_spark(axes, series[0].values)
    axes.text(
        0.5, 0.52, format_value(last, defaults["unit"]), ha="center", va="center", color="white", fontsize=21, weight="bold"
    )


def draw_table(axes: Axes, panel: Mapping[str, Any], columns: Mapping[str, Sequence[Series]]) -> None:
    """A row for each run; `columns` are in the order of the panel's."""
    axes.axis("off")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    styles = {style["matcher"]["options"]: _properties(style) for style in panel["fieldConfig"]["overrides"]}
    rows = sorted({one.labels["run"] for series in columns.values() for one in series if not np.isnan(one.values[-1])})
    titles = ["run", *columns]
    lefts = [0.01, *(0.16 + 0.84 * place / len(columns) for place in range(len(columns)))]
    for title, left in zip(titles, lefts, strict=True):
        axes.text(left, 0.93, title, color=COLOURS["blue"], fontsize=9, va="top")
    for row, run in enumerate(rows):
        top = 0.72 - 0.2 * row
        axes.axhline(top + 0.06, color=GRID, linewidth=0.8)
        axes.text(lefts[0], top, run, color=INK, fontsize=9.5, va="top")
        for left, (title, series) in zip(lefts[1:], columns.items(), strict=True):
            value = next((one.values[-1] for one in series if one.labels["run"] == run), float("nan"))
            text, style = format_value(value, styles[title]["unit"]), styles[title]["thresholds"]["steps"]
            axes.text(left, top, text, color=FAINT if np.isnan(value) else COLOURS[judge(value, style)], fontsize=9.5, va="top")


def judge(value: float, steps: Sequence[Mapping[str, Any]]) -> str:
    """The colour that Grafana's threshold steps give to `value`."""
    return str([step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1])


def _style_axes(axes: Axes, span: Span, unit: str) -> None:
    axes.set_facecolor(PANEL)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=7.5, length=0)
    axes.set_xlim(span.start_s, span.end_s)
    axes.xaxis.set_major_locator(FixedLocator(_choose_moments(span)))
    clock = "%H:%M:%S" if span.end_s - span.start_s < 300 else "%H:%M"
    axes.xaxis.set_major_formatter(FuncFormatter(lambda time_s, _: datetime.fromtimestamp(time_s, UTC).strftime(clock)))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 1.5, 3, 6, 10] if unit == "s" else None))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value, unit)))


def _choose_moments(span: Span) -> list[float]:
    """Round moments of the day, at most seven."""
    length_s = span.end_s - span.start_s
    every_s = next((each for each in _EVERY_S if length_s / each <= 7), _EVERY_S[-1])
    return list(np.arange(np.ceil(span.start_s / every_s) * every_s, span.end_s, every_s))


def _give_room(axes: Axes) -> None:
    """From zero where nothing is below it, and not so close that a constant fills the panel."""
    low, high = axes.dataLim.intervaly
    low = min(0.0, low) if low > 0 and low < 0.5 * high else low
    room = 0.06 * (high - low) or 0.1 * abs(high) or 0.01
    axes.set_ylim(low - (room if low else 0.0), high + room)


def _draw_threshold(axes: Axes, panel: Mapping[str, Any]) -> None:
    first, second = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    bottom, top = axes.get_ylim()
    if bottom <= second["value"] <= top:
        colour = "red" if "red" in (first["color"], second["color"]) else second["color"]
        axes.axhline(second["value"], color=COLOURS[colour], linestyle=(0, (6, 4)), linewidth=1.1)


def _draw_legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    shown = [label if len(label) <= 46 else f"{label[:45]}…" for label in labels[:_LEGEND_ENTRIES]]
    if len(labels) > _LEGEND_ENTRIES:
        shown[-1] = f"and {len(labels) - _LEGEND_ENTRIES + 1} more"
    legend = axes.legend(
        handles[:_LEGEND_ENTRIES],
        shown,
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.1),
        ncols=2 if max(map(len, shown)) > 24 else 3,
        frameon=False,
        fontsize=7.5,
        handlelength=1.0,
        columnspacing=1.4,
        labelspacing=0.3,
        borderpad=0,
    )
    for text in legend.get_texts():
        text.set_color(INK)


def _draw_spark(axes: Axes, values: np.ndarray) -> None:
    low, high = np.nanmin(values), np.nanmax(values)
    heights = 0.03 + 0.22 * (values - low) / (high - low or 1.0)
    places = np.linspace(0, 1, len(values))
    axes.fill_between(places, 0, heights, color=to_rgba("white", 0.18), linewidth=0)
    axes.plot(places, heights, color=to_rgba("white", 0.6), linewidth=1)


def _properties(style: Mapping[str, Any]) -> dict[str, Any]:
    return {each["id"]: each["value"] for each in style["properties"]}


def _is_stacked(panel: Mapping[str, Any]) -> bool:
    return bool(panel["fieldConfig"]["defaults"].get("custom", {}).get("stacking", {}).get("mode") == "normal")


def _colour(place: int) -> str:
    return _LINES[place % len(_LINES)]
