"""Workloads for tests: one run config with its data in S3, on clusters that differ in what a test asks about."""

from typing import Any

from k8s.cluster import ClusterConfig
from k8s.pod import Meeting, build_pod_template
from k8s.workload import Manifest, Workload, build_workload
from tests.runs import ROOT
from trainer.config.load import load_run_config
from trainer.config.run import RunConfig

RUN = ROOT / "launch" / "runs" / "all_video_base_s3.yaml"
CLUSTERS = ROOT / "k8s" / "clusters"
MINIMAL: dict[str, Any] = {
    "schema_version": 1,
    "namespace": "perception",
    "image": "registry.example.com/odonata:1.0",
    "scratch": "1Ti",
}


def cluster_of(**changes: Any) -> ClusterConfig:
    return ClusterConfig.model_validate(MINIMAL | changes)


def run_of(*overrides: str) -> RunConfig:
    return load_run_config(RUN, overrides)


def workload_of(*overrides: str, name: str | None = None, **changes: Any) -> Workload:
    return build_workload(run_of(*overrides), cluster_of(**changes), name=name)


def pod_of(workload: Workload) -> Manifest:
    """Spec of the pod, which all flavours share."""
    spec: Manifest = build_pod_template(workload, Meeting("0", "base-0.base"))["spec"]
    return spec


def container_of(workload: Workload) -> Manifest:
    container: Manifest = pod_of(workload)["containers"][0]
    return container
