"""The recording rules and alerts as the Prometheus operator takes them: once for a cluster, since they speak of every run in it.

    .venv/bin/python -m k8s.rules         writes k8s/monitoring/prometheus_rule.yaml; a test compares

Left to whom: the rules are `monitoring/rules/*.yaml`; what finds a run's pods is `surroundings.build_pod_monitor`.
"""

from pathlib import Path

import yaml

from k8s.render import dump_manifest
from k8s.workload import Manifest

_HOME = Path(__file__).parents[1]
PLACE = _HOME / "k8s" / "monitoring" / "prometheus_rule.yaml"


def build_prometheus_rule() -> Manifest:
    """One PrometheusRule with all groups."""
    groups = [
        group
        for path in sorted((_HOME / "monitoring" / "rules").glob("*.yaml"))
        for group in yaml.safe_load(path.read_text())["groups"]
    ]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "odonata", "labels": {"app.kubernetes.io/name": "odonata"}},
        "spec": {"groups": groups},
    }


if __name__ == "__main__":
    PLACE.write_text(dump_manifest(build_prometheus_rule()))
