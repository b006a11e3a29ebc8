"""Submitting: what is refused before anything is made, what an old server may leave out, and what a resume renders again."""

import json
from pathlib import Path

import pytest

from k8s.client import Cluster, connect
from k8s.runs import KnownRun, find_run
from k8s.stop import stop
from k8s.submit import _render_again, find_left_out, resume, submit
from k8s.surroundings import build_config_map
from k8s.workload import Workload
from tests.k8s.control_plane import ControlPlane
from tests.k8s.kubelet import Kubelet
from tests.k8s.workloads import workload_of
from trainer.checkpoint.claim import claim_run
from trainer.config.store import StoreConfig
from trainer.errors import ConfigError, RefusedError
from trainer.store.base import BucketMissingError
from trainer.store.local import LocalStore

NOWHERE = StoreConfig(endpoint_url="http://127.0.0.1:9")


@pytest.fixture(scope="module")
def cluster(control_plane: ControlPlane, kubelet: Kubelet) -> Cluster:
    del kubelet  # and with it what deletes what a deleted Job owns
    return connect(context=None, namespace="perception", config_file=control_plane.kubeconfig)


def named(name: str, *overrides: str, **changes: object) -> Workload:
    """One that no node here is large enough for."""
    return workload_of(f"run.uri=s3://bucket/runs/{name}", *overrides, monitoring={"pod_monitor": False}, **changes)


def start(cluster: Cluster, workload: Workload) -> list[str]:
    return submit(cluster, workload, store=NOWHERE, lenient=True)


def test_what_a_server_has_not_kept_is_found_and_what_it_adds_or_writes_in_another_way_is_not() -> None:
    sent = {"a": 1, "b": {"c": [{"d": 1}, {"e": 2}], "none": {}, "read_only": False}, "cpu": "0.5"}
    assert list(find_left_out(sent, {"a": 1, "b": {"c": sent["b"]["c"]}, "cpu": "500m", "status": {}})) == []
    assert list(find_left_out(sent, {"b": {"c": [{"d": 1}]}, "cpu": "1"})) == ["a", "b.c[1]"]
    assert list(find_left_out(sent, {"a": 1, "b": {"c": [{}, {"e": 2}]}, "cpu": "1"})) == ["b.c[0].d"]
    assert list(find_left_out({"a": {"b": 1}}, {"a": None})) == ["a.b"]


def test_a_server_that_would_leave_parts_out_is_told_from_one_that_keeps_all(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match=r"leave out of it: .*podFailurePolicy.*go without with --lenient"):
        submit(cluster, named("strict"), store=NOWHERE)
    assert cluster.list("ConfigMap", {"odonata/run": "strict"}) == [], "nothing was made"
    with pytest.raises(ConfigError, match=r"leave out of it: Job spec\.completionMode.*too old for several nodes"):
        start(cluster, named("several", nodes=4))


def test_a_flavour_that_the_cluster_does_not_have_is_said_so(cluster: Cluster) -> None:
    for flavour, comes_with in {
        "jobset": "JobSet",
        "trainjob": "Kubeflow Trainer v2",
        "pytorchjob": "Training Operator v1",
    }.items():
        with pytest.raises(ConfigError, match=f"{comes_with}: have that installed"):
            start(cluster, named("strange", flavour=flavour))


def test_a_monitor_is_dispensable_and_a_pod_group_is_not(cluster: Cluster) -> None:
    workload = workload_of("run.uri=s3://bucket/runs/watched")
    assert "PodMonitor" in start(cluster, workload)
    stop(cluster, workload.name, forget=True)
    with pytest.raises(ConfigError, match="comes with Volcano"):
        start(cluster, named("gang", queue={"kind": "volcano", "name": "q"}))


def test_a_run_has_one_workload_whatever_its_name(cluster: Cluster) -> None:
    start(cluster, named("single"))
    with pytest.raises(RefusedError, match=r"single was to be submitted and is waiting.*odonata stop single"):
        start(cluster, named("single"))
    with pytest.raises(RefusedError, match=r"s3://bucket/runs/single was to be written to by other, and run single \(waiting\)"):
        start(cluster, workload_of("run.uri=s3://bucket/runs/single", name="other", monitoring={"pod_monitor": False}))
    with pytest.raises(RefusedError, match="single was to be resumed and is waiting"):
        resume(cluster, "single", nodes=None, overrides=[], store=NOWHERE)
    stop(cluster, "single")
    with pytest.raises(ConfigError, match="is that of the stopped run s3://bucket/runs/single"):
        start(cluster, workload_of("run.uri=s3://bucket/runs/double", name="single", monitoring={"pod_monitor": False}))
    stop(cluster, "single", forget=True)


def test_a_job_that_is_not_ours_keeps_its_name(cluster: Cluster, control_plane: ControlPlane) -> None:
    control_plane.must("create", "job", "theirs", "-n", "perception", "--image=busybox")
    with pytest.raises(ConfigError, match=r'jobs\.batch "theirs" already exists; give another name with --name'):
        start(cluster, named("theirs"))
    control_plane.must("delete", "job", "theirs", "-n", "perception")


