"""What an API server says, and what does not answer, as errors that say what to do."""

import json
from pathlib import Path

import pytest

from k8s.client import KINDS, Cluster, KindMissingError, NameTakenError, connect
from tests.k8s.control_plane import ControlPlane
from tests.runs import free_port
from trainer.errors import ConfigError, RetryError

CONFIG_MAP = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "one", "namespace": "perception"}, "data": {"a": "b"}}


@pytest.fixture(scope="module")
def cluster(control_plane: ControlPlane) -> Cluster:
    return connect(context=None, namespace=None, config_file=control_plane.kubeconfig)


def test_the_namespace_is_that_of_the_context_unless_one_is_named(control_plane: ControlPlane) -> None:
    assert connect(context="test", namespace=None, config_file=control_plane.kubeconfig).namespace == "perception"
    assert connect(context=None, namespace="other", config_file=control_plane.kubeconfig).namespace == "other"


@pytest.mark.parametrize("content", [None, "", "a: b", "[", "- a"])
def test_a_kubeconfig_that_names_no_cluster_is_said_so(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "config"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match="name a file in KUBECONFIG"):
        connect(context=None, namespace=None, config_file=file)


def test_a_context_that_is_not_there_is_said_so(control_plane: ControlPlane) -> None:
    with pytest.raises(ConfigError, match=r"kubectl config get-contexts lists them"):
        connect(context="elsewhere", namespace=None, config_file=control_plane.kubeconfig)


def test_a_cluster_that_does_not_answer_may_answer_later(control_plane: ControlPlane, tmp_path: Path) -> None:
    config = json.loads(control_plane.kubeconfig.read_text())
    config["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{free_port()}"
    (tmp_path / "config").write_text(json.dumps(config))
    with pytest.raises(RetryError, match=r"does not answer.*Connection refused"):
        connect(context=None, namespace=None, config_file=tmp_path / "config").list("Pod", {})


def test_a_stranger_is_told_to_log_in(control_plane: ControlPlane) -> None:
    stranger = connect(context=None, namespace=None, config_file=control_plane.write_kubeconfig("stranger", "no token"))
    with pytest.raises(ConfigError, match="Unauthorized; it does not know you: log in again"):
        stranger.list("Pod", {})


def test_an_object_is_made_once_found_by_its_labels_changed_and_deleted(cluster: Cluster) -> None:
    labelled = {**CONFIG_MAP, "metadata": {**CONFIG_MAP["metadata"], "labels": {"odonata/run": "one"}}}  # type: ignore[dict-item]
    assert cluster.create(labelled, dry_run=True)["data"] == {"a": "b"}
    assert cluster.get("ConfigMap", "one") is None, "a dry run makes nothing"
    cluster.create(labelled, dry_run=False)
    with pytest.raises(NameTakenError, match='configmaps "one" already exists; give another name'):
        cluster.create(labelled, dry_run=False)
    cluster.apply({**labelled, "data": {"a": "c"}}, dry_run=False)
    assert [each["data"] for each in cluster.list("ConfigMap", {"odonata/run": "one"})] == [{"a": "c"}]
    for _ in range(2):  # deleting what is gone is no error
        cluster.delete("ConfigMap", "one")
    assert cluster.get("ConfigMap", "one") is None


def test_a_namespace_that_is_not_there_is_told_from_a_kind_that_is_not_known(
    control_plane: ControlPlane, cluster: Cluster
) -> None:
    nowhere = connect(context=None, namespace="nowhere", config_file=control_plane.kubeconfig)
    with pytest.raises(ConfigError, match="make namespace nowhere first"):
        nowhere.create({**CONFIG_MAP, "metadata": {"name": "one"}}, dry_run=True)
    for kind, comes_with in {
        "JobSet": "JobSet",
        "TrainJob": "Kubeflow Trainer v2",
        "PodMonitor": "the Prometheus operator",
    }.items():
        manifest = {"apiVersion": KINDS[kind].api_version, "kind": kind, "metadata": {"name": "one"}}
        with pytest.raises(KindMissingError, match=f"comes with {comes_with}: have that installed"):
            cluster.create(manifest, dry_run=True)
        assert cluster.list(kind, {}) == []
        assert cluster.get(kind, "one") is None


def test_what_the_server_finds_wrong_is_in_its_own_words(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match=r"a lowercase RFC 1123 subdomain.*change the run config or the cluster config"):
        cluster.create({**CONFIG_MAP, "metadata": {"name": "One"}}, dry_run=True)


def test_a_quota_may_have_room_later(control_plane: ControlPlane, cluster: Cluster) -> None:
    control_plane.must("create", "namespace", "full")
    control_plane.must("create", "quota", "few", "-n", "full", "--hard=configmaps=0")
    full = connect(context=None, namespace="full", config_file=control_plane.kubeconfig)
    quota = json.loads(control_plane.must("get", "quota", "few", "-n", "full", "-o", "json"))
    quota["status"] = {"hard": {"configmaps": "0"}, "used": {"configmaps": "0"}}  # as the controller of quotas does
    place = "/api/v1/namespaces/full/resourcequotas/few/status"
    control_plane.must("replace", "--raw", place, "-f", "-", content=json.dumps(quota))
    with pytest.raises(RetryError, match=r"exceeded quota: few.*wait until other runs end"):
        full.create({**CONFIG_MAP, "metadata": {"name": "one"}}, dry_run=True)
