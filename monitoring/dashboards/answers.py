"""What a Prometheus answers to the queries of a panel.

Left to whom: which queries a panel has is in its JSON; drawing answers is `drawing`.
"""

import json
import re
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Span:
    """From `start_s` to `end_s`, seconds since 1970, every `step_s`."""

    start_s: float
    end_s: float
    step_s: float

    @property
    def times_s(self) -> np.ndarray:
        """The moments at which a query is answered."""
        return np.arange(round((self.end_s - self.start_s) / self.step_s) + 1) * self.step_s + self.start_s


@dataclass(frozen=True)
class Series:
    """One line: `values` at the moments of the span, NaN where there is none."""

    labels: Mapping[str, str]
    legend: str
    values: np.ndarray

    @property
    def last(self) -> float:
        """Its last number; NaN if it has none."""
        numbers = self.values[np.isfinite(self.values)]
        return float(numbers[-1]) if len(numbers) else float("nan")


def ask(url: str, expression: str, span: Span, *, legend: str = "") -> list[Series]:
    """The series of `expression` over `span`, named by Grafana's template `legend`; OSError where Prometheus refuses it."""
    asked = {"query": expression, "start": span.start_s, "end": span.end_s, "step": span.step_s}
    address = f"{url}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
    with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as answer:
        found = json.load(answer)["data"]["result"]
    return [_read(one, span, legend) for one in found]


def _read(found: Mapping[str, Any], span: Span, legend: str) -> Series:
    labels = found["metric"]
    values = np.full(len(span.times_s), np.nan)
    for time_s, text in found["values"]:
        values[round((time_s - span.start_s) / span.step_s)] = float(text)
    named = re.sub(r"{{\s*(\w+)\s*}}", lambda hit: str(labels.get(hit[1], "")), legend)
    return Series(labels, named or ", ".join(labels.values()) or "value", values)
