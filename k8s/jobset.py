"""Flavour `jobset`: a JobSet around the Indexed Job. It adds what large runs want: a restart as a whole, and a block of nodes of its own.

The Job inside keeps the rules of `job` and tolerates no failure of its own, so that every failure that counts is JobSet's business:

    PodFailurePolicy            the Job ended by exit code 2 or 3: the JobSet fails
    else                        all pods are deleted and made again, up to `failures`; none of the new ones meets one of the old ones
"""

from k8s import labels
from k8s.job import build_job_spec, queue_labels
from k8s.pod import Meeting, build_pod_template
from k8s.workload import Manifest, Workload


def build_jobset(workload: Workload) -> Manifest:
    """The JobSet of a run."""
    address = f"{workload.name}-{labels.REPLICATED_JOB}-0-0.{workload.name}"
    template = build_pod_template(workload, Meeting("$(JOB_COMPLETION_INDEX)", address))
    jobset = workload.describe(
        "JobSet", "jobset.x-k8s.io/v1alpha2", **{labels.URI: workload.run.run.uri}, **exclusive_topology(workload)
    )
    jobset["metadata"]["labels"] = workload.labels | queue_labels(workload)
    return jobset | {"spec": build_jobset_spec(workload, template) | {"ttlSecondsAfterFinished": workload.cluster.ttl_s}}


def build_jobset_spec(workload: Workload, template: Manifest) -> Manifest:
    """One replicated job of one pod a node."""
    job = build_job_spec(workload, template) | {"completionMode": "Indexed", "backoffLimit": 0}
    replicated = {
        "name": labels.REPLICATED_JOB,
        "replicas": 1,
        "template": {"metadata": {"labels": workload.labels}, "spec": job},
    }
    give_up = {"name": "do-not-retry", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": workload.name},
        "successPolicy": {"operator": "All"},
        "failurePolicy": {
            "maxRestarts": workload.cluster.failures,
            "restartStrategy": "BlockingRecreate",
            "rules": [give_up],
        },
        "replicatedJobs": [replicated],
    }


def exclusive_topology(workload: Workload) -> dict[str, str]:
    """The annotation by which JobSet keeps other runs out of the block."""
    topology = workload.cluster.topology
    return {labels.EXCLUSIVE_TOPOLOGY: topology.key} if topology and topology.exclusive else {}
