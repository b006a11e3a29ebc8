"""Our runs as a cluster knows them: found by their labels, and what their objects say of them.

A run has one ConfigMap, which stays when the run ends or is stopped, and while it runs an owner of its pods. All that is needed to
go on with it is in the ConfigMap: the resolved run config and, in an annotation, the cluster config that it was resolved for. Owners of
other flavours have other kinds and words; here they become one.

Left to whom: how a run gets on is `progress`, what is shown of all this `status`.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from k8s import labels
from k8s.client import Cluster, Manifest
from k8s.cluster import ClusterConfig
from trainer.config.load import parse_run_config, parse_section
from trainer.config.run import RunConfig
from trainer.errors import ConfigError

OWNERS = {"job": "Job", "jobset": "JobSet", "trainjob": "TrainJob", "pytorchjob": "PyTorchJob"}
"""Flavour -> kind of what owns the pods."""
Phase = Literal["stopped", "stopping", "waiting", "starting", "running", "complete", "failed"]
ENDED: tuple[Phase, ...] = ("stopped", "complete", "failed")

_DONE = {"Complete", "Completed", "Succeeded"}
_OURS = {"app.kubernetes.io/managed-by": labels.APPLICATION}


@dataclass(frozen=True)
class KnownRun:
    """A run of which the cluster has a ConfigMap."""

    name: str
    config_map: Manifest
    owner: Manifest | None
    """What owns its pods; none where it was stopped, or ended long ago."""
    pods: Sequence[Manifest] = ()

    @property
    def flavour(self) -> str:
        """Key of OWNERS."""
        flavour: str = self.config_map["metadata"]["labels"][labels.FLAVOUR]
        return flavour

    @property
    def config(self) -> RunConfig:
        """The run as its pods read it."""
        return parse_run_config(yaml.safe_load(self.config_map["data"]["run.yaml"]), origin=f"ConfigMap {self._config_name}")

    @property
    def cluster(self) -> ClusterConfig:
        """The cluster config that it was rendered with."""
        text = self.config_map["metadata"].get("annotations", {}).get(labels.CLUSTER)
        if text is None:
            raise ConfigError(
                f"run {self.name} was to be read from its ConfigMap {self._config_name}, which has no annotation {labels.CLUSTER}: another "
                "version of Odonata made it; submit the run again from its config files"
            )
        complaint = f"{labels.CLUSTER} of ConfigMap {self._config_name} is not a cluster config"
        return parse_section(ClusterConfig, yaml.safe_load(text), complaint=complaint)

    @property
    def phase(self) -> Phase:
        """Where it stands."""
        if self.owner is None:
            return "stopped"
        if self.owner["metadata"].get("deletionTimestamp"):
            return "stopping"
        if (end := read_end(self.owner)) is not None:
            return end
        alive = [pod for pod in self.pods if pod["status"].get("phase") in ("Pending", "Running") and not is_ending(pod)]
        if alive and all(is_ready(pod) or was_ready(pod) for pod in alive):
            return "running"
        return "starting" if any(pod["status"]["phase"] == "Running" for pod in alive) else "waiting"

    @property
    def _config_name(self) -> str:
        name: str = self.config_map["metadata"]["name"]
        return name


def find_run(cluster: Cluster, name: str) -> KnownRun:
    """The run `name` with its pods; ConfigError names those that there are where it is none of them."""
    maps = _newest(cluster.list("ConfigMap", _OURS | labels.select(name)))
    if name not in maps:
        known = sorted(_newest(cluster.list("ConfigMap", _OURS)))
        others, near = ", ".join(known) or "none", difflib.get_close_matches(name, known, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"run {name} was asked for and namespace {cluster.namespace} does not know it; {meant}there are: {others} (another namespace "
            "is chosen with --namespace)"
        )
    flavour = maps[name]["metadata"]["labels"][labels.FLAVOUR]
    return KnownRun(name, maps[name], cluster.get(OWNERS[flavour], name), list_pods(cluster, labels.select(name)))


def find_runs(cluster: Cluster) -> list[KnownRun]:
    """All runs of the namespace, by name."""
    maps, pods = _newest(cluster.list("ConfigMap", _OURS)), list_pods(cluster, _OURS)
    flavours = {config_map["metadata"]["labels"][labels.FLAVOUR] for config_map in maps.values()}
    owners = {
        (flavour, owner["metadata"]["name"]): owner for flavour in flavours for owner in cluster.list(OWNERS[flavour], _OURS)
    }
    return [
        KnownRun(
            name,
            config_map,
            owners.get((config_map["metadata"]["labels"][labels.FLAVOUR], name)),
            [pod for pod in pods if pod["metadata"]["labels"][labels.RUN] == name],
        )
        for name, config_map in sorted(maps.items())
    ]


def list_pods(cluster: Cluster, selector: Mapping[str, str]) -> list[Manifest]:
    """Pods by node of the run, the newest of a node last."""
    pods = cluster.list("Pod", selector)
    return sorted(pods, key=lambda pod: (read_node_rank(pod), pod["metadata"]["creationTimestamp"]))


def read_end(owner: Manifest) -> Literal["complete", "failed"] | None:
    """How an owner of pods has ended, if it has."""
    true = _true_conditions(owner)
    return "complete" if _DONE & true.keys() else "failed" if "Failed" in true else None


def describe_end(owner: Manifest) -> str:
    """Why an owner of pods has failed, in its controller's words."""
    condition = _true_conditions(owner).get("Failed", {})
    return ": ".join(condition[key] for key in ("reason", "message") if condition.get(key))


