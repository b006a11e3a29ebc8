"""Every PromQL expression of the project, and the names in it."""

import json
from typing import Any

import promql_parser
import yaml

from monitoring.dashboards.boards import BOARDS
from monitoring.dashboards.charts import to_json
from monitoring.dashboards.picture import fill
from monitoring.metrics import METRICS, PROBE_METRICS
from tests.monitoring.prometheus import RULES


def rules(kind: str) -> list[dict[str, Any]]:
    """All rules that are a `record` or an `alert`."""
    groups = [group for path in sorted(RULES.glob("*.yaml")) for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def panel_expressions() -> list[str]:
    """Of all dashboards, annotations included, with their variable filled in."""
    found = []
    for board in BOARDS:
        content = json.loads(to_json(board))
        found += [target["expr"] for panel in content["panels"] for target in panel["targets"]]
        found += [mark["expr"] for mark in content["annotations"]["list"]]
    return [fill(expression, ".*") for expression in found]


def rule_expressions() -> list[str]:
    """Of all recording rules and alerts."""
    return [rule["expr"] for rule in rules("record") + rules("alert")]


def names_in(expression: str) -> set[str]:
    """Metrics that `expression` asks for; ValueError where it is no PromQL."""
    found: set[str] = set()
    _collect(promql_parser.parse(expression), found)
    return found


def known_names() -> set[str]:
    """What may be asked for: what is exported, as Prometheus stores it, what rules record, and Prometheus' own list of alerts."""
    exported = {"ALERTS"}
    for metric in (*METRICS, *PROBE_METRICS):
        endings = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        exported |= {metric.name + ending for ending in endings}
    return exported | {rule["record"] for rule in rules("record")}


def _collect(node: Any, found: set[str]) -> None:
    if isinstance(node, promql_parser.VectorSelector):
        found.add(str(node.name))
        return
    for child in ("lhs", "rhs", "expr", "vector_selector", "args", "param"):
        value = getattr(node, child, None)
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                _collect(one, found)
