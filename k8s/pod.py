"""The pod of a node, the same in all flavours: one container that runs `odonata pod`, as little right as it can do with, one GPU a rank.

What each setting is for, from the outside in:

    labels, selectors         others find the pods: Service, disruption budget, network policy, PodMonitor
    place                     node selector, tolerations, topology, priority, queue
    identity                  an account without rights or token; a user that is not root; a root file system that nobody writes to
    volumes                   config (the ConfigMap), scratch (also /tmp and HOME), /dev/shm, claims
    resources                 requests = limits, so that the pod is of class Guaranteed and the last to be evicted
    probes                    local rank 0's exporter: started, alive, training
    end                       SIGTERM -> the step ends -> a checkpoint is committed -> the rank's own exit code, all within the grace period

Left to whom: who owns the pods and what becomes of an exit code is the flavour's file.
"""

import math
from dataclasses import dataclass

from k8s import labels
from k8s.cluster import Claim, Topology
from k8s.workload import Manifest, Workload
from trainer.errors import EXIT_RETRY

MAIN_PORT = 29500
UNWIND_S = 10
"""Seconds after the grace period in which the entrypoint kills what is left and tells why, before Kubernetes kills it."""

_PROBE_S = 10
_WAIT_FOR_THE_COMMIT = "kill -TERM 1; while kill -0 1 2>/dev/null; do sleep 1; done"


@dataclass(frozen=True)
class Meeting:
    """How a pod learns its place among the nodes: values, or $(NAME) of variables that the controller of the pods sets."""

    node_rank: str
    main_address: str
    main_port: str = str(MAIN_PORT)


def build_pod_template(workload: Workload, meeting: Meeting | None, *, container: str = labels.CONTAINER) -> Manifest:
    """Metadata and spec of a node's pod; without a meeting there is one node."""
    metadata: Manifest = {"labels": workload.labels}
    annotations = _queue_annotations(workload) | _scrape_annotations(workload)
    if annotations:
        metadata["annotations"] = annotations
    return {"metadata": metadata, "spec": _build_spec(workload, meeting, container)}


def build_command(workload: Workload, meeting: Meeting | None, *, retry_code: int = EXIT_RETRY) -> list[str]:
    """Arguments of `odonata` in the pod."""
    command = ["pod", f"{labels.CONFIG_FOLDER}/run.yaml", f"--accelerate={labels.CONFIG_FOLDER}/accelerate.yaml"]
    if meeting:
        command += [
            f"--node-rank={meeting.node_rank}",
            f"--main-address={meeting.main_address}",
            f"--main-port={meeting.main_port}",
        ]
    command += [f"--grace-s={workload.cluster.grace_s}", f"--meeting-s={workload.cluster.startup_s}"]
    command += ["--doctor"] if workload.cluster.doctor else []
    return command + ([f"--retry-code={retry_code}"] if retry_code != EXIT_RETRY else [])


def build_environment(workload: Workload) -> list[Manifest]:
    """Variables of the container; secrets come beside it, by reference."""
    ours = {
        "ODONATA_JOB": labels.name_job(workload.cluster.namespace, workload.name),  # a restart takes its run over at once
        "HOME": labels.SCRATCH_FOLDER,  # where libraries keep caches, as there is nowhere else to write
        "TMPDIR": labels.SCRATCH_FOLDER,
    }
    return [{"name": name, "value": value} for name, value in (ours | workload.cluster.env).items()]


def build_resources(workload: Workload) -> Manifest:
    """Requests and limits, which are the same."""
    cluster = workload.cluster
    amounts = {"cpu": cluster.cpu, "memory": cluster.memory, "ephemeral-storage": cluster.scratch, **cluster.rdma}
    if cluster.gpus_per_node:
        amounts[cluster.gpu_resource] = str(cluster.gpus_per_node)
    return {"requests": amounts, "limits": dict(amounts)}


def config_volume(workload: Workload) -> Manifest:
    """The ConfigMap with the run."""
    return {"name": "config", "configMap": {"name": workload.config_name}}


def config_mount() -> Manifest:
    """Where the ConfigMap is seen."""
    return {"name": "config", "mountPath": labels.CONFIG_FOLDER, "readOnly": True}


def _build_spec(workload: Workload, meeting: Meeting | None, container: str) -> Manifest:
    cluster = workload.cluster
    spec: Manifest = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": cluster.grace_s + 2 * UNWIND_S,
        "serviceAccountName": workload.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": cluster.user_id,
            "runAsGroup": cluster.user_id,
            "fsGroup": cluster.user_id,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **_build_place(workload),
        "containers": [_build_container(workload, meeting, container)],
        "volumes": _build_volumes(workload),
    }
    if cluster.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in cluster.image_pull_secrets]
    return spec


def _build_container(workload: Workload, meeting: Meeting | None, name: str) -> Manifest:
    cluster = workload.cluster
    container: Manifest = {
        "name": name,
        "image": cluster.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["odonata"],
        "args": build_command(workload, meeting),
        "env": build_environment(workload),
        "ports": _build_ports(workload),
        "resources": build_resources(workload),
        "securityContext": _build_security(workload),
        "volumeMounts": _build_mounts(workload),
        **_build_probes(workload),
        "lifecycle": {"preStop": {"exec": {"command": ["/bin/sh", "-c", _WAIT_FOR_THE_COMMIT]}}},
        "terminationMessagePolicy": "FallbackToLogsOnError",  # the sentence of an error stands in the pod's status
    }
    if cluster.secrets:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in cluster.secrets]
    if cluster.restart_in_place:
        codes = {"operator": "In", "values": [EXIT_RETRY]}
        container |= {"restartPolicy": "Never", "restartPolicyRules": [{"action": "Restart", "exitCodes": codes}]}
    return container


