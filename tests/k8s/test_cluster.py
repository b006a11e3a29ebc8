"""The cluster config: every one that is shipped loads, and what is wrong is refused with a sentence before a cluster sees it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s.cluster import ClusterConfig, load_cluster_config
from tests.k8s.workloads import CLUSTERS, MINIMAL
from trainer.errors import ConfigError


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_cluster_config_loads(path: Path) -> None:
    assert load_cluster_config(path).schema_version == 1


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"schema_version": 2}, "schema_version: Input should be 1"),
        ({"namespace": None}, "namespace: Input should be a valid string"),
        ({"namespace": "Perception"}, "is not a name of at most 63"),
        ({"namespace": "per.ception"}, "is not a name of at most 63"),
        ({"flavour": "statefulset"}, "flavour: Input should be 'job', 'jobset', 'trainjob' or 'pytorchjob'"),
        ({"engine": "fsdp1"}, "engine: Input should be"),
        ({"precision": "fp16"}, "precision: Input should be 'no' or 'bf16'"),
        ({"image": "odonata"}, "may be another image tomorrow"),
        ({"image": "registry.example.com:5000/odonata"}, "may be another image tomorrow"),
        ({"image": "registry.example.com/odonata:latest"}, "may be another image tomorrow"),
        ({"image": "odonata:1.0 --privileged"}, "is not an image with its tag"),
        ({"image": "odonata@sha256:12"}, "is not an image with its tag"),
        ({"image_pull_secrets": ["My Secret"]}, "image_pull_secrets.0: 'My Secret' is not a name"),
        ({"nodes": 0}, "nodes: Input should be greater than or equal to 1"),
        ({"gpus_per_node": -1}, "gpus_per_node: Input should be greater than or equal to 0"),
        ({"gpu_resource": "gpu"}, "gpu_resource: 'gpu' is not the name of a resource"),
        ({"gpus_per_node": 8, "processes_per_node": 4}, "a rank has one GPU"),
        ({"cpu": "many"}, "cpu: 'many' is not a number of cores"),
        ({"cpu": True}, "cpu: Input should be a valid string"),
        ({"memory": "900"}, "is not an amount of memory, as 900Gi"),
        ({"memory": "0Gi"}, "is not an amount of memory, as 900Gi"),
        ({"memory": "64Gi", "shared_memory": "64Gi"}, "shared_memory 64Gi counts as memory"),
        ({"scratch": "-1Gi"}, "scratch: '-1Gi' is not an amount"),
        ({"rdma": {"rdma/hca": "0"}}, "rdma.rdma/hca: '0' is not a number"),
        ({"rdma": {"hca": "8"}}, "rdma.hca.[key]: 'hca' is not the name of a resource"),
        ({"env": {"AWS_SECRET_ACCESS_KEY": "hunter2"}}, "looks like a secret"),
        ({"env": {"wandb_api_key": "hunter2"}}, "looks like a secret"),
        ({"env": {"MASTER_ADDR": "10.0.0.1"}}, "is set by the launcher"),
        ({"env": {"PET_NNODES": "4"}}, "is set by the launcher"),
        ({"env": {"ODONATA_JOB": "other"}}, "is set by the launcher"),
        ({"env": {"NCCL-DEBUG": "INFO"}}, "is no name of a variable"),
        ({"env": {"NCCL_DEBUG": 1}}, "env.NCCL_DEBUG: Input should be a valid string"),
        ({"node_selector": {"a b": "c"}}, "node_selector.a b.[key]: 'a b' is not the key of a label"),
        ({"node_selector": {"spot": "very much so"}}, "node_selector.spot: 'very much so' is not the value of a label"),
        ({"tolerations": [{"key": "spot", "operator": "Equal"}]}, "Equal needs a key and a value"),
        ({"tolerations": [{"key": "spot", "value": "true"}]}, "Exists has no value"),
        ({"tolerations": [{"key": "spot", "effect": "NoRun"}]}, "tolerations.0.effect: Input should be"),
        ({"topology": {"required": True}}, "topology.key: required and not given"),
        ({"priority_class": "Very High"}, "priority_class: 'Very High' is not a name"),
        ({"queue": {"kind": "slurm", "name": "q"}}, "queue: Input tag 'slurm' found"),
        ({"queue": {"kind": "kueue"}}, "queue.name: required and not given"),
        ({"queue": {"kind": "volcano", "name": "q", "priority_class": "p"}}, "queue.priority_class: unknown key"),
        ({"service_account": "theirs", "service_account_annotations": {"a": "b"}}, "exists, so its annotations are not ours"),
        ({"secrets": "odonata-s3"}, "secrets: takes a list, found 'odonata-s3'; write it in brackets"),
        ({"s3_endpoint_url": "s3.example.com"}, "s3_endpoint_url: 's3.example.com' is not a URL"),
        ({"claims": [{"claim": "data", "path": "data"}]}, "claims.0.path: 'data' is not a folder"),
        ({"claims": [{"claim": "data", "path": "/scratch/data"}]}, "claims mount /scratch/data over /scratch"),
        ({"claims": [{"claim": "data", "path": "/etc"}]}, "claims mount /etc over /etc"),
        ({"claims": [{"claim": "a", "path": "/data"}, {"claim": "b", "path": "/data/b"}]}, "claims mount /data/b over /data"),
        ({"user_id": 0}, "user_id: Input should be greater than or equal to 1"),
        ({"grace_s": 5}, "grace_s: Input should be greater than or equal to 20"),
        ({"failures": -1}, "failures: Input should be greater than or equal to 0"),
        ({"restart_in_place": True, "flavour": "pytorchjob"}, "restart_in_place goes with Jobs"),
        ({"monitoring": {"namespace": "kube_monitoring"}}, "monitoring.namespace: 'kube_monitoring' is not a name"),
        ({"node_selectors": {}}, "node_selectors: unknown key; did you mean node_selector?"),
        ({"zzzzz": 1}, "zzzzz: unknown key; there are schema_version, flavour,"),
        ({"gpus": 8}, "gpus: unknown key; did you mean gpus_per_node?"),
        ({"topology": {"key": "rack", "zzzzz": True}}, "topology.zzzzz: unknown key; there are key, required, exclusive"),
        ({"queue": {"kind": "kueue", "nam": "q"}}, "queue.nam: unknown key; did you mean name?"),
        ({"claims": [{"claim": "data", "path": "/data", "write": True}]}, "claims.0.write: unknown key; did you mean writable?"),
        ({"memory": "900GB"}, "is not an amount of memory, as 900Gi"),
    ],
)
def test_a_wrong_cluster_config_is_refused_with_a_sentence(wrong: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | wrong))
    with pytest.raises(ConfigError) as refused:
        load_cluster_config(path)
    assert sentence in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("- a\n", "a cluster config is a mapping"), ("a: [\n", "is not YAML")],
)
def test_a_file_that_is_no_mapping_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_cluster_config(tmp_path / "cluster.yaml")


def test_a_file_that_is_not_there_is_looked_for_nearby() -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*one_node\.yaml"):
        load_cluster_config(CLUSTERS / "one_nodes.yaml")


@pytest.mark.parametrize(
    "image", ["odonata:1.0", "registry.example.com:5000/a/b:1", f"odonata@sha256:{'0' * 64}", f"o:1@sha256:{'a' * 64}"]
)
def test_an_image_that_does_not_move_is_taken(image: str) -> None:
    assert ClusterConfig.model_validate(MINIMAL | {"image": image}).image == image


def test_a_cpu_cluster_has_one_rank_a_node_unless_told_otherwise() -> None:
    assert ClusterConfig.model_validate(MINIMAL | {"gpus_per_node": 0, "nodes": 3}).world_size == 3
    assert ClusterConfig.model_validate(MINIMAL | {"gpus_per_node": 0, "nodes": 3, "processes_per_node": 2}).world_size == 6


def test_a_cpu_cluster_computes_in_float32_and_a_gpu_cluster_in_bf16_unless_told_otherwise() -> None:
    assert ClusterConfig.model_validate(MINIMAL | {"gpus_per_node": 0}).mixed_precision == "no"
    assert ClusterConfig.model_validate(MINIMAL | {"gpus_per_node": 8}).mixed_precision == "bf16"
    assert ClusterConfig.model_validate(MINIMAL | {"gpus_per_node": 0, "precision": "bf16"}).mixed_precision == "bf16"
