"""Colours of a panel follow Grafana's threshold steps."""

import pytest

from monitoring.dashboards.drawing import judge

BAD_ABOVE = [{"color": "green", "value": None}, {"color": "red", "value": 10}]
BAD_BELOW = [{"color": "red", "value": None}, {"color": "green", "value": 0.3}]


@pytest.mark.parametrize(
    ("value", "steps", "colour"),
    [(9.9, BAD_ABOVE, "green"), (10.0, BAD_ABOVE, "red"), (0.29, BAD_BELOW, "red"), (0.3, BAD_BELOW, "green")],
)
def test_a_threshold_counts_from_its_value_on(value: float, steps: list[dict[str, object]], colour: str) -> None:
    assert judge(value, steps) == colour