def read_node_rank(pod: Manifest) -> int:
    """Which of the run's nodes a pod is, as its controller has written it down; a plain Job has one."""
    known = pod["metadata"].get("labels", {}) | pod["metadata"].get("annotations", {})
    index = int(known.get("batch.kubernetes.io/job-completion-index", known.get("training.kubeflow.org/replica-index", "0")))
    return index + (known.get("training.kubeflow.org/replica-type") == "worker")  # the master is node 0


def is_ending(pod: Manifest) -> bool:
    """Whether it was told to end."""
    return "deletionTimestamp" in pod["metadata"]


def is_ready(pod: Manifest) -> bool:
    """Whether it trains."""
    return any(each["type"] == "Ready" and each["status"] == "True" for each in pod["status"].get("conditions", ()))


def was_ready(pod: Manifest) -> bool:
    """Whether it has trained since its container began, and does not now: its condition has changed since."""
    began = read_container(pod).get("state", {}).get("running", {}).get("startedAt")
    changed = next(
        (each.get("lastTransitionTime") for each in pod["status"].get("conditions", ()) if each["type"] == "Ready"), None
    )
    return began is not None and changed is not None and changed > began and not is_ready(pod)


def read_container(pod: Manifest) -> Manifest:
    """The status of the container that trains; empty before there is one."""
    return next(iter(pod["status"].get("containerStatuses", ())), {})


def read_exit(pod: Manifest) -> Manifest | None:
    """How the container that trains has ended: exitCode, reason, finishedAt, and its last words as message."""
    ended: Manifest | None = read_container(pod).get("state", {}).get("terminated")
    return ended


def _true_conditions(owner: Manifest) -> dict[str, Any]:
    return {each["type"]: each for each in owner.get("status", {}).get("conditions") or () if each["status"] == "True"}


def _newest(config_maps: Sequence[Manifest]) -> dict[str, Manifest]:
    """By run; there are two for a moment, while another config of a run is submitted."""
    ordered = sorted(config_maps, key=lambda each: each["metadata"]["creationTimestamp"])
    return {each["metadata"]["labels"][labels.RUN]: each for each in ordered if labels.RUN in each["metadata"]["labels"]}
