"""Flavour `pytorchjob`: Kubeflow's v1 operator, for clusters that have not moved on.

It knows no failure policy, only that exit codes from 128 ask for a new pod and smaller ones end the job. So the entrypoint says
143, the code of a process that was ended by SIGTERM, where it would have said 75, and the rest follows: 2 and 3 end the job, and so
does 1, which here is not tried again.
"""

from k8s import labels
from k8s.job import queue_labels
from k8s.pod import Meeting, build_command, build_pod_template
from k8s.workload import Manifest, Workload

_ASK_FOR_A_NEW_POD = 128 + 15


def build_pytorchjob(workload: Workload) -> Manifest:
    """The PyTorchJob of a run: the first node is its master, the others are its workers."""
    cluster = workload.cluster
    policy: Manifest = {
        "backoffLimit": cluster.failures,
        "cleanPodPolicy": "None",  # pods that ended have the logs
        "ttlSecondsAfterFinished": cluster.ttl_s,
    }
    if cluster.queue and cluster.queue.kind == "volcano":
        policy["schedulingPolicy"] = {"queue": cluster.queue.name, "minAvailable": cluster.nodes}
    job = workload.describe("PyTorchJob", "kubeflow.org/v1", **{labels.URI: workload.run.run.uri})
    job["metadata"]["labels"] = workload.labels | queue_labels(workload)
    replicas = {"Master": _build_replicas(workload, 1)}
    if cluster.nodes > 1:
        replicas["Worker"] = _build_replicas(workload, cluster.nodes - 1)
    spec = {"nprocPerNode": str(cluster.processes), "runPolicy": policy, "pytorchReplicaSpecs": replicas}
    return job | {"spec": spec}


def _build_replicas(workload: Workload, count: int) -> Manifest:
    meeting = Meeting("$(RANK)", "$(MASTER_ADDR)", "$(MASTER_PORT)") if workload.cluster.nodes > 1 else None
    template = build_pod_template(workload, meeting, container=labels.PYTORCHJOB_CONTAINER)
    container = template["spec"]["containers"][0]
    container["args"] = build_command(workload, meeting, retry_code=_ASK_FOR_A_NEW_POD)
    container["ports"][0]["name"] = "pytorchjob-port"  # from which the operator takes MASTER_PORT
    del template["spec"]["restartPolicy"]  # the operator sets it from the line below
    return {"replicas": count, "restartPolicy": "ExitCode", "template": template}
