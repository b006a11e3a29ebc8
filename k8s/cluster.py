"""What of a cluster a run needs to be told: image, nodes, devices, where pods may go, who may reach them, who pays.

A file of its own beside the run config, because the same run goes to several clusters and the same cluster takes many runs. Whatever is
learnt stands in the run config; nothing here changes it. Secrets are named, never held.

Left to whom: rules that need both files (does the batch divide, is what the run writes mounted) are in `workload`.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from k8s.forms import (
    Bytes,
    Cores,
    Count,
    DnsLabel,
    ImageName,
    LabelKey,
    LabelValue,
    MountPath,
    ObjectName,
    ResourceName,
    Url,
    count_bytes,
)
from models.config import Section
from trainer.config.load import load_section

_SECRETIVE = re.compile("SECRET|PASSWORD|TOKEN|CREDENTIAL|PRIVATE_KEY|ACCESS_KEY|API_KEY")
_LAUNCHERS = re.compile(
    r"^(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|NODE_RANK|(MASTER|PET|TORCHELASTIC|ACCELERATE|FSDP)_\w+|ODONATA_\w+)$"
)


class Toleration(Section):
    """A taint of nodes that the pods put up with."""

    key: LabelKey | None = None
    """Key of the taint; none with operator Exists is every taint."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Exists takes any value, Equal only `value`."""
    value: LabelValue | None = None
    """Value of the taint, with Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; none is each of them."""

    @model_validator(mode="after")
    def only_equal_has_a_value(self) -> "Toleration":
        if (self.operator == "Equal") != (self.value is not None) or (self.key is None and self.operator == "Equal"):
            raise ValueError(
                f"operator {self.operator} goes with value {self.value!r}: Equal needs a key and a value, Exists has no value"
            )
        return self


class Topology(Section):
    """Nodes that share a fast network, so that all pods of a run should be among them."""

    key: LabelKey
    """Label of nodes whose value names the block, rack or pool."""
    required: bool = False
    """Wait for a block that has room for all, rather than train across blocks."""
    exclusive: bool = False
    """Share the block with no other run of ours."""


class KueueQueue(Section):
    """Kueue admits the run as a whole, once its queue has the quota."""

    kind: Literal["kueue"]
    name: ObjectName
    """LocalQueue of the namespace."""
    priority_class: ObjectName | None = None
    """WorkloadPriorityClass: who goes first and who is preempted; none is the cluster's default."""


class VolcanoQueue(Section):
    """Volcano binds all pods of the run or none."""

    kind: Literal["volcano"]
    name: ObjectName
    """Queue of Volcano."""


class Claim(Section):
    """A persistent volume with data or, without S3, with the run itself."""

    claim: ObjectName
    """PersistentVolumeClaim of the namespace; with several nodes one that many may mount."""
    path: MountPath
    """Where the pods see it."""
    writable: bool = False
    """Mount it for writing, as a run's own place needs; data sets do not."""


class Monitoring(Section):
    """Who scrapes /metrics."""

    namespace: DnsLabel = "monitoring"
    """The network policy lets pods of this namespace in, and no others."""
    pod_monitor: bool = True
    """Render a PodMonitor; its kind must be known to the cluster (Prometheus operator). Without, pods carry prometheus.io annotations."""
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    """Labels that the Prometheus looks for in PodMonitors, as release: kube-prometheus-stack."""


