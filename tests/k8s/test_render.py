"""What is rendered: right by the strict validators of each kind, the same as what is committed, and taken by kustomize."""

import copy
import shlex
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from k8s import labels
from k8s.render import dump_manifest, render, render_files, write_files
from k8s.workload import Manifest, Workload
from odonata.door import app
from tests.k8s.validators import IN_PLACE_VERSIONS, VERSIONS, find_problems
from tests.k8s.workloads import workload_of
from tests.runs import ROOT
from trainer.errors import ConfigError

EXAMPLES = ROOT / "k8s" / "examples"
COMMANDS = [
    shlex.split(line)[1:]
    for line in (ROOT / "docs" / "kubernetes.md").read_text().splitlines()
    if line.startswith("odonata render") and "-o k8s/examples/" in line
]
FLAVOURS = ("job", "jobset", "trainjob", "pytorchjob")
UNCHECKED = {"PodGroup", "Kustomization"}  # no package brings Volcano's schemas, and kustomize itself checks its own
EVERYTHING: dict[str, Any] = {
    "rdma": {"rdma/hca": "8"},
    "env": {"NCCL_DEBUG": "INFO"},
    "tolerations": [{"key": "spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}],
    "node_selector": {"pool": "gpu"},
    "topology": {"key": "example.com/block", "required": True, "exclusive": True},
    "priority_class": "high",
    "secrets": ["odonata-s3"],
    "image_pull_secrets": ["pull"],
    "claims": [{"claim": "data", "path": "/data"}],
    "service_account_annotations": {"example.com/role": "reader"},
}


def problems_of(workload: Workload, versions: tuple[str, ...] = VERSIONS) -> list[str]:
    objects = render(workload)
    return [
        f"{name}: {text}"
        for name, each in objects.items()
        if each["kind"] not in UNCHECKED
        for text in find_problems(each, versions)
    ]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_all_flavours_pass_the_strict_validators_of_each_version(flavour: str) -> None:
    assert problems_of(workload_of(flavour=flavour, nodes=4)) == []
    assert problems_of(workload_of(flavour=flavour), ("1.27", "1.37")) == []


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("kind", ["kueue", "volcano"])
def test_all_flavours_pass_with_every_setting_and_each_queue(flavour: str, kind: str) -> None:
    workload = workload_of(flavour=flavour, nodes=4, queue={"kind": kind, "name": "q"}, **EVERYTHING)
    assert problems_of(workload, ("1.27", "1.37")) == []


@pytest.mark.parametrize("flavour", ["job", "jobset", "trainjob"])
def test_a_restart_in_place_is_known_to_those_versions_that_have_it(flavour: str) -> None:
    workload = workload_of(flavour=flavour, nodes=2, restart_in_place=True)
    assert problems_of(workload, IN_PLACE_VERSIONS) == []
    assert any("restartPolicyRules" in problem for problem in problems_of(workload, ("1.33",)))


def spec_of_pod(manifest: Manifest) -> Manifest:
    spec: Manifest = manifest["spec"]
    while "containers" not in spec:
        inner = spec.get("replicatedJobs", [None])[0] or spec.get("pytorchReplicaSpecs", {}).get("Master") or spec
        spec = inner["template"]["spec"]
    return spec


def rename(content: Manifest, old: str, new: str) -> None:
    content[new] = content.pop(old)


MUTATIONS: dict[str, tuple[str, str, Callable[[Manifest], object]]] = {
    "job typo": ("job", "job.yaml", lambda m: rename(m["spec"], "parallelism", "parallelim")),
    "job type": ("job", "job.yaml", lambda m: m["spec"].update(backoffLimit="three")),
    "job policy without action": ("job", "job.yaml", lambda m: m["spec"]["podFailurePolicy"]["rules"][0].pop("action")),
    "job codes as text": (
        "job",
        "job.yaml",
        lambda m: m["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"].update(values=["2"]),
    ),
    "container typo": ("job", "job.yaml", lambda m: rename(spec_of_pod(m)["containers"][0], "volumeMounts", "mounts")),
    "security typo": ("job", "job.yaml", lambda m: rename(spec_of_pod(m)["securityContext"], "runAsNonRoot", "nonRoot")),
    "service port": ("job", "service.yaml", lambda m: m["spec"]["ports"][0].update(port="main")),
    "budget typo": ("job", "disruption_budget.yaml", lambda m: rename(m["spec"], "minAvailable", "minimum")),
    "policy rule": ("job", "network_policy.yaml", lambda m: m["spec"]["ingress"][0].update(allow=True)),
    "account": ("job", "service_account.yaml", lambda m: m.update(automountServiceAccountToken="no")),
    "config data": ("job", "config.yaml", lambda m: m["data"].update(number=1)),
    "monitor typo": ("job", "pod_monitor.yaml", lambda m: rename(m["spec"], "podMetricsEndpoints", "endpoints")),
    "monitor key": ("job", "pod_monitor.yaml", lambda m: m["spec"]["podMetricsEndpoints"][0].update(intervall="15s")),
    "jobset typo": ("jobset", "jobset.yaml", lambda m: rename(m["spec"], "failurePolicy", "failPolicy")),
    "jobset type": ("jobset", "jobset.yaml", lambda m: m["spec"]["failurePolicy"].update(maxRestarts="three")),
    "jobset rule": (
        "jobset",
        "jobset.yaml",
        lambda m: rename(m["spec"]["failurePolicy"]["rules"][0], "onJobFailureReasons", "reasons"),
    ),
    "jobset inner": (
        "jobset",
        "jobset.yaml",
        lambda m: rename(m["spec"]["replicatedJobs"][0]["template"]["spec"], "completionMode", "mode"),
    ),
    "jobset container": ("jobset", "jobset.yaml", lambda m: spec_of_pod(m)["containers"][0].update(gpu=8)),
    "trainjob typo": ("trainjob", "trainjob.yaml", lambda m: rename(m["spec"]["trainer"], "numNodes", "numNode")),
    "trainjob type": ("trainjob", "trainjob.yaml", lambda m: m["spec"]["trainer"].update(numNodes="x")),
    "trainjob patch": ("trainjob", "trainjob.yaml", lambda m: m["spec"]["runtimePatches"][0].pop("manager")),
    "runtime typo": ("trainjob", "runtime.yaml", lambda m: rename(m["spec"], "mlPolicy", "policy")),
    "runtime container": (
        "trainjob",
        "runtime.yaml",
        lambda m: spec_of_pod({"spec": m["spec"]["template"]["spec"]})["containers"][0].update(gpu=8),
    ),
    "pytorchjob typo": ("pytorchjob", "pytorchjob.yaml", lambda m: rename(m["spec"]["runPolicy"], "backoffLimit", "backoff")),
    "pytorchjob type": (
        "pytorchjob",
        "pytorchjob.yaml",
        lambda m: m["spec"]["pytorchReplicaSpecs"]["Master"].update(replicas="1"),
    ),
    "pytorchjob container": ("pytorchjob", "pytorchjob.yaml", lambda m: spec_of_pod(m)["containers"][0].update(gpu=8)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_validators_bite(mutation: str) -> None:
    flavour, name, change = MUTATIONS[mutation]
    manifest = copy.deepcopy(render(workload_of(flavour=flavour, nodes=2))[name])
    assert find_problems(manifest, ("1.34",)) == []
    change(manifest)
    assert find_problems(manifest, ("1.34",))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_object_and_every_pod_is_found_by_the_name_of_the_run(flavour: str) -> None:
    workload = workload_of(flavour=flavour, nodes=2, name="mine")
    objects = render(workload)
    shared = [each for each in objects.values() if each["kind"] == "ClusterTrainingRuntime"]
    assert all(each["metadata"]["labels"][labels.RUN] == "mine" for each in objects.values() if each not in shared)
    assert all(labels.RUN not in each["metadata"]["labels"] for each in shared), "a runtime serves all runs"
    assert all(each["metadata"]["namespace"] == "perception" for each in objects.values() if each not in shared)
    (owner,) = [each for name, each in objects.items() if name == f"{flavour}.yaml"]
    assert owner["metadata"]["annotations"][labels.URI] == workload.run.run.uri
    assert "odonata/run: mine" in dump_manifest(owner["spec"])


def test_the_order_of_the_files_is_the_order_in_which_they_are_applied() -> None:
    files = render_files(workload_of(nodes=2))
    listed = yaml.safe_load(files["kustomization.yaml"])["resources"]
    assert listed == [name for name in files if name != "kustomization.yaml"]
    assert listed[0] == "config.yaml"
    assert listed[-1] == "job.yaml"


def test_text_reads_back_to_the_same_objects_without_anchors() -> None:
    workload = workload_of(nodes=2, **EVERYTHING)
    for name, manifest in render(workload).items():
        text = render_files(workload)[name]
        assert yaml.safe_load(text) == manifest
        assert not any(
            line.lstrip(" -").startswith(("&", "*")) or ": &id" in line or ": *id" in line for line in text.splitlines()
        )


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: Path(command[command.index("-o") + 1]).name)
def test_committed_examples_are_what_render_prints(command: list[str], tmp_path: Path) -> None:
    committed = ROOT / command[command.index("-o") + 1]
    command = [str(tmp_path) if before == "-o" else word for before, word in pairwise(["", *command])]
    done = CliRunner().invoke(app, [str(ROOT / word) if word.endswith(".yaml") else word for word in command])
    assert done.exit_code == 0, done.output
    hint = f"render it again: the command stands in docs/kubernetes.md ({' '.join(command)})"
    assert sorted(path.name for path in committed.iterdir()) == sorted(path.name for path in tmp_path.iterdir()), hint
    for path in tmp_path.iterdir():
        assert (committed / path.name).read_text() == path.read_text(), hint


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_manifests_are_right(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    if manifest["kind"] not in UNCHECKED:
        assert find_problems(manifest, IN_PLACE_VERSIONS) == []


def test_all_examples_have_a_command_in_the_docs() -> None:
    assert {Path(command[command.index("-o") + 1]).name for command in COMMANDS} == {path.name for path in EXAMPLES.iterdir()}
    assert len(COMMANDS) == 3


def kustomize(folder: Path) -> list[Manifest]:
    kubectl = Path(sys.executable).with_name("kubectl")
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize("folder", sorted(EXAMPLES.iterdir()), ids=lambda folder: folder.name)
def test_kustomize_takes_an_example_as_it_is(folder: Path) -> None:
    files = [yaml.safe_load(path.read_text()) for path in folder.iterdir() if path.name != "kustomization.yaml"]
    built = kustomize(folder)
    assert {each["kind"]: each for each in built} == {each["kind"]: each for each in files}


@pytest.mark.parametrize("overlay", sorted((ROOT / "k8s" / "overlays").iterdir()), ids=lambda folder: folder.name)
def test_overlays_build_and_stay_right(overlay: Path) -> None:
    built = kustomize(overlay)
    assert {each["metadata"]["namespace"] for each in built} == {"perception-staging"}
    (job,) = [each for each in built if each["kind"] == "Job"]
    assert spec_of_pod(job)["containers"][0]["image"] == "registry.example.com/mirror/odonata:0.1.1-cuda"
    assert job["spec"]["backoffLimit"] == 1
    assert job["spec"]["template"]["metadata"]["labels"]["example.com/team"] == "perception"
    assert [problem for each in built for problem in find_problems(each, ("1.34",))] == []


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "jobset.yaml").touch()
    with pytest.raises(ConfigError, match=r"also holds jobset\.yaml; give another folder or clear it"):
        write_files(render_files(workload_of()), tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="give another folder with -o"):
        write_files({"a.yaml": ""}, tmp_path / "file")


def test_rendering_again_into_the_same_folder_replaces_what_lies_there(tmp_path: Path) -> None:
    write_files(render_files(workload_of()), tmp_path)
    write_files(render_files(workload_of(image="registry.example.com/odonata:2.0")), tmp_path)
    assert "odonata:2.0" in (tmp_path / "job.yaml").read_text()


def test_a_cluster_without_s3_takes_the_command_of_the_docs(tmp_path: Path) -> None:
    line = next(line for line in (ROOT / "docs" / "kubernetes.md").read_text().splitlines() if "clusters/volumes.yaml" in line)
    command = [str(tmp_path) if before == "-o" else word for before, word in pairwise(["", *shlex.split(line)[1:]])]
    done = CliRunner().invoke(app, [str(ROOT / word) if word.endswith(".yaml") else word for word in command])
    assert done.exit_code == 0, done.output
    pod = yaml.safe_load((tmp_path / "job.yaml").read_text())["spec"]["template"]["spec"]
    claims = [volume["persistentVolumeClaim"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    assert claims == [{"claimName": "datasets", "readOnly": True}, {"claimName": "runs", "readOnly": False}]
    assert not (tmp_path / "pod_monitor.yaml").exists()


def test_the_schema_of_cluster_configs_is_printed_without_a_run() -> None:
    done = CliRunner().invoke(app, ["render", "--schema"])
    assert done.exit_code == 0, done.output
    assert "s3_endpoint_url" in yaml.safe_load(done.output)["properties"]


def test_a_cpu_cluster_computes_in_float32() -> None:
    files = workload_of(gpus_per_node=0, processes_per_node=2).files
    assert yaml.safe_load(files["accelerate.yaml"])["mixed_precision"] == "no"
