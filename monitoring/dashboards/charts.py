"""From a list of charts to a Grafana dashboard, through Grafana's own Foundation SDK.

A chart says what it shows, in which unit, and from which value on that is a matter for concern; where they stand, colours and
variables follow from that: they fill rows from left to right, each kind in a size of its own. `$run` is one run or several, `$rank`
narrows charts that tell ranks apart; every expression narrows to the run.

Left to whom: what is worth a chart is decided in `boards`, how one looks without Grafana is `picture`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grafana_foundation_sdk.builders import common, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.builders import prometheus as queries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as styles
from grafana_foundation_sdk.models import dashboard as shapes
from grafana_foundation_sdk.models import prometheus as query_shapes

Unit = Literal["s", "bytes", "percentunit", "short", "cps", "Bps"]
"""Grafana's names of units; cps is counts a second."""
Kind = Literal["lines", "areas", "figure"]
"""Over time; over time and stacked, where the sum means something; the last value, on the colour that its threshold gives it."""

_SOURCE = shapes.DataSourceRef(type_val="prometheus", uid="$datasource")
_COLUMNS = 24
_SIZES = {"lines": (8, 8), "areas": (8, 8), "figure": (4, 4), "table": (24, 6)}
"""Columns and rows of Grafana's grid."""
_RUNBOOKS = "docs/runbooks/"
_RESTARTED = (
    'max by (run) (odonata_starts{run=~"$run"}) > max by (run) (max_over_time(odonata_starts{run=~"$run"}[1h] offset 1m))'
)
_COMMITTED = 'changes(odonata_last_checkpoint_step{run=~"$run",rank="0"}[1m]) > 0'


@dataclass(frozen=True)
class Threshold:
    """From `value` on, or below it, somebody should look."""

    value: float
    is_bad: Literal["above", "below"] = "above"


@dataclass(frozen=True)
class Chart:
    """Values over time, or the last of them."""

    title: str
    meaning: str
    unit: Unit
    threshold: Threshold
    lines: tuple[tuple[str, str], ...]
    """Legend and PromQL expression of each."""
    runbook: str | None = None
    """Name of the alert whose page says what to do."""
    kind: Kind = "lines"


@dataclass(frozen=True)
class Column:
    """Of a table: one value a run."""

    title: str
    expression: str
    """Summed or not, by run alone."""
    unit: Unit
    threshold: Threshold


@dataclass(frozen=True)
class Table:
    """A row a run, as it is now."""

    title: str
    meaning: str
    columns: tuple[Column, ...]
    kind = "table"


@dataclass(frozen=True)
class Board:
    """A dashboard."""

    uid: str
    title: str
    question: str
    """That it answers."""
    charts: tuple[Chart | Table, ...]
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
        .with_variable(_variable("run", "Run", "label_values(odonata_step, run)", multi=not board.is_of_one_run))
        .annotation(_mark("restart", _RESTARTED, colour="red"))
        .annotation(_mark("checkpoint", _COMMITTED, colour="blue"))
        .link(
            grafana.DashboardLink("Odonata")
            .type(shapes.DashboardLinkType.DASHBOARDS)
            .tags(["odonata"])
            .keep_time(True)
            .include_vars(True)
        )
    )
    if "$rank" in str(board.charts):
        built = built.with_variable(_variable("rank", "Rank", 'label_values(odonata_step{run=~"$run"}, rank)', multi=True))
    for chart, place in zip(board.charts, _lay_out(board.charts), strict=True):
        built = built.with_panel(_build_table(chart, place) if isinstance(chart, Table) else _build_chart(chart, place))
    return built


