"""The list of metrics keeps Prometheus' conventions, so that queries can be guessed."""

import re

import pytest

from monitoring.metrics import METRICS, Metric

UNITS = ("seconds", "bytes", "ratio")


def test_names_are_unique() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_keeps_the_conventions(metric: Metric) -> None:
    assert re.fullmatch(r"odonata(_[a-z]+)+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.name.endswith("_info") == (metric.kind == "info")
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))
    base = metric.name.removesuffix("_total")
    assert metric.unit == next((unit for unit in UNITS if base.endswith(f"_{unit}")), None)
    assert metric.meaning.endswith(".")
    assert "rank" not in metric.labels, "the exporter adds it"
