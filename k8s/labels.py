"""Every name and label that our objects carry and that others look for: one list, so that what writes them and what reads them agree.

`RUN` finds all objects and pods of a run (`kubectl get all -l odonata/run=NAME`); `CONFIG` is the hash of what is trained, in labels
and in the name of its ConfigMap, so two objects of the same hash run the same config.

Left to whom: what stands in the objects is decided by the module that builds each of them.
"""

from pathlib import PurePosixPath

from trainer.errors import ConfigError

RUN = "odonata/run"
CONFIG = "odonata/config"
FLAVOUR = "odonata/flavour"
ENGINE = "odonata/engine"
URI = "odonata/uri"
"""Annotation: where the run lives in the store."""
CLUSTER = "odonata/cluster"
"""Annotation of the ConfigMap: the cluster config, from which a resume on other nodes renders again."""

APPLICATION = "odonata"
CONTAINER = "node"
"""The container that trains, under the name that Kubeflow Trainer asks for."""
PYTORCHJOB_CONTAINER = "pytorch"
REPLICATED_JOB = "node"
CONFIG_FOLDER = "/etc/odonata"
SCRATCH_FOLDER = "/scratch"
METRICS_PORT = "metrics"
"""Name of local rank 0's port, which probes ask; rank r's is metrics-r."""
METRICS_PATH = "/metrics/pod"
"""Where local rank 0 answers for all ranks of its pod."""

KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"
KUEUE_PRIORITY = "kueue.x-k8s.io/priority-class"
KUEUE_TOPOLOGY = "kueue.x-k8s.io/podset-{}-topology"
VOLCANO_GROUP = "scheduling.k8s.io/group-name"
VOLCANO_QUEUE = "scheduling.volcano.sh/queue-name"
EXCLUSIVE_TOPOLOGY = "alpha.jobset.sigs.k8s.io/exclusive-topology"
TRAINJOB_STEP = "trainer.kubeflow.org/trainjob-ancestor-step"

_LONGEST_NAME = 40
"""A pod is named NAME-node-0-127-abcde, and a host name ends at 63 characters."""


def choose_name(uri: str, asked: str | None) -> str:
    """The name of a run's objects: `asked`, or the last part of its URI as a DNS label; ConfigError where neither is one."""
    plain = PurePosixPath(uri).name.lower().replace("_", "-").replace(".", "-")
    name = asked if asked is not None else plain
    letters = name.replace("-", "")
    is_label = letters.isascii() and letters.isalnum() and letters == letters.lower() and name[0].isalpha() and name[-1] != "-"
    if not is_label or len(name) > _LONGEST_NAME:
        raise ConfigError(
            f"the objects of run {uri} would be named {name!r}; a name begins with a letter, has lower-case letters, digits and hyphens "
            f"alone and at most {_LONGEST_NAME} of them: give one with --name"
        )
    return name


def name_job(namespace: str, name: str) -> str:
    """What the run's writer is called in its claim: every restart of one workload is the same job."""
    return f"{namespace}/{name}"


def port_name(local_rank: int) -> str:
    """The name of the port of a rank's /metrics."""
    return f"{METRICS_PORT}-{local_rank}" if local_rank else METRICS_PORT


def select(name: str) -> dict[str, str]:
    """The labels that choose the pods of one run and no others."""
    return {RUN: name}
