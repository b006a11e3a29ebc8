"""Status: what a run waits for, told by a real scheduler's, kubelet's and quota's words, and by those of controllers that are not here."""

import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest

from k8s.client import Cluster, connect
from k8s.runs import KnownRun, find_run, find_runs
from k8s.status import find_reasons, read_status
from k8s.stop import stop
from k8s.submit import submit
from k8s.surroundings import build_config_map
from tests.k8s.control_plane import ControlPlane
from tests.k8s.kubelet import Kubelet
from tests.k8s.test_runs import owner, pod
from tests.k8s.workloads import ROOT, workload_of
from trainer.config.store import StoreConfig

NOWHERE = StoreConfig(endpoint_url="http://127.0.0.1:9")
SMALL: dict[str, Any] = {
    "gpus_per_node": 0,
    "cpu": "500m",
    "memory": "1Gi",
    "shared_memory": "1Mi",
    "monitoring": {"pod_monitor": False},
}


@pytest.fixture(scope="module")
def cluster(control_plane: ControlPlane, kubelet: Kubelet) -> Cluster:
    """A namespace of this file's own, so that its lists hold nobody else's runs."""
    del kubelet
    control_plane.must("create", "namespace", "watched")
    return connect(context=None, namespace="watched", config_file=control_plane.kubeconfig)


def submit_unreachable(cluster: Cluster, name: str) -> None:
    """A run that no node has room for, in a store that nobody answers for."""
    workload = workload_of(f"run.uri=s3://bucket/runs/{name}", **SMALL | {"namespace": cluster.namespace, "cpu": "96"})
    submit(cluster, workload, store=NOWHERE, lenient=True)


def wait_for_reason(cluster: Cluster, name: str, **changes: Any) -> str:
    """Submit a run and return the first reason why it waits."""
    workload = workload_of(f"run.uri=s3://bucket/runs/{name}", **SMALL | {"namespace": cluster.namespace} | changes)
    submit(cluster, workload, store=NOWHERE, lenient=True)
    deadline = time.monotonic() + 60
    while not (reasons := find_reasons(cluster, find_run(cluster, name))):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert find_run(cluster, name).phase == "waiting"
    stop(cluster, name, forget=True)
    return reasons[0]


def test_a_run_that_fits_on_no_node_says_so(cluster: Cluster) -> None:
    assert wait_for_reason(cluster, "large", cpu="96") == "unschedulable: 0/1 nodes are available: 1 Insufficient cpu."
    assert "didn't match node selector" in wait_for_reason(cluster, "picky", node_selector={"pool": "gpu"})


def test_an_image_that_is_not_there_is_named(cluster: Cluster) -> None:
    image = "registry.example.com/odonata:0.9"
    assert wait_for_reason(cluster, "typo", image=image) == f'image: ImagePullBackOff: Back-off pulling image "{image}"'


def test_a_secret_that_is_not_there_is_named(cluster: Cluster) -> None:
    reason = wait_for_reason(cluster, "keyless", secrets=["nowhere"])
    assert reason == 'container: CreateContainerConfigError: secret "nowhere" not found'


