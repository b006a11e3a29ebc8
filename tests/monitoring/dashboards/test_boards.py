"""Dashboards ask only for what is exported, and every panel can be read by somebody who did not make it."""

import json
from pathlib import Path
from typing import Any

import pytest

from monitoring.dashboards.boards import BOARDS
from monitoring.dashboards.charts import Board, Chart, Table, to_json
from monitoring.dashboards.write import FOLDER
from monitoring.metrics import METRICS
from tests.monitoring.expressions import known_names, names_in, panel_expressions, rule_expressions, rules

CHARTS = [chart for board in BOARDS for chart in board.charts]
RUNBOOKS = {chart.runbook for chart in CHARTS if isinstance(chart, Chart) and chart.runbook}
ROOT = Path(__file__).parents[3]


def panels(board: Board) -> list[dict[str, Any]]:
    return list(json.loads(to_json(board))["panels"])


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
def test_the_committed_json_is_what_the_code_makes(board: Board) -> None:
    committed = (FOLDER / f"{board.uid}.json").read_text()
    assert committed == to_json(board), "run python -m monitoring.dashboards.write"


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
def test_every_panel_has_a_unit_a_description_and_a_threshold_and_its_own_place(board: Board) -> None:
    places = set()
    for panel in panels(board):
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        styles = [{each["id"]: each["value"] for each in column["properties"]} for column in panel["fieldConfig"]["overrides"]]
        assert bool(styles) == (panel["type"] == "table")
        for style in [panel["fieldConfig"]["defaults"], *styles]:
            assert style["unit"]
            first, second = style["thresholds"]["steps"]
            assert {first["color"], second["color"]} == {"green", "red"}
            assert second["value"] is not None
        places.add((panel["gridPos"]["x"], panel["gridPos"]["y"]))
    assert len(places) == len(board.charts)


@pytest.mark.parametrize("expression", panel_expressions())
def test_a_panel_asks_only_for_what_there_is(expression: str) -> None:
    assert names_in(expression)
    assert names_in(expression) <= known_names()


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.title)
def test_a_chart_narrows_to_the_runs_that_are_chosen(chart: Chart | Table) -> None:
    expressions = (
        [column.expression for column in chart.columns] if isinstance(chart, Table) else [line[1] for line in chart.lines]
    )
    assert expressions
    for expression in expressions:
        assert 'run=~"$run"' in expression


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
def test_a_board_has_a_variable_for_each_that_its_charts_use(board: Board) -> None:
    content = json.loads(to_json(board))
    used = {name for name in ("run", "rank") if f"${name}" in json.dumps(content["panels"])}
    assert {each["name"] for each in content["templating"]["list"]} == {"datasource", *used}
    assert {mark["name"] for mark in content["annotations"]["list"]} == {"restart", "checkpoint"}


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
def test_panels_stand_side_by_side_and_fill_the_width(board: Board) -> None:
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in panels(board)):
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken
        taken |= cells
    height = max(y for _, y in taken) + 1
    assert taken == {(x, y) for x in range(24) for y in range(height)}


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
def test_the_docs_show_a_picture_of_each_board(board: Board) -> None:
    picture = f"pictures/dashboard_{board.uid.removeprefix('odonata-')}.png"
    assert (ROOT / "docs" / picture).is_file()
    assert f"({picture})" in (ROOT / "docs" / "monitoring.md").read_text()


def test_links_lead_to_runbooks_that_there_are() -> None:
    alerts = {rule["alert"] for rule in rules("alert")}
    assert alerts >= RUNBOOKS


def test_no_metric_is_exported_that_nobody_looks_at() -> None:
    asked = set().union(*(names_in(expression) for expression in panel_expressions() + rule_expressions()))
    unseen = {metric.name for metric in METRICS if not {metric.name, f"{metric.name}_sum", f"{metric.name}_count"} & asked}
    # facts for joins and for plots of one's own
    assert unseen == {
        "odonata_run_info",
        "odonata_step_flops",
        "odonata_peak_flops",
        "odonata_tokens_total",
        "odonata_tokens_per_second",
    }