def test_a_run_that_another_job_writes_to_is_refused_and_its_own_claim_is_not(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload, store = named("claimed"), LocalStore(tmp_path)
    monkeypatch.setattr("k8s.submit.open_store", lambda uri, config: store)
    writer = claim_run(store, job="research/theirs", expiry_s=60.0, find_committed=list)
    with pytest.raises(RefusedError, match="job research/theirs"):
        start(cluster, workload)
    writer.release()
    writer = claim_run(store, job="perception/claimed", expiry_s=60.0, find_committed=list)
    start(cluster, workload)
    writer.release()
    stop(cluster, "claimed", forget=True)


def test_a_resume_renders_the_run_again_with_other_settings(cluster: Cluster) -> None:
    start(cluster, named("again", "steps=200001"))
    before = find_run(cluster, "again")
    assert before.config == named("again", "steps=200001").run
    assert before.cluster == named("again").cluster
    stop(cluster, "again")
    workload, left_out = resume(cluster, "again", nodes=1, overrides=["steps=200002"], store=NOWHERE, lenient=True)
    assert workload.run.steps == 200002 and "Job spec.podFailurePolicy" in left_out
    (config_map,) = cluster.list("ConfigMap", {"odonata/run": "again"})
    assert config_map["metadata"]["name"] == workload.config_name, "that of the first config is gone"
    stop(cluster, "again", forget=True)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("run.uri=s3://bucket/runs/other", "was to be resumed at s3://bucket/runs/other and lives at s3://bucket/runs/kept"),
        ("encoder.size=small", "is another experiment: encoder.size base -> small"),
    ],
)
def test_a_resume_that_would_not_go_on_with_the_run_is_refused_and_changes_nothing(
    cluster: Cluster, override: str, sentence: str
) -> None:
    start(cluster, named("kept"))
    stop(cluster, "kept")
    with pytest.raises(ConfigError, match=sentence):
        resume(cluster, "kept", nodes=None, overrides=[override], store=NOWHERE, lenient=True)
    assert find_run(cluster, "kept").config == named("kept").run
    stop(cluster, "kept", forget=True)


def test_a_run_in_a_bucket_that_is_not_there_is_refused(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_no_bucket(*_: object, **__: object) -> None:
        raise BucketMissingError("NoSuchBucket; create the bucket")

    monkeypatch.setattr("k8s.submit.refuse_if_held", find_no_bucket)
    with pytest.raises(ConfigError, match="create the bucket"):
        start(cluster, named("lost"))
    assert cluster.list("ConfigMap", {"odonata/run": "lost"}) == []


def test_a_resume_on_more_nodes_has_more_ranks_and_is_checked_like_a_new_run(cluster: Cluster) -> None:
    start(cluster, named("grown"))
    stop(cluster, "grown")
    with pytest.raises(ConfigError, match="too old for several nodes"):  # of this server's version; the run is rendered for them
        resume(cluster, "grown", nodes=2, overrides=[], store=NOWHERE, lenient=True)
    with pytest.raises(ConfigError, match="24 processes"):
        resume(cluster, "grown", nodes=3, overrides=["global_batch=128"], store=NOWHERE)
    with pytest.raises(ConfigError, match=r"cannot be resumed on 0 nodes:\n  nodes: Input should be greater"):
        resume(cluster, "grown", nodes=0, overrides=[], store=NOWHERE)
    stop(cluster, "grown", forget=True)
    with pytest.raises(ConfigError, match="run grown was asked for and namespace perception does not know it"):
        resume(cluster, "grown", nodes=None, overrides=[], store=NOWHERE)


def test_hsdp_goes_on_with_fsdp2_where_one_node_is_left_and_stays_itself_where_several_are() -> None:
    run = KnownRun("halved", build_config_map(named("halved", engine="hsdp", nodes=4)), None)
    engines = {nodes: _render_again(run, nodes=nodes, overrides=[]).cluster.engine for nodes in (1, 2, None)}
    assert engines == {1: "fsdp2", 2: "hsdp", None: "hsdp"}


def test_a_run_that_has_ended_is_not_submitted_again_but_resumed(cluster: Cluster, control_plane: ControlPlane) -> None:
    start(cluster, named("ended"))
    failed = {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded", "message": "too often"}
    job = json.loads(control_plane.must("get", "job", "ended", "-n", "perception", "-o", "json"))
    job["status"] = {"conditions": [failed]}
    control_plane.must(
        "replace", "--raw", "/apis/batch/v1/namespaces/perception/jobs/ended/status", "-f", "-", content=json.dumps(job)
    )
    with pytest.raises(ConfigError, match="ended was to be submitted and is failed; go on with it: odonata resume ended"):
        start(cluster, named("ended"))
    resume(cluster, "ended", nodes=None, overrides=[], store=NOWHERE, lenient=True)
    assert find_run(cluster, "ended").phase in ("waiting", "starting")
    stop(cluster, "ended", forget=True)
