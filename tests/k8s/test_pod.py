"""The pod: what a platform team would ask of it."""

import pytest

from k8s.pod import UNWIND_S
from tests.k8s.workloads import container_of, pod_of, workload_of


def test_the_pod_meets_the_restricted_standard() -> None:
    workload = workload_of()
    pod, container = pod_of(workload), container_of(workload)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert all(volume.keys() & {"configMap", "emptyDir"} for volume in pod["volumes"])


def test_rdma_adds_its_devices_and_the_right_to_pin_memory_and_nothing_more() -> None:
    container = container_of(workload_of(rdma={"rdma/hca": "8"}))
    assert container["resources"]["limits"]["rdma/hca"] == "8"
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}


def test_what_is_asked_for_is_what_is_allowed() -> None:
    resources = container_of(workload_of(gpus_per_node=4, gpu_resource="amd.com/gpu"))["resources"]
    assert resources["requests"] == resources["limits"]
    assert resources["limits"]["amd.com/gpu"] == "4"
    assert all(isinstance(amount, str) for amount in resources["limits"].values())


def test_a_pod_without_gpus_asks_for_none() -> None:
    assert container_of(workload_of(gpus_per_node=0))["resources"]["limits"].keys() == {"cpu", "memory", "ephemeral-storage"}


def test_secrets_come_by_reference_and_never_as_text() -> None:
    container = container_of(workload_of(secrets=["odonata-s3"]))
    assert container["envFrom"] == [{"secretRef": {"name": "odonata-s3"}}]


@pytest.mark.parametrize("grace_s", [30, 300])
def test_kubernetes_waits_longer_than_the_entrypoint_and_that_longer_than_the_save(grace_s: int) -> None:
    workload = workload_of(grace_s=grace_s)
    pod = pod_of(workload)
    assert workload.run.checkpoint.grace_s == grace_s
    assert f"--grace-s={grace_s}" in container_of(workload)["args"]
    assert pod["terminationGracePeriodSeconds"] >= grace_s + UNWIND_S
    assert "kill -TERM 1" in container_of(workload)["lifecycle"]["preStop"]["exec"]["command"][-1]


def test_a_hanging_collective_ends_the_run_by_itself_before_the_probe_ends_the_pod() -> None:
    probe = container_of(workload_of("parallel.timeout_s=600"))["livenessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > 600
    startup = container_of(workload_of(startup_s=900))["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 900


def test_each_rank_has_a_named_port_for_metrics_and_probes_ask_the_first() -> None:
    container = container_of(workload_of("observe.metrics_port=9500", gpus_per_node=2))
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"main": 29500, "metrics": 9500, "metrics-1": 9501}
    assert {container[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "liveness", "readiness")} == {"metrics"}


def test_what_is_written_to_is_scratch_memory_or_a_writable_claim() -> None:
    claims = [{"claim": "data", "path": "/data"}, {"claim": "runs", "path": "/runs", "writable": True}]
    workload = workload_of(claims=claims, shared_memory="16Gi")
    written = {mount["mountPath"] for mount in container_of(workload)["volumeMounts"] if not mount.get("readOnly")}
    assert written == {"/scratch", "/tmp", "/dev/shm", "/runs"}
    (shm,) = [volume["emptyDir"] for volume in pod_of(workload)["volumes"] if volume["name"] == "shm"]
    assert shm == {"medium": "Memory", "sizeLimit": "16Gi"}


def test_pods_of_a_run_gather_in_a_block_and_keep_others_out() -> None:
    topology = {"key": "example.com/block", "required": True, "exclusive": True}
    affinity = pod_of(workload_of(nodes=4, topology=topology))["affinity"]
    (near,) = affinity["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert near == {"labelSelector": {"matchLabels": {"odonata/run": "all-video-base"}}, "topologyKey": "example.com/block"}
    (far,) = affinity["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert {"key": "odonata/run", "operator": "NotIn", "values": ["all-video-base"]} in far["labelSelector"]["matchExpressions"]


def test_a_preferred_block_is_no_condition() -> None:
    affinity = pod_of(workload_of(nodes=4, topology={"key": "example.com/block"}))["affinity"]
    assert affinity.keys() == {"podAffinity"}
    assert affinity["podAffinity"].keys() == {"preferredDuringSchedulingIgnoredDuringExecution"}


def test_in_place_only_the_code_that_asks_for_it_starts_a_container_again() -> None:
    container = container_of(workload_of(restart_in_place=True))
    assert container["restartPolicy"] == "Never"
    assert container["restartPolicyRules"] == [{"action": "Restart", "exitCodes": {"operator": "In", "values": [75]}}]


def test_the_doctor_comes_first_where_the_cluster_config_says_so() -> None:
    assert "--doctor" in container_of(workload_of(doctor=True))["args"]
    assert "--doctor" not in container_of(workload_of())["args"]
