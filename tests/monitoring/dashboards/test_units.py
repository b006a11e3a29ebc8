"""Values as Grafana writes them."""

import math

import pytest

from monitoring.dashboards.units import format_value


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.1234, "percentunit", "12.3%"),
        (0.0, "percentunit", "0%"),
        (0.0125, "s", "12.5 ms"),
        (0.0, "s", "0 s"),
        (90.0, "s", "1.5 mins"),
        (2 * 86400.0, "s", "2 days"),
        (3 * 2**30, "bytes", "3 GiB"),
        (5_500_000.0, "Bps", "5.5 MB/s"),
        (5500.0, "cps", "5.5 K c/s"),
        (1234.0, "short", "1.23 K"),
        (-0.5, "short", "-0.5"),
        (math.nan, "s", "No data"),
    ],
)
def test_a_value_is_read_at_a_glance(value: float, unit: str, text: str) -> None:
    assert format_value(value, unit) == text
