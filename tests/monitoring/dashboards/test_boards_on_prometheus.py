"""Every expression of dashboards, recording rules and alerts is run by a real Prometheus, and answers or is known to be empty."""

import json
import re
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from monitoring.dashboards.answers import Span
from monitoring.dashboards.picture import draw
from monitoring.dashboards.write import FOLDER
from monitoring.exporter import Exporter
from monitoring.goodput import BUCKETS
from monitoring.metrics import METRICS, PROBE_METRICS
from tests.monitoring.expressions import RULES, panel_expressions, rules
from tests.monitoring.prometheus import Prometheus, needs_prometheus, scraping, wait_until

VALUES = {
    "phase": ("forward", "backward"),
    "bucket": BUCKETS,
    "kind": ("host",),
    "objective": ("croco",),
    "part": ("loss", "top1"),
}
EVERYTHING = (*METRICS, *PROBE_METRICS)
"""What ranks export, and what a probe beside them does."""
LONG_AGO = re.compile(r"offset (1h|10m|1m)")
"""What compares with a past that a test has no time for."""


def tell_everything(exporter: Exporter, amount: float) -> None:
    """Set, count or observe `amount` for every metric and every value of its labels."""
    tell = {"gauge": exporter.set, "info": exporter.set, "counter": exporter.increase, "histogram": exporter.observe}
    for metric in EVERYTHING:
        for values in product(*(VALUES.get(label, ("some",)) for label in metric.labels)):
            tell[metric.kind](metric.name, amount, **dict(zip(metric.labels, values, strict=True)))


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A server that has scraped everything while it grew, and evaluated all rules."""
    folder = tmp_path_factory.mktemp("prometheus")
    exporter = Exporter({"run": "first", "rank": "0"}, EVERYTHING)
    tell_everything(exporter, 1.0)
    with scraping(exporter.serve("127.0.0.1", 0), folder, [hurried(path, folder) for path in RULES.glob("*.yaml")]) as server:
        for amount in (2.0, 3.0, 4.0):
            tell_everything(exporter, amount)
            time.sleep(0.5)
        wait_until(lambda: bool(server.query("run:odonata_is_unfinished:bool")), "rules are evaluated")
        time.sleep(0.5)
        yield server
    exporter.close()


def hurried(path: Path, folder: Path) -> Path:
    """The same rules, evaluated five times a second."""
    content = yaml.safe_load(path.read_text())
    for group in content["groups"]:
        group["interval"] = "200ms"
    copy = folder / path.name
    copy.write_text(yaml.safe_dump(content))
    return copy


@needs_prometheus
def test_panels_and_annotations_have_data(prometheus: Prometheus) -> None:
    empty = [each for each in panel_expressions() if not prometheus.query(each)]
    assert [each for each in empty if not LONG_AGO.search(each)] == []


@needs_prometheus
def test_a_picture_shows_a_board_with_its_answers(prometheus: Prometheus, tmp_path: Path) -> None:
    now = time.time()
    board = json.loads((FOLDER / "odonata-fleet.json").read_text())
    for name, run in (("full", "first"), ("empty", "nobody")):
        draw(board, prometheus.url, Span(now - 10, now, 0.5), tmp_path / f"{name}.png", run=run)
    full, empty = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in ("full", "empty"))
    assert full.shape == empty.shape
    ink = [(np.abs(pixels.astype(int) - (24, 27, 31)).sum(axis=2) > 60).mean() for pixels in (full, empty)]
    assert ink[0] > ink[1] + 0.05, "figures are on coloured ground, and curves and a table row are there"


@needs_prometheus
def test_recording_rules_have_data(prometheus: Prometheus) -> None:
    assert [rule["record"] for rule in rules("record") if not prometheus.query(rule["record"])] == []


@needs_prometheus
def test_alerts_are_evaluated_without_error(prometheus: Prometheus) -> None:
    health = prometheus.rule_health()
    assert set(health) == {rule["record"] for rule in rules("record")} | {rule["alert"] for rule in rules("alert")}
    assert set(health.values()) == {"ok"}
