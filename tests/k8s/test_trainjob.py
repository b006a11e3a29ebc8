"""TrainJobs: what belongs to one run is in the TrainJob, and the runtime serves all."""

from k8s.render import dump_manifest
from k8s.trainjob import build_runtime, build_trainjob
from tests.k8s.workloads import workload_of


def test_runs_of_one_cluster_config_share_one_runtime_to_the_byte() -> None:
    first = workload_of(flavour="trainjob", nodes=4, name="first")
    second = workload_of("optim.lr=1e-3", flavour="trainjob", nodes=4, name="second")
    assert dump_manifest(build_runtime(first)) == dump_manifest(build_runtime(second))
    assert build_trainjob(second)["spec"]["runtimeRef"]["name"] == build_runtime(first)["metadata"]["name"]


def test_a_trainjob_brings_nodes_command_and_config() -> None:
    workload = workload_of(flavour="trainjob", nodes=4)
    spec = build_trainjob(workload)["spec"]
    trainer = spec["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 8)
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "8"
    assert {"--node-rank=$(PET_NODE_RANK)", "--main-address=$(PET_MASTER_ADDR)"} <= set(trainer["args"])
    (job,) = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]
    assert pod["metadata"]["labels"]["odonata/run"] == "all-video-base"
    assert pod["spec"]["volumes"] == [{"name": "config", "configMap": {"name": workload.config_name}}]


def test_the_runtime_keeps_security_probes_and_policies() -> None:
    runtime = build_runtime(workload_of(flavour="trainjob", nodes=4, queue={"kind": "volcano", "name": "q"}))["spec"]
    assert runtime["mlPolicy"] == {"numNodes": 1, "torch": {}}
    assert runtime["podGroupPolicy"] == {"volcano": {}}
    assert runtime["template"]["metadata"]["annotations"] == {"scheduling.volcano.sh/queue-name": "q"}
    job = runtime["template"]["spec"]["replicatedJobs"][0]["template"]
    assert job["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["name"] == "node"
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert "livenessProbe" in container
