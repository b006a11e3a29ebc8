"""PyTorchJobs: an operator that knows only whether a code is below 128."""

from k8s.pytorchjob import build_pytorchjob
from tests.k8s.workloads import workload_of


def test_the_code_that_asks_for_a_retry_is_one_that_the_operator_retries() -> None:
    replicas = build_pytorchjob(workload_of(flavour="pytorchjob", nodes=4))["spec"]["pytorchReplicaSpecs"]
    for each in replicas.values():
        assert each["restartPolicy"] == "ExitCode"
        assert "--retry-code=143" in each["template"]["spec"]["containers"][0]["args"]


def test_the_first_node_is_the_master_and_the_others_are_workers() -> None:
    spec = build_pytorchjob(workload_of(flavour="pytorchjob", nodes=4, queue={"kind": "volcano", "name": "q"}))["spec"]
    assert {kind: each["replicas"] for kind, each in spec["pytorchReplicaSpecs"].items()} == {"Master": 1, "Worker": 3}
    assert spec["runPolicy"]["schedulingPolicy"] == {"queue": "q", "minAvailable": 4}
    container = spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    assert container["name"] == "pytorch"
    assert {"--node-rank=$(RANK)", "--main-address=$(MASTER_ADDR)", "--main-port=$(MASTER_PORT)"} <= set(container["args"])


def test_one_node_has_no_workers_and_meets_nobody() -> None:
    replicas = build_pytorchjob(workload_of(flavour="pytorchjob"))["spec"]["pytorchReplicaSpecs"]
    assert replicas.keys() == {"Master"}
    assert not any("--node-rank" in argument for argument in replicas["Master"]["template"]["spec"]["containers"][0]["args"])
