"""End a run on a cluster: its pods get SIGTERM, end their step and commit, and the run stays in its store.

Left to whom: what a pod does with the signal is `entrypoint`'s, going on `submit.resume`'s.
"""

from k8s import labels
from k8s.client import Cluster
from k8s.pod import UNWIND_S
from k8s.runs import find_run
from k8s.submit import delete_owner

_AROUND = ("PodMonitor", "PodDisruptionBudget", "PodGroup", "NetworkPolicy", "Service", "ServiceAccount", "ConfigMap")
"""What may be left around a run; the ConfigMap, by which it is found, last."""


def stop(cluster: Cluster, name: str, *, forget: bool = False) -> bool:
    """Stop run `name` and return when its pods are gone; whether there was anything to stop. `forget` leaves nothing around it, either."""
    run = find_run(cluster, name)
    if run.owner:
        delete_owner(cluster, run, timeout_s=run.cluster.grace_s + 2 * UNWIND_S + 60)
    if forget:
        for kind in _AROUND:
            for manifest in cluster.list(kind, labels.select(name)):
                cluster.delete(kind, manifest["metadata"]["name"])
    return run.owner is not None
