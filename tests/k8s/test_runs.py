"""Runs as a cluster knows them: found by labels, judged by what owners of all flavours say."""

from typing import Any

import pytest
import yaml

from k8s import labels
from k8s.runs import OWNERS, KnownRun, describe_end, read_end, read_node_rank
from k8s.surroundings import build_config_map
from tests.k8s.workloads import workload_of
from trainer.errors import ConfigError

Manifest = dict[str, Any]


def owner(*conditions: tuple[str, str], **metadata: str) -> Manifest:
    true = [{"type": kind, "status": status, "reason": "R", "message": "M"} for kind, status in conditions]
    return {"metadata": {"name": "mine", "labels": {}, **metadata}, "spec": {}, "status": {"conditions": true}}


def pod(phase: str, *, ready: bool = False, since: str = "10:00", **metadata: Any) -> Manifest:
    """One whose container has begun at 10:01."""
    running = {"state": {"running": {"startedAt": "10:01"}}} if phase == "Running" else {}
    return {
        "metadata": {"name": "pod", "labels": {}, "creationTimestamp": "1", **metadata},
        "spec": {"containers": [{"name": "node"}]},
        "status": {
            "phase": phase,
            "conditions": [{"type": "Ready", "status": str(ready), "lastTransitionTime": since}],
            "containerStatuses": [running],
        },
    }


def known(owner: Manifest | None, *pods: Manifest, **changes: Any) -> KnownRun:
    return KnownRun("mine", build_config_map(workload_of(**changes)), owner, pods)


def test_a_config_map_has_all_that_a_resume_needs() -> None:
    workload = workload_of(nodes=4)
    run = KnownRun(workload.name, yaml.safe_load(yaml.safe_dump(build_config_map(workload))), None)
    assert run.config == workload.run
    assert run.cluster == workload.cluster
    assert run.flavour == "job"


def test_a_config_map_of_an_older_version_is_said_so() -> None:
    run = known(None)
    del run.config_map["metadata"]["annotations"]
    with pytest.raises(ConfigError, match=r"has no annotation odonata/cluster: .*submit the run again"):
        _ = run.cluster


@pytest.mark.parametrize(
    ("condition", "end"),
    [
        ("Complete", "complete"),  # Job, TrainJob
        ("Completed", "complete"),  # JobSet
        ("Succeeded", "complete"),  # PyTorchJob
        ("Failed", "failed"),
        ("Suspended", None),
        ("FailureTarget", None),
    ],
)
def test_owners_of_all_flavours_end_in_one_of_two_ways(condition: str, end: str | None) -> None:
    assert read_end(owner((condition, "True"))) == end
    assert read_end(owner((condition, "False"))) is None
    assert read_end({"metadata": {}, "status": {"conditions": None}}) is None
    assert read_end({"metadata": {}}) is None


def test_the_end_is_told_in_the_controller_s_words() -> None:
    assert describe_end(owner(("Failed", "True"))) == "R: M"
    assert describe_end(owner(("Complete", "True"))) == ""


@pytest.mark.parametrize(
    ("owner", "pods", "phase"),
    [
        (None, [], "stopped"),
        (owner(deletionTimestamp="now"), [pod("Running", ready=True)], "stopping"),
        (owner(("Complete", "True")), [pod("Succeeded")], "complete"),
        (owner(("Failed", "True")), [pod("Failed")], "failed"),
        (owner(), [], "waiting"),
        (owner(), [pod("Pending"), pod("Pending")], "waiting"),
        (owner(), [pod("Running"), pod("Pending")], "starting"),
        (owner(), [pod("Running", ready=True), pod("Pending")], "starting"),
        (owner(), [pod("Running", ready=True), pod("Running", ready=True)], "running"),
        (owner(), [pod("Failed"), pod("Running", ready=True)], "running"),
        (
            owner(),
            [pod("Running", since="10:05"), pod("Running", ready=True)],
            "running",
        ),  # it has trained, and takes no step now
        (owner(), [pod("Running", ready=True, deletionTimestamp="now"), pod("Pending")], "waiting"),
    ],
)
def test_a_phase_is_what_owner_and_pods_come_to(owner: Manifest | None, pods: list[Manifest], phase: str) -> None:
    assert known(owner, *pods).phase == phase


@pytest.mark.parametrize(
    ("metadata", "rank"),
    [
        ({"labels": {}}, 0),
        ({"labels": {"batch.kubernetes.io/job-completion-index": "3"}}, 3),
        ({"labels": {}, "annotations": {"batch.kubernetes.io/job-completion-index": "3"}}, 3),  # before Kubernetes 1.28
        ({"labels": {"training.kubeflow.org/replica-type": "master", "training.kubeflow.org/replica-index": "0"}}, 0),
        ({"labels": {"training.kubeflow.org/replica-type": "worker", "training.kubeflow.org/replica-index": "0"}}, 1),
    ],
)
def test_the_node_of_a_pod_is_what_its_controller_has_written_down(metadata: Manifest, rank: int) -> None:
    assert read_node_rank(pod("Running", **metadata)) == rank


def test_every_flavour_has_an_owner_whose_kind_is_rendered() -> None:
    for flavour, kind in OWNERS.items():
        run = known(None, flavour=flavour)
        assert run.config_map["metadata"]["labels"][labels.FLAVOUR] == flavour
        assert kind.lower() == flavour
