"""The objects around the pods: what they run, who they are, who may reach them, who may evict them, who watches them.

Left to whom: the pods are `pod`, their owners the flavours' files.
"""

import yaml

from k8s import labels
from k8s.pod import MAIN_PORT
from k8s.workload import Manifest, Workload

_ANYWHERE_BUT_METADATA = {"0.0.0.0/0": ["169.254.0.0/16"], "::/0": ["fe80::/10", "fd00:ec2::/32", "fd20:ce::/32"]}
"""Without a cloud's metadata services, which lend the node's own rights to whoever asks: link-local, and the IPv6 of AWS and of Google."""


def build_config_map(workload: Workload) -> Manifest:
    """The resolved run config and the launcher's. It never changes: another config has another hash and so another name.

    Beside them, where it may change, the cluster config: nothing in a pod reads it.
    """
    cluster = yaml.safe_dump(workload.cluster.model_dump(mode="json"), sort_keys=False)
    config_map = workload.describe("ConfigMap", "v1", workload.config_name, **{labels.CLUSTER: cluster})
    return config_map | {"immutable": True, "data": workload.files}


def build_service_account(workload: Workload) -> Manifest:
    """An account that no role is bound to and whose token is mounted nowhere: training asks the API server nothing."""
    annotations = workload.cluster.service_account_annotations
    account = workload.describe("ServiceAccount", "v1", workload.service_account, **annotations)
    return account | {"automountServiceAccountToken": False}


def build_service(workload: Workload) -> Manifest:
    """The headless Service that gives each pod a name. Pods need each other's before any of them is ready."""
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": labels.select(workload.name),
        "ports": [{"name": "main", "port": MAIN_PORT, "targetPort": MAIN_PORT, "protocol": "TCP"}],
    }
    return workload.describe("Service", "v1") | {"spec": spec}


def build_disruption_budget(workload: Workload) -> Manifest:
    """Evictions one at a time, or none: an evicted pod stops all others, which commit, restart and are ready before the next may go.

    So a run on one node has a budget of 0 that it may fall to, unless drains are to wait for its end (`evictable: false`).
    """
    cluster = workload.cluster
    spec = {
        "minAvailable": cluster.nodes - 1 if cluster.evictable else cluster.nodes,
        "unhealthyPodEvictionPolicy": "AlwaysAllow",  # pods that do not train hold up no drain
        "selector": {"matchLabels": labels.select(workload.name)},
    }
    return workload.describe("PodDisruptionBudget", "policy/v1") | {"spec": spec}


def build_network_policy(workload: Workload) -> Manifest:
    """In: the run's own pods, and Prometheus at one port. Out: the run's own pods, DNS, and the ports of its stores; no cloud metadata."""
    cluster = workload.cluster
    own = {"podSelector": {"matchLabels": labels.select(workload.name)}}
    prometheus = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": cluster.monitoring.namespace}}}
    dns = [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]
    anywhere = [{"ipBlock": {"cidr": block, "except": holes}} for block, holes in _ANYWHERE_BUT_METADATA.items()]
    spec = {
        "podSelector": own["podSelector"],
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": [own]}, {"from": [prometheus], "ports": _tcp(workload.metrics_ports[:1])}],
        "egress": [{"to": [own]}, {"ports": dns}, {"to": anywhere, "ports": _tcp(workload.store_ports)}],
    }
    return workload.describe("NetworkPolicy", "networking.k8s.io/v1") | {"spec": spec}


def build_pod_monitor(workload: Workload) -> Manifest:
    """What Prometheus scrapes: one page a pod, where local rank 0 answers for all its ranks, under the names of run and node."""
    monitor = workload.describe("PodMonitor", "monitoring.coreos.com/v1")
    monitor["metadata"]["labels"] = workload.labels | workload.cluster.monitoring.labels
    spec = {
        "selector": {"matchLabels": labels.select(workload.name)},
        "podTargetLabels": [labels.RUN, labels.CONFIG],
        "podMetricsEndpoints": [{"port": labels.port_name(0), "path": labels.METRICS_PATH, "interval": "15s"}],
    }
    return monitor | {"spec": spec}


def build_pod_group(workload: Workload, queue: str) -> Manifest:
    """Volcano's word for: all of these pods or none."""
    spec = {"minMember": workload.cluster.nodes, "queue": queue}
    if workload.cluster.priority_class:
        spec["priorityClassName"] = workload.cluster.priority_class
    return workload.describe("PodGroup", "scheduling.volcano.sh/v1beta1") | {"spec": spec}


def _tcp(ports: list[int]) -> list[Manifest]:
    return [{"protocol": "TCP", "port": port} for port in ports]
