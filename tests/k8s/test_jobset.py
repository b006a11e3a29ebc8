"""JobSets: whole restarts, one's own block, and the same answers to exit codes."""

from k8s.jobset import build_jobset
from tests.k8s.workloads import workload_of


def test_failures_that_count_restart_the_whole_and_wrong_configs_end_it() -> None:
    spec = build_jobset(workload_of(flavour="jobset", nodes=4, failures=7))["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 7
    assert spec["failurePolicy"]["rules"] == [
        {"name": "do-not-retry", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0, "the first pod failure that counts is the JobSet's"
    assert [rule["action"] for rule in job["podFailurePolicy"]["rules"]] == ["FailJob", "Ignore", "Ignore"]


def test_nodes_meet_at_the_name_that_jobset_gives_the_first_pod() -> None:
    spec = build_jobset(workload_of(flavour="jobset", nodes=4, name="mine"))["spec"]
    assert spec["network"]["subdomain"] == "mine"
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert "--main-address=mine-node-0-0.mine" in job["template"]["spec"]["containers"][0]["args"]


def test_an_exclusive_block_is_jobset_s_annotation_and_no_affinity_against_others() -> None:
    jobset = build_jobset(workload_of(flavour="jobset", nodes=4, topology={"key": "example.com/block", "exclusive": True}))
    assert jobset["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"] == "example.com/block"
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "podAntiAffinity" not in pod["affinity"]
