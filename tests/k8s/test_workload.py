"""A run on a cluster: what the cluster changes in the run, what of the two does not fit together, and what the hash says."""

from typing import Any

import pytest
import yaml

from tests.k8s.workloads import workload_of
from trainer.config.load import parse_run_config
from trainer.errors import ConfigError

DATAROOT = ("data.kind=nuscenes", "data.root=/data/nuscenes")


@pytest.mark.parametrize(
    ("overrides", "changes", "sentence"),
    [
        (("global_batch=100",), {}, r"global_batch is 100, which 8 processes do not divide; set global_batch to a multiple of 8"),
        (("parallel.world_size=16",), {}, "parallel.world_size asks for 16 processes, and 1 nodes of 8 make 8"),
        (("parallel.precision=fp32",), {}, "parallel.precision is fp32 and the cluster's precision is bf16"),
        ((), {"engine": "hsdp"}, "there are 1 nodes of 8 ranks; take engine fsdp2"),
        (("observe.metrics_port=null",), {}, "observe.metrics_port is None"),
        (("observe.metrics_port=0",), {}, "observe.metrics_port is 0"),
        (("observe.metrics_port=80",), {}, "may not take those below 1024"),
        (("run.uri=runs/base",), {}, "would lie on a pod's own disk and end with it"),
        (
            ("run.uri=/data/run",),
            {"claims": [{"claim": "data", "path": "/data"}]},
            "claim data, which pods only read; set its writable: true",
        ),
        (DATAROOT, {}, r"data.root /data/nuscenes is not in the pods.*\(there are: none\)"),
        (
            DATAROOT,
            {"claims": [{"claim": "data", "path": "/dat"}]},
            r"data.root /data/nuscenes is not in the pods.*\(there are: /dat\)",
        ),
        (("data.datasets=[{uri: packed}]",), {}, "data.datasets.0.uri packed is not in the pods"),
        (("warm_start.uri=runs/base",), {}, "warm_start.uri runs/base is not in the pods"),
        (("data.cache.folder=/var/cache",), {}, "data.cache.folder is /var/cache, and pods write to /scratch alone"),
        (("data.index_folder=/index",), {}, "data.index_folder is /index, and pods write to /scratch alone"),
        (("data.cache.size_gb=2000",), {}, "data.cache.size_gb is 2000, and scratch has 1Ti"),
        (("run.uri=s3://bucket/runs/-base",), {}, "give one with --name"),
        (("run.uri=s3://bucket/runs/2nd",), {}, "a name begins with a letter"),
        ((f"run.uri=s3://bucket/runs/{'long' * 11}",), {}, "at most 40"),
    ],
)
def test_a_run_that_does_not_fit_the_cluster_is_refused(
    overrides: tuple[str, ...], changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        workload_of(*overrides, **changes)


@pytest.mark.parametrize("name", ["", "Base", "base_1", "base.1", "-base", "base-", "1base", "bäse", "b" * 41])
def test_a_name_that_kubernetes_would_refuse_is_refused_first(name: str) -> None:
    with pytest.raises(ConfigError, match="give one with --name"):
        workload_of(name=name)


def test_a_run_is_named_after_its_place_unless_it_is_given_a_name() -> None:
    assert workload_of().name == "all-video-base"
    assert workload_of(name="mine").name == "mine"


def test_data_on_a_claim_and_a_run_on_a_writable_one_are_taken() -> None:
    claims = [{"claim": "data", "path": "/data"}, {"claim": "runs", "path": "/runs", "writable": True}]
    assert workload_of(*DATAROOT, "run.uri=/runs/base", claims=claims).name == "base"


def test_the_resolved_run_reads_back_and_says_what_the_cluster_decides() -> None:
    workload = workload_of(nodes=2, grace_s=90, s3_endpoint_url="http://s3.storage.svc:9000")
    run = parse_run_config(yaml.safe_load(workload.files["run.yaml"]), origin="run.yaml")
    assert run == workload.run
    assert run.parallel.world_size == 16
    assert run.checkpoint.grace_s == 90
    assert run.store.endpoint_url == run.data.store.endpoint_url == "http://s3.storage.svc:9000"  # type: ignore[union-attr]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"])
def test_accelerate_starts_all_ranks_of_all_nodes(engine: str) -> None:
    workload = workload_of(nodes=4, engine=engine)
    accelerate = yaml.safe_load(workload.files["accelerate.yaml"])
    assert (accelerate["num_machines"], accelerate["num_processes"], accelerate["mixed_precision"]) == (4, 32, "bf16")
    mesh = accelerate.get("parallelism_config", {}).values()
    assert list(mesh) == ([4, 8] if engine == "hsdp" else [])
    file = accelerate.get("deepspeed_config", {}).get("deepspeed_config_file")
    assert file == ("/etc/odonata/deepspeed.json" if engine.startswith("zero") else None)
    assert ("deepspeed.json" in workload.files) == engine.startswith("zero")


def test_the_hash_names_what_is_trained_and_how_and_nothing_else() -> None:
    known = workload_of().hash
    assert workload_of(image="registry.example.com/odonata:2.0", memory="1Ti").hash == known
    assert workload_of("optim.lr=1e-3").hash != known
    assert workload_of(engine="ddp").hash != known
    assert workload_of().config_name == f"all-video-base-{known}"


def test_ports_of_stores_and_proxies_are_let_through() -> None:
    workload = workload_of("store.proxy_url=http://proxy:3128", s3_endpoint_url="http://s3.storage.svc:9000")
    assert workload.store_ports == [443, 3128, 9000]
    assert workload_of(s3_endpoint_url="http://s3.storage.svc").store_ports == [80, 443]
