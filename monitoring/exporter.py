"""The exporter: the metrics of one process in a registry of their own, served on /metrics by a daemon thread.

A registry of our own, so that two exporters in one process do not meet, and no library's metrics come along. A metric that
nobody has set is not served: a loss of 0 before the first step would be a lie, and a timestamp of 0 an alert. Counters and
histograms without labels of their own begin at 0, so that their first increase is seen.

Left to whom: what there is to export is `metrics`; whoever holds an exporter decides what to do when it fails.
"""

import errno
import logging
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, start_http_server

from monitoring.metrics import METRICS, Metric

log = logging.getLogger(__name__)

PORTS_TRIED = 100
"""Taken ports that are passed over before giving up."""


class Exporter:
    """The values of `metrics`, each with the same `constant_labels`."""

    def __init__(self, constant_labels: Mapping[str, str], metrics: Sequence[Metric] = METRICS) -> None:
        disable_created_metrics()  # else each counter brings a gauge `_created` that is in no list
        self.registry = CollectorRegistry()
        self._constant_labels = dict(constant_labels)
        self._families = {metric.name: self._register(metric) for metric in metrics}
        self._server: _Server | None = None

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge, or an info to 1."""
        self._child(name, labels).set(value)

    def increase(self, name: str, amount: float, **labels: str) -> None:
        """Let a counter grow by `amount`, which is not negative."""
        self._child(name, labels).inc(amount)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Count `value` in a histogram."""
        self._child(name, labels).observe(value)

    def serve(self, host: str, port: int) -> int:
        """Serve /metrics on `port` of `host`, or the next one that is free; 0 is any. Returns the port; OSError if there is none."""
        assert self._server is None, "an exporter serves once"
        self._server = _Server(self.registry, host, port)
        if port not in (0, self._server.port):
            log.warning("metrics port %d is taken; /metrics is on port %d", port, self._server.port)
        return self._server.port

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


class _Server:
    """An HTTP server in daemon threads, which end with the process."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        self._http, self._thread = _bind(registry, host, port)
        self.port = int(self._http.server_port)
        _close_after_fork(self._http)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def _bind(registry: CollectorRegistry, host: str, port: int) -> tuple[WSGIServer, threading.Thread]:
    last = port if port == 0 else min(port + PORTS_TRIED, 65535)
    for candidate in range(port, last + 1):
        try:
            return start_http_server(candidate, addr=host, registry=registry)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(
        errno.EADDRINUSE, f"ports {port} to {last} of {host} are all taken; set observe.metrics_port to another, or to 0 for any"
    )


def _close_after_fork(http: WSGIServer) -> None:
    """Loader workers are forked: one that outlives a killed rank would hold the port, and the next start would move on."""
    server = weakref.ref(http)

    def close_in_child() -> None:
        http = server()
        if http:
            http.socket.close()

    os.register_at_fork(after_in_child=close_in_child)