def test_a_quota_that_is_used_up_is_named(cluster: Cluster, control_plane: ControlPlane) -> None:
    control_plane.must("create", "namespace", "small")
    control_plane.must("create", "quota", "few", "-n", "small", "--hard=pods=0")
    deadline = time.monotonic() + 30
    while "hard" not in json.loads(control_plane.must("get", "quota", "few", "-n", "small", "-o", "json"))["status"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    small = connect(context=None, namespace="small", config_file=control_plane.kubeconfig)
    assert "exceeded quota: few" in wait_for_reason(small, "poor")


def test_a_store_that_cannot_be_reached_from_here_is_a_line_and_no_error(cluster: Cluster) -> None:
    submit_unreachable(cluster, "far")
    found = read_status(cluster, find_run(cluster, "far"), store=NOWHERE)
    assert (found.name, found.namespace, found.flavour, found.nodes) == ("far", "watched", "job", 1)
    assert found.progress is None and found.restarts == 0
    assert found.reasons[-1].startswith("store: s3://bucket/runs/far was asked to read starts.jsonl")
    assert [run.name for run in find_runs(cluster)] == ["far"]
    stop(cluster, "far")
    assert find_run(cluster, "far").phase == "stopped"
    assert find_reasons(cluster, find_run(cluster, "far")) == []
    stop(cluster, "far", forget=True)


def test_the_commands_say_it_in_tables(cluster: Cluster, control_plane: ControlPlane) -> None:
    submit_unreachable(cluster, "told")

    def say(*command: str) -> str:
        environment = os.environ | {"KUBECONFIG": str(control_plane.kubeconfig), "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-m", "odonata", *command, "--namespace", "watched"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert say("list").split("\n")[1].split() == ["told", "job", "waiting", "0/1", "s3://bucket/runs/told"]
    told = say("status", "told", "--store", "endpoint_url=http://127.0.0.1:9")
    assert told.startswith("job watched/told: waiting, restarts: 0, s3://bucket/runs/told\n")
    assert json.loads(say("status", "told", "--json", "--store", "endpoint_url=http://127.0.0.1:9"))["phase"] == "waiting"
    assert say("logs", "told").endswith(": pending\n")
    assert say("stop", "told", "--forget") == "run told: stopped, its pods have ended; the cluster has forgotten it\n"


class Silent:
    """A cluster in which nothing else happens."""

    namespace = "perception"

    def list(self, kind: str, selector: dict[str, str], **fields: str) -> list[dict[str, Any]]:
        return []


def reasons_of(owner_: dict[str, Any], *pods: dict[str, Any]) -> list[str]:
    return find_reasons(Silent(), KnownRun("mine", build_config_map(workload_of()), owner_, pods))  # type: ignore[arg-type]


def test_a_queue_that_has_not_admitted_the_run_is_named() -> None:
    queued = owner()
    queued["spec"]["suspend"] = True
    assert reasons_of(queued) == ["suspended: somebody has set spec.suspend"]
    queued["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "pretraining"}
    assert reasons_of(queued) == ["queue: Kueue has not admitted it yet to pretraining"]
    gated = pod("Pending")
    gated["status"]["conditions"] = [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "SchedulingGated",
            "message": "blocked due to non-empty scheduling gates",
        }
    ]
    assert reasons_of(owner(), gated) == ["queue: blocked due to non-empty scheduling gates"]


def test_what_all_pods_wait_for_is_said_once_and_a_failure_in_its_own_last_words() -> None:
    waiting, failed = pod("Pending"), pod("Failed")
    waiting["status"]["conditions"] = [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no room"}
    ]
    last_words = "odonata: data.root is nowhere\n: 2 (pid: 2680)\nerror_file: <N/A>\n2026-11-22 05:20:41,935 ERROR   data.root is nowhere\n"
    ended = {"exitCode": 2, "reason": "Error", "message": last_words}
    failed["status"]["containerStatuses"] = [{"state": {"terminated": ended}}]
    assert reasons_of(owner(), waiting, waiting, failed) == [
        "unschedulable: no room",
        "node 0 ended with 2 (config, data or checkpoint wrong, or the loss diverged: no use trying again): data.root is nowhere",
    ]
    failed["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] = 75
    assert reasons_of(owner(), failed) == [], "it has asked for another try, and gets it"
    assert reasons_of(owner(("Failed", "True")))[0] == "failed: R: M"
    assert reasons_of(owner(("Complete", "True")), failed) == []


def test_a_run_in_a_folder_that_only_pods_see_has_no_progress_here(cluster: Cluster) -> None:
    claims = [{"claim": "runs", "path": "/mounted/in/pods", "writable": True}]
    workload = workload_of(
        "run.uri=/mounted/in/pods/unseen", claims=claims, **SMALL | {"namespace": cluster.namespace, "cpu": "96"}
    )
    submit(cluster, workload, store=NOWHERE, lenient=True)
    found = read_status(cluster, find_run(cluster, "unseen"), store=None)
    assert found.progress is None
    assert not any(reason.startswith("store:") for reason in found.reasons)
    stop(cluster, "unseen", forget=True)