class ClusterConfig(Section):
    """One way to run on one cluster."""

    schema_version: Literal[1]
    """Version of this schema; a file for another version is refused rather than misread."""
    flavour: Literal["job", "jobset", "trainjob", "pytorchjob"] = "job"
    """Kind of object that owns the pods; docs/kubernetes.md says when to take which."""
    namespace: DnsLabel
    """Namespace of everything that is rendered; it has to exist."""

    image: ImageName
    """Image of launch/Dockerfile, with a tag that does not move or a digest: all nodes of all restarts must run the same code."""
    image_pull_secrets: tuple[ObjectName, ...] = ()
    """Secrets of the namespace with which the image is pulled."""

    engine: Literal["ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"] = "fsdp2"
    """File of launch/accelerate that the processes start with; hsdp shards inside a node and replicates across."""
    precision: Literal["no", "bf16"] | None = None
    """Accelerate's mixed_precision, where no is float32; none is bf16 on GPUs and float32 on CPUs."""

    nodes: int = Field(1, ge=1, le=1024)
    """Pods, one a node."""
    gpus_per_node: int = Field(8, ge=0, le=16)
    """GPUs of a pod; 0 trains on CPUs."""
    gpu_resource: ResourceName = "nvidia.com/gpu"
    """Name under which the device plugin offers them."""
    processes_per_node: int | None = Field(None, ge=1, le=16)
    """Ranks of a pod; none is one a GPU, or one where there is no GPU."""
    cpu: Cores = "96"
    """Cores of a pod, asked for and allowed."""
    memory: Bytes = "900Gi"
    """Host memory of a pod, asked for and allowed; staged checkpoints and /dev/shm count."""
    shared_memory: Bytes = "64Gi"
    """Size of /dev/shm, through which loader processes hand over batches."""
    scratch: Bytes = "500Gi"
    """Node disk under /scratch, the only place in a pod that can be written to: index, cache of shards, temporary files."""
    rdma: dict[ResourceName, Count] = Field(default_factory=dict)
    """Resources of the network plugin, as rdma/hca: "8"; with them the container may pin memory (IPC_LOCK)."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment of the container, as NCCL_IB_HCA; no secrets."""

    node_selector: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    """Labels that a node must have."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints that the pods put up with, those of spot nodes among them."""
    topology: Topology | None = None
    """Which nodes lie close to each other; none leaves it to the scheduler."""
    priority_class: ObjectName | None = None
    """PriorityClass of the pods; none is the cluster's default."""
    queue: Annotated[KueueQueue | VolcanoQueue, Field(discriminator="kind")] | None = None
    """Who decides when the run starts; none is the scheduler, pod by pod."""

    service_account: ObjectName | None = None
    """An account that exists, say one that a cloud lends a role; none makes one of the run's own, without any right."""
    service_account_annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations of the account that is made, as a cloud's role wants them."""
    secrets: tuple[ObjectName, ...] = ()
    """Secrets whose keys become environment variables, as AWS_ACCESS_KEY_ID."""
    s3_endpoint_url: Url | None = None
    """S3 server as the pods see it; takes the place of store.endpoint_url in the run config."""
    claims: tuple[Claim, ...] = ()
    """Volumes with data."""
    user_id: int = Field(10001, ge=1)
    """User and group that the pods run as, and that owns what they write."""

    grace_s: int = Field(120, ge=20)
    """Seconds between the notice and the kill, in which the step ends and a checkpoint is committed; clouds give spot nodes 30 to 120."""
    startup_s: int = Field(1800, ge=60)
    """Seconds from a container's start to its first metrics: data index, rendezvous, resume."""
    failures: int = Field(3, ge=0)
    """Failures of ours (exit code 1, out of memory) before the run is given up; preemption and lost peers do not count."""
    ttl_s: int = Field(7 * 86400, ge=0)
    """Seconds that a finished run's objects, and so its logs, are kept."""
    restart_in_place: bool = False
    """Start a container that asks for it (exit code 75) again in its pod, with its node and scratch; needs Kubernetes 1.35."""
    doctor: bool = False
    """Let all nodes run `odonata doctor` before they train; it costs each start a launch, some ten seconds and more where NCCL is slow."""
    evictable: bool = True
    """Let drains of nodes evict one pod at a time, the next only when all train again; without, drains wait for the end of the run."""
    monitoring: Monitoring = Monitoring()

    @property
    def processes(self) -> int:
        """Ranks of a pod."""
        return self.processes_per_node or max(1, self.gpus_per_node)

    @property
    def mixed_precision(self) -> str:
        """`precision`, or what the devices are good at."""
        return self.precision or ("bf16" if self.gpus_per_node else "no")

    @property
    def world_size(self) -> int:
        """Ranks of all pods."""
        return self.nodes * self.processes

    @field_validator("image")
    @classmethod
    def image_does_not_move(cls, image: str) -> str:
        tag = image.rpartition("/")[2].partition("@")[0].partition(":")[2]
        if "@" not in image and tag in ("", "latest"):
            raise ValueError(
                f"{image} may be another image tomorrow, and restarted nodes would run other code; give a tag or a digest"
            )
        return image

    @field_validator("env")
    @classmethod
    def environment_holds_no_secrets_and_no_ranks(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is no name of a variable; letters, digits and underscores, no digit first")
            if _SECRETIVE.search(name.upper()):
                raise ValueError(
                    f"{name} looks like a secret, and everybody who may read pods reads it; put it into a Secret and name that in secrets"
                )
            if _LAUNCHERS.match(name):
                raise ValueError(f"{name} is set by the launcher; leave it out")
        return env

    @model_validator(mode="after")
    def processes_share_no_gpu(self) -> "ClusterConfig":
        if self.gpus_per_node and self.processes != self.gpus_per_node:
            raise ValueError(
                f"processes_per_node is {self.processes_per_node} with {self.gpus_per_node} GPUs, and a rank has one GPU; drop it"
            )
        return self

    @model_validator(mode="after")
    def shared_memory_fits_into_memory(self) -> "ClusterConfig":
        if count_bytes(self.shared_memory) >= count_bytes(self.memory):
            raise ValueError(f"shared_memory {self.shared_memory} counts as memory, and that is {self.memory}; raise memory")
        return self

    @model_validator(mode="after")
    def an_account_is_annotated_where_it_is_made(self) -> "ClusterConfig":
        if self.service_account and self.service_account_annotations:
            raise ValueError(
                f"service_account {self.service_account} exists, so its annotations are not ours; drop one of the two"
            )
        return self

    @model_validator(mode="after")
    def mounts_lie_side_by_side(self) -> "ClusterConfig":
        paths = [claim.path for claim in self.claims]
        for path in paths:
            over = [other for other in ["/scratch", "/etc", "/tmp", "/dev", "/proc", "/sys", "/opt"] if _lies_in(path, other)]
            over += [other for other in paths if other != path and _lies_in(path, other)]
            if over or paths.count(path) > 1:
                raise ValueError(
                    f"claims mount {path} over {(over or [path])[0]}; give each a place of its own, as /data/{path.rpartition('/')[2]}"
                )
        return self

    @model_validator(mode="after")
    def in_place_needs_a_job(self) -> "ClusterConfig":
        if self.restart_in_place and self.flavour == "pytorchjob":
            raise ValueError("restart_in_place goes with Jobs, and a pytorchjob has none; take flavour jobset or drop it")
        return self


def cluster_config_schema() -> str:
    """JSON schema of a cluster config, for editors and for the curious."""
    return json.dumps(ClusterConfig.model_json_schema(), indent=2)


def load_cluster_config(path: Path) -> ClusterConfig:
    """The cluster that `path` describes; ConfigError says all that is wrong."""
    return load_section(ClusterConfig, path, what="cluster config", place="k8s/clusters")


def _lies_in(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(folder)
