"""The exporter: the metrics of one process in a registry of their own.

A registry of our own, so that two exporters in one process do not meet, and no library's metrics come along. A metric that
nobody has set is not served: a loss of 0 before the first step would be a lie, and a timestamp of 0 an alert. Counters and
histograms without labels of their own begin at 0, so that their first increase is seen.

Left to whom: what there is to export is `metrics`, pages and ports are `serving`, the last word is `pushing`; whoever holds an exporter
decides what to do when it fails.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from monitoring.metrics import METRICS, Metric
from monitoring.pulse import Pulse
from monitoring.pushing import push_summary
from monitoring.serving import Server

log = logging.getLogger(__name__)


class Exporter:
    """The values of `metrics`, each with the same `constant_labels`."""

    def __init__(self, constant_labels: Mapping[str, str], metrics: Sequence[Metric] = METRICS) -> None:
        disable_created_metrics()  # else each counter brings a gauge `_created` that is in no list
        self.registry = CollectorRegistry()
        self._constant_labels = dict(constant_labels)
        self._families = {metric.name: self._register(metric) for metric in metrics}
        self._server: Server | None = None

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge, or an info to 1."""
        self._child(name, labels).set(value)

    def increase(self, name: str, amount: float, **labels: str) -> None:
        """Let a counter grow by `amount`, which is not negative."""
        self._child(name, labels).inc(amount)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Count `value` in a histogram."""
        self._child(name, labels).observe(value)

    def serve(self, host: str, port: int, *, pulse: Pulse | None = None, peer_ports: Sequence[int] = ()) -> int:
        """Serve as `Server` does. Returns the port; OSError if there is none."""
        assert self._server is None, "an exporter serves once"
        self._server = Server(self.registry, host, port, pulse=pulse, peer_ports=peer_ports)
        if port not in (0, self._server.port):
            log.warning("metrics port %d is taken; /metrics is on port %d", port, self._server.port)
        return self._server.port

    @property
    def cpu_seconds(self) -> float:
        """What serving has cost."""
        return self._server.cpu_seconds if self._server else 0.0

    def push_summary(self, gateway: str) -> None:
        """Leave what lasts with the Pushgateway at this address, under the name of the run; OSError where it is not taken."""
        push_summary(self.registry, gateway, grouping={"run": self._constant_labels["run"]})

    def close(self) -> None:
        """Serve no more."""
        if self._server:
            self._server.close()
            self._server = None

    def _register(self, metric: Metric) -> Any:
        labels = (*self._constant_labels, *metric.labels)
        if metric.kind == "histogram":
            family: Any = Histogram(metric.name, metric.meaning, labels, registry=self.registry, buckets=metric.buckets)
        else:
            kinds = {"gauge": Gauge, "info": Gauge, "counter": Counter}
            family = kinds[metric.kind](metric.name, metric.meaning, labels, registry=self.registry)
        if metric.kind in ("counter", "histogram") and not metric.labels:
            family.labels(**self._constant_labels)
        return family

    def _child(self, name: str, labels: Mapping[str, str]) -> Any:
        family = self._families[name]
        known = self._constant_labels | dict(labels)
        return family.labels(**known) if known else family