def _variable(name: str, label: str, query: str, *, multi: bool) -> grafana.QueryVariable:
    variable = grafana.QueryVariable(name).label(label).datasource(_SOURCE).query(query)
    variable = variable.refresh(shapes.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(shapes.VariableSort.ALPHABETICAL_ASC)
    return variable.multi(True).include_all(True).all_value(".*") if multi else variable


def _mark(name: str, expression: str, *, colour: str) -> grafana.AnnotationQuery:
    return grafana.AnnotationQuery().name(name).datasource(_SOURCE).enable(True).icon_color(colour).expr(expression)


def _lay_out(charts: Sequence[Chart | Table]) -> Iterator[shapes.GridPos]:
    """Rows from left to right, each as high as its first chart."""
    x = y = row_height = 0
    for chart in charts:
        width, height = _SIZES[chart.kind]
        if x + width > _COLUMNS or (x and height != row_height):
            x, y = 0, y + row_height
        row_height = height
        yield shapes.GridPos(h=height, w=width, x=x, y=y)
        x += width


def _build_chart(chart: Chart, place: shapes.GridPos) -> Any:
    panel = _build_figure() if chart.kind == "figure" else _build_curves(is_stacked=chart.kind == "areas")
    panel = _describe(panel, chart, place).unit(chart.unit).thresholds(_to_thresholds(chart.threshold))
    if chart.runbook:
        panel = panel.links([_link(chart.runbook)])
    for letter, (legend, expression) in zip("ABCDEFGH", chart.lines, strict=False):
        panel = panel.with_target(queries.Dataquery().ref_id(letter).expr(expression).legend_format(legend))
    return panel


def _build_curves(*, is_stacked: bool) -> timeseries.Panel:
    dashed = common.GraphThresholdsStyleConfig().mode(styles.GraphThresholdsStyleMode.DASHED)
    panel = timeseries.Panel().thresholds_style(dashed)
    if is_stacked:
        panel = panel.stacking(common.StackingConfig().mode(styles.StackingMode.NORMAL)).fill_opacity(40)
    return panel


def _build_figure() -> stat.Panel:
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    return (
        stat.Panel()
        .reduce_options(last)
        .color_mode(styles.BigValueColorMode.BACKGROUND)
        .graph_mode(styles.BigValueGraphMode.AREA)
    )


def _build_table(content: Table, place: shapes.GridPos) -> table.Panel:
    """Instant queries, merged by run; each column has a unit and a colour of its own."""
    first = content.columns[0]
    panel = _describe(table.Panel(), content, place).unit(first.unit).thresholds(_to_thresholds(first.threshold))
    names = {}
    for letter, column in zip("ABCDEFGHIJ", content.columns, strict=False):
        query = queries.Dataquery().ref_id(letter).expr(column.expression).instant()
        panel = panel.with_target(query.format(query_shapes.PromQueryFormat.TABLE))
        panel = panel.override_by_name(column.title, _style_column(column))
        names[f"Value #{letter}"] = column.title
    merged = shapes.DataTransformerConfig(id_val="merge", options={})
    named = shapes.DataTransformerConfig(id_val="organize", options={"excludeByName": {"Time": True}, "renameByName": names})
    return panel.with_transformation(merged).with_transformation(named)


def _style_column(column: Column) -> list[shapes.DynamicConfigValue]:
    thresholds = {"mode": "absolute", "steps": _steps(column.threshold)}
    styled = {"unit": column.unit, "thresholds": thresholds, "custom.cellOptions": {"type": "color-text"}}
    return [shapes.DynamicConfigValue(id_val=key, value=value) for key, value in styled.items()]


def _describe(panel: Any, chart: Chart | Table, place: shapes.GridPos) -> Any:
    return panel.title(chart.title).description(chart.meaning).datasource(_SOURCE).grid_pos(place)


def _to_thresholds(threshold: Threshold) -> grafana.ThresholdsConfig:
    return grafana.ThresholdsConfig().mode(shapes.ThresholdsMode.ABSOLUTE).steps(_steps(threshold))


def _steps(threshold: Threshold) -> Sequence[shapes.Threshold]:
    below, above = ("green", "red") if threshold.is_bad == "above" else ("red", "green")
    return [shapes.Threshold(value=None, color=below), shapes.Threshold(value=threshold.value, color=above)]


def _link(runbook: str) -> grafana.DashboardLink:
    link = grafana.DashboardLink("What to do").type(shapes.DashboardLinkType.LINK)
    return link.url(f"{_RUNBOOKS}{runbook}.md").target_blank(True)
