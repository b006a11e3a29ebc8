"""A run's last word: its summary, left with a Pushgateway for Prometheus to scrape when the process is gone.

One group a run: a later start of it replaces what an earlier one left.

Left to whom: what belongs to the summary, and how it is called there, is `metrics`; when it is said, the trainer.
"""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, push_to_gateway
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from monitoring.metrics import SUMMARY

_JOB = "odonata"
_TIMEOUT_S = 10.0


def push_summary(registry: CollectorRegistry, gateway: str, *, grouping: Mapping[str, str]) -> None:
    """Push what of `registry` is in `SUMMARY` to the address `gateway`; OSError where it is not taken."""
    summary = CollectorRegistry()
    summary.register(_Summary(registry))
    push_to_gateway(gateway, _JOB, summary, dict(grouping), timeout=_TIMEOUT_S)


class _Summary(Collector):
    """The families of `SUMMARY`, under their names there."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Family]:
        for family in self._registry.collect():
            lasting = SUMMARY.get(family.name)
            if lasting:
                renamed = Family(lasting.name, family.documentation, "gauge")
                renamed.samples = [sample._replace(name=lasting.name) for sample in family.samples]
                yield renamed
