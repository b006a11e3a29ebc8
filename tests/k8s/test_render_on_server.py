"""Manifests against a real API server: it takes them, keeps what its version knows, and refuses what is wrong."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from k8s.render import render
from k8s.workload import Manifest
from tests.k8s.control_plane import ControlPlane
from tests.k8s.test_render import EVERYTHING, rename, spec_of_pod
from tests.k8s.workloads import workload_of

LATER = {"$.spec.completionMode", "$.spec.podFailurePolicy", "$.spec.ttlSecondsAfterFinished"}
"""What an old server drops without a word: 1.21 brought the first and the last, 1.25 the second."""


def dropped(sent: Any, kept: Any, path: str = "$") -> list[str]:
    """Paths of what the server did not keep as it was sent; what it adds is its own."""
    if isinstance(sent, dict):
        return [
            each
            for key, value in sent.items()
            for each in ([f"{path}.{key}"] if key not in kept else dropped(value, kept[key], f"{path}.{key}"))
        ]
    if isinstance(sent, list):
        return [each for place, value in enumerate(sent) for each in dropped(value, kept[place], f"{path}[{place}]")]
    return [] if sent == kept else [path]


def served(plane: ControlPlane, manifest: Manifest) -> bool:
    group, _, version = manifest["apiVersion"].rpartition("/")
    found = plane.kubectl("get", "--raw", f"/apis/{group}/{version}" if group else f"/api/{version}")
    return found.returncode == 0 and any(each["kind"] == manifest["kind"] for each in json.loads(found.stdout)["resources"])


@pytest.mark.parametrize("changes", [{}, {"nodes": 4}, {"nodes": 4, **EVERYTHING}], ids=["one", "four", "everything"])
def test_the_server_takes_what_its_version_knows_and_keeps_all_of_it(
    control_plane: ControlPlane, changes: dict[str, Any]
) -> None:
    taken = set()
    for name, manifest in render(workload_of(**changes)).items():
        if not served(control_plane, manifest):
            continue
        answer = control_plane.dry_run(manifest)
        assert answer.returncode == 0, f"{name}: {answer.stderr}"
        assert set(dropped(manifest, json.loads(answer.stdout))) <= LATER, name
        taken.add(manifest["kind"])
    assert {"ConfigMap", "ServiceAccount", "NetworkPolicy", "Job"} <= taken


WRONG: dict[str, tuple[str, Callable[[Manifest], object], str]] = {
    "a container without an image": ("job.yaml", lambda m: spec_of_pod(m)["containers"][0].pop("image"), "image: Required"),
    "a pod that restarts for ever": ("job.yaml", lambda m: spec_of_pod(m).update(restartPolicy="Always"), "restartPolicy"),
    "a limit below its request": (
        "job.yaml",
        lambda m: spec_of_pod(m)["containers"][0]["resources"]["limits"].update(memory="1Gi"),
        "must be less than or equal to memory limit",
    ),
    "half the GPUs": (
        "job.yaml",
        lambda m: spec_of_pod(m)["containers"][0]["resources"]["requests"].update({"nvidia.com/gpu": "4"}),
        "must be equal to nvidia.com/gpu limit",
    ),
    "a mount of no volume": ("job.yaml", lambda m: spec_of_pod(m)["volumes"].pop(), "volumeMounts"),
    "a probe of no port": (
        "job.yaml",
        lambda m: spec_of_pod(m)["containers"][0]["livenessProbe"]["httpGet"].update(port="Metrics!"),
        "livenessProbe.httpGet.port",
    ),
    "a name that DNS does not take": ("service.yaml", lambda m: m["metadata"].update(name="all_video"), "metadata.name"),
    "a label that is too long": ("config.yaml", lambda m: m["metadata"]["labels"].update({"odonata/run": "x" * 64}), "labels"),
    "a block of addresses": (
        "network_policy.yaml",
        lambda m: m["spec"]["egress"][2]["to"][0]["ipBlock"].update(cidr="0.0.0.0"),
        "cidr",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_server_would_say_so(control_plane: ControlPlane, wrong: str) -> None:
    name, change, sentence = WRONG[wrong]
    manifest = copy.deepcopy(render(workload_of(nodes=2))[name])
    change(manifest)
    answer = control_plane.dry_run(manifest)
    assert answer.returncode != 0
    assert sentence in answer.stderr


def test_a_field_that_nobody_knows_is_noticed_by_comparing(control_plane: ControlPlane) -> None:
    manifest = copy.deepcopy(render(workload_of())["job.yaml"])
    rename(manifest["spec"], "backoffLimit", "backofLimit")
    assert "$.spec.backofLimit" in dropped(manifest, json.loads(control_plane.dry_run(manifest).stdout))
