"""Flavour `trainjob`: Kubeflow Trainer v2. A ClusterTrainingRuntime says how anything of ours runs here, a TrainJob what runs.

The runtime is a platform team's object: security, probes, failure policy, places. It has the JobSet of `jobset` inside, without what
belongs to one run; that comes with the TrainJob: nodes, image, command, resources, and by a patch the labels, the account and the
ConfigMap. Trainer sets the variables of the meeting in the container `node`.
"""

from copy import deepcopy

from k8s import labels
from k8s.job import queue_labels
from k8s.jobset import build_jobset_spec, exclusive_topology
from k8s.pod import Meeting, build_command, build_environment, build_pod_template, build_resources, config_mount, config_volume
from k8s.workload import Manifest, Workload

_API = "trainer.kubeflow.org/v1alpha1"
_PATCHER = "odonata/render"
_MEETING = Meeting("$(PET_NODE_RANK)", "$(PET_MASTER_ADDR)", "$(PET_MASTER_PORT)")
_OF_ONE_RUN = {labels.RUN, labels.CONFIG, "app.kubernetes.io/instance"}


def build_runtime(workload: Workload) -> Manifest:
    """The ClusterTrainingRuntime: everything that all runs with this cluster config share."""
    cluster = workload.cluster
    template = build_pod_template(workload, _MEETING)
    shared = {key: value for key, value in workload.labels.items() if key not in _OF_ONE_RUN}
    template["metadata"]["labels"] = shared
    _leave_out_the_run(template["spec"])
    jobset = build_jobset_spec(workload, template)
    del jobset["network"]["subdomain"]
    replicated = jobset["replicatedJobs"][0]["template"]
    replicated["metadata"] = {"labels": {labels.TRAINJOB_STEP: "trainer"}}
    spec: Manifest = {"mlPolicy": {"numNodes": 1, "torch": {}}, "template": {"spec": jobset}}
    for count in ("parallelism", "completions"):  # Trainer's, from the number of nodes
        replicated["spec"][count] = 1
    annotations = exclusive_topology(workload)
    if cluster.queue and cluster.queue.kind == "volcano":
        spec["podGroupPolicy"] = {"volcano": {}}
        annotations[labels.VOLCANO_QUEUE] = cluster.queue.name
    if annotations:
        spec["template"]["metadata"] = {"annotations": annotations}
    metadata = {"name": runtime_name(workload), "labels": shared | {"trainer.kubeflow.org/framework": "torch"}}
    return {"apiVersion": _API, "kind": "ClusterTrainingRuntime", "metadata": metadata, "spec": spec}


def build_trainjob(workload: Workload) -> Manifest:
    """The TrainJob of a run."""
    trainer = {
        "image": workload.cluster.image,
        "command": ["odonata"],
        "args": build_command(workload, _MEETING),
        "env": build_environment(workload),
        "numNodes": workload.cluster.nodes,
        "numProcPerNode": workload.cluster.processes,
        "resourcesPerNode": build_resources(workload),
    }
    trainjob = workload.describe("TrainJob", _API, **{labels.URI: workload.run.run.uri})
    trainjob["metadata"]["labels"] = workload.labels | queue_labels(workload)
    runtime = {"apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime", "name": runtime_name(workload)}
    return trainjob | {"spec": {"runtimeRef": runtime, "trainer": trainer, "runtimePatches": [_patch_run(workload)]}}


def runtime_name(workload: Workload) -> str:
    """One runtime a namespace and engine; teams do not share their secrets' names."""
    return f"{labels.APPLICATION}-{workload.cluster.namespace}-{workload.cluster.engine}"


def _leave_out_the_run(spec: Manifest) -> None:
    container = spec["containers"][0]
    del container["args"]
    container["env"] = [variable for variable in container["env"] if variable["name"] != "ODONATA_JOB"]
    container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] != "config"]
    spec["volumes"] = [volume for volume in spec["volumes"] if volume["name"] != "config"]
    del spec["serviceAccountName"]


def _patch_run(workload: Workload) -> Manifest:
    pod = {
        "serviceAccountName": workload.service_account,
        "volumes": [config_volume(workload)],
        "containers": [{"name": labels.CONTAINER, "volumeMounts": [config_mount()]}],
    }
    template = {"metadata": {"labels": deepcopy(workload.labels)}, "spec": pod}
    replicated = {"name": labels.REPLICATED_JOB, "template": {"spec": {"template": template}}}
    return {"manager": _PATCHER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated]}}}}
