"""Flavour `job`: what every cluster has. Several nodes are an Indexed Job behind a headless Service, one node a plain Job.

What becomes of a pod's exit code (trainer/errors.py) is the policy here, in this order:

    2, 3            the Job fails: another try would end the same way
    disruption      the pod was preempted, evicted or its node is gone: replaced, and not counted
    75              asked for a retry (committed after SIGTERM, lost a peer, store gone): replaced, and not counted
    else            1, a kill for want of memory: replaced and counted, up to `failures`

A pod is replaced alone; the others lose their peer, end with 75 and are replaced in turn, so the whole run meets again.
"""

from k8s import labels
from k8s.pod import Meeting, build_pod_template
from k8s.workload import Manifest, Workload
from trainer.errors import EXIT_DO_NOT_RETRY, EXIT_REFUSED, EXIT_RETRY


def build_job(workload: Workload) -> Manifest:
    """The Job of a run."""
    cluster, several = workload.cluster, workload.cluster.nodes > 1
    meeting = Meeting("$(JOB_COMPLETION_INDEX)", f"{workload.name}-0.{workload.name}") if several else None
    template = build_pod_template(workload, meeting)
    if several:
        template["spec"]["subdomain"] = workload.name
    job = workload.describe("Job", "batch/v1", **{labels.URI: workload.run.run.uri})
    job["metadata"]["labels"] = workload.labels | queue_labels(workload)
    spec = build_job_spec(workload, template) | {"backoffLimit": cluster.failures, "ttlSecondsAfterFinished": cluster.ttl_s}
    return job | {"spec": spec}


def build_job_spec(workload: Workload, template: Manifest) -> Manifest:
    """Spec of a Job of one pod a node; its index is the node's rank."""
    nodes = workload.cluster.nodes
    indexed = {"completionMode": "Indexed"} if nodes > 1 else {}
    return {
        "parallelism": nodes,
        "completions": nodes,
        **indexed,
        "podFailurePolicy": _build_failure_policy(),
        "template": template,
    }


def queue_labels(workload: Workload) -> dict[str, str]:
    """What Kueue reads at the owner of the pods."""
    queue = workload.cluster.queue
    if queue is None or queue.kind != "kueue":
        return {}
    return {labels.KUEUE_QUEUE: queue.name} | ({labels.KUEUE_PRIORITY: queue.priority_class} if queue.priority_class else {})


def _build_failure_policy() -> Manifest:
    def answer(action: str, *codes: int) -> Manifest:
        on_codes = {"containerName": labels.CONTAINER, "operator": "In", "values": list(codes)}
        return {"action": action, "onExitCodes": on_codes, "onPodConditions": []}  # Kubernetes 1.27 wants the empty list

    disrupted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    return {"rules": [answer("FailJob", EXIT_DO_NOT_RETRY, EXIT_REFUSED), disrupted, answer("Ignore", EXIT_RETRY)]}
