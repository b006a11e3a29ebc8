"""From a list of charts to a Grafana dashboard, through Grafana's own Foundation SDK.

A chart says what it shows, in which unit, and from which value on that is a matter for concern; where they stand, colours and
variables follow from that. `$run` is one run or several; every expression narrows to it.

Left to whom: what is worth a chart is decided in the files beside this one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from grafana_foundation_sdk.builders import common, timeseries
from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.builders import prometheus as queries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as styles
from grafana_foundation_sdk.models import dashboard as shapes

Unit = Literal["s", "bytes", "percentunit", "short", "cps", "Bps", "flops", "dateTimeFromNow"]
"""Grafana's names of units; cps is counts a second."""

_SOURCE = shapes.DataSourceRef(type_val="prometheus", uid="$datasource")
_WIDTH, _HEIGHT, _COLUMNS = 12, 8, 24
_RUNBOOKS = "docs/runbooks/"


@dataclass(frozen=True)
class Threshold:
    """From `value` on, or below it, somebody should look."""

    value: float
    is_bad: Literal["above", "below"] = "above"


@dataclass(frozen=True)
class Chart:
    """Lines over time."""

    title: str
    meaning: str
    unit: Unit
    threshold: Threshold
    lines: tuple[tuple[str, str], ...]
    """Legend and PromQL expression of each."""
    runbook: str | None = None
    """Name of the alert whose page says what to do."""


@dataclass(frozen=True)
class Board:
    """A dashboard."""

    uid: str
    title: str
    question: str
    """That it answers."""
    charts: tuple[Chart, ...]
    is_of_one_run: bool = True


def to_json(board: Board) -> str:
    """What Grafana imports."""
    return JSONEncoder(sort_keys=True, indent=2).encode(_build(board).build()) + "\n"


def _build(board: Board) -> grafana.Dashboard:
    built = (
        grafana.Dashboard(board.title)
        .uid(board.uid)
        .description(board.question)
        .tags(["odonata"])
        .refresh("30s")
        .time("now-6h", "now")
        .tooltip(shapes.DashboardCursorSync.CROSSHAIR)
        .with_variable(grafana.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(_run_variable(multi=not board.is_of_one_run))
        .annotation(_mark("restart", 'changes(odonata_starts{run=~"$run"}[2m]) > 0', colour="red"))
        .annotation(_mark("checkpoint", 'changes(odonata_last_checkpoint_step{run=~"$run",rank="0"}[1m]) > 0', colour="blue"))
        .link(
            grafana.DashboardLink("Odonata")
            .type(shapes.DashboardLinkType.DASHBOARDS)
            .tags(["odonata"])
            .keep_time(True)
            .include_vars(True)
        )
    )
    for place, chart in enumerate(board.charts):
        built = built.with_panel(_panel(chart, place))
    return built


def _run_variable(*, multi: bool) -> grafana.QueryVariable:
    variable = grafana.QueryVariable("run").label("Run").datasource(_SOURCE).query("label_values(odonata_step, run)")
    variable = variable.refresh(shapes.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(shapes.VariableSort.ALPHABETICAL_ASC)
    return variable.multi(True).include_all(True).all_value(".*") if multi else variable


def _mark(name: str, expression: str, *, colour: str) -> grafana.AnnotationQuery:
    return grafana.AnnotationQuery().name(name).datasource(_SOURCE).enable(True).icon_color(colour).expr(expression)


def _panel(chart: Chart, place: int) -> timeseries.Panel:
    row, column = divmod(place, _COLUMNS // _WIDTH)
    panel = (
        timeseries.Panel()
        .title(chart.title)
        .description(chart.meaning)
        .unit(chart.unit)
        .datasource(_SOURCE)
        .grid_pos(shapes.GridPos(h=_HEIGHT, w=_WIDTH, x=_WIDTH * column, y=_HEIGHT * row))
        .thresholds(grafana.ThresholdsConfig().mode(shapes.ThresholdsMode.ABSOLUTE).steps(_steps(chart.threshold)))
        .thresholds_style(common.GraphThresholdsStyleConfig().mode(styles.GraphThresholdsStyleMode.DASHED))
    )
    if chart.runbook:
        panel = panel.links([_link(chart.runbook)])
    for letter, (legend, expression) in zip("ABCDEFGH", chart.lines, strict=False):
        panel = panel.with_target(queries.Dataquery().ref_id(letter).expr(expression).legend_format(legend))
    return panel


def _steps(threshold: Threshold) -> Sequence[shapes.Threshold]:
    below, above = ("green", "red") if threshold.is_bad == "above" else ("red", "green")
    return [shapes.Threshold(value=None, color=below), shapes.Threshold(value=threshold.value, color=above)]


def _link(runbook: str) -> grafana.DashboardLink:
    link = grafana.DashboardLink("What to do").type(shapes.DashboardLinkType.LINK)
    return link.url(f"{_RUNBOOKS}{runbook}.md").target_blank(True)