def _build_ports(workload: Workload) -> list[Manifest]:
    ports = [{"name": "main", "containerPort": MAIN_PORT, "protocol": "TCP"}]
    metrics = enumerate(workload.metrics_ports)
    return ports + [{"name": labels.port_name(rank), "containerPort": port, "protocol": "TCP"} for rank, port in metrics]


def _build_security(workload: Workload) -> Manifest:
    capabilities: Manifest = {"drop": ["ALL"]}
    if workload.cluster.rdma:
        capabilities["add"] = ["IPC_LOCK"]  # buffers that the network card reads are pinned
    return {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": capabilities}


def _build_probes(workload: Workload) -> Manifest:
    """Alive for as long as a collective may wait: the run's own time-out speaks first, since it knows more and ends all ranks."""
    patience = math.ceil(workload.run.parallel.timeout_s / _PROBE_S) + 6

    def ask(path: str, failures: int) -> Manifest:
        request = {"path": path, "port": labels.METRICS_PORT}
        return {"httpGet": request, "periodSeconds": _PROBE_S, "timeoutSeconds": 5, "failureThreshold": failures}

    return {
        "startupProbe": ask("/healthz", math.ceil(workload.cluster.startup_s / _PROBE_S)),
        "livenessProbe": ask("/healthz", patience),
        "readinessProbe": ask("/readyz", 3),
    }


def _build_volumes(workload: Workload) -> list[Manifest]:
    cluster = workload.cluster
    return [
        config_volume(workload),
        {"name": "scratch", "emptyDir": {"sizeLimit": cluster.scratch}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": cluster.shared_memory}},
        *(
            {"name": _claim_name(place), "persistentVolumeClaim": _claim_source(claim)}
            for place, claim in enumerate(cluster.claims)
        ),
    ]


def _build_mounts(workload: Workload) -> list[Manifest]:
    claims = enumerate(workload.cluster.claims)
    return [
        config_mount(),
        {"name": "scratch", "mountPath": labels.SCRATCH_FOLDER},
        {"name": "scratch", "mountPath": "/tmp"},
        {"name": "shm", "mountPath": "/dev/shm"},
        *({"name": _claim_name(place), "mountPath": claim.path, "readOnly": not claim.writable} for place, claim in claims),
    ]


def _claim_name(place: int) -> str:
    return f"claim-{place}"


def _claim_source(claim: Claim) -> Manifest:
    return {"claimName": claim.claim, "readOnly": not claim.writable}


def _build_place(workload: Workload) -> Manifest:
    cluster = workload.cluster
    place: Manifest = {
        "nodeSelector": dict(cluster.node_selector),
        "tolerations": [toleration.model_dump(exclude_none=True) for toleration in cluster.tolerations],
        "affinity": _build_affinity(workload),
        "priorityClassName": cluster.priority_class,
        "schedulerName": "volcano" if cluster.queue and cluster.queue.kind == "volcano" else None,
    }
    return {key: value for key, value in place.items() if value}


def _build_affinity(workload: Workload) -> Manifest:
    """Pods of the run in one block, where the queue does not see to that, and other runs out of it, where JobSet does not."""
    cluster, topology = workload.cluster, workload.cluster.topology
    if topology is None:
        return {}
    affinity: Manifest = {}
    if not (cluster.queue and cluster.queue.kind == "kueue") and cluster.nodes > 1:
        affinity["podAffinity"] = _attract(workload, topology)
    if topology.exclusive and cluster.flavour not in ("jobset", "trainjob"):
        others = [
            {"key": labels.RUN, "operator": "Exists"},
            {"key": labels.RUN, "operator": "NotIn", "values": [workload.name]},
        ]
        term = {"labelSelector": {"matchExpressions": others}, "topologyKey": topology.key}
        affinity["podAntiAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
    return affinity


def _attract(workload: Workload, topology: Topology) -> Manifest:
    term = {"labelSelector": {"matchLabels": labels.select(workload.name)}, "topologyKey": topology.key}
    if topology.required:
        return {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
    return {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": term}]}


def _queue_annotations(workload: Workload) -> dict[str, str]:
    """What a queue reads at the pods; Kubeflow's own controllers tell Volcano of theirs."""
    queue, topology, flavour = workload.cluster.queue, workload.cluster.topology, workload.cluster.flavour
    if queue is None:
        return {}
    if queue.kind == "volcano":
        return {labels.VOLCANO_GROUP: workload.name} if flavour in ("job", "jobset") else {}
    return {labels.KUEUE_TOPOLOGY.format("required" if topology.required else "preferred"): topology.key} if topology else {}


def _scrape_annotations(workload: Workload) -> dict[str, str]:
    """What a Prometheus without operator goes by; with a PodMonitor it would scrape twice."""
    if workload.cluster.monitoring.pod_monitor:
        return {}
    scrape = {"scrape": "true", "port": str(workload.metrics_ports[0]), "path": labels.METRICS_PATH}
    return {f"prometheus.io/{key}": value for key, value in scrape.items()}
