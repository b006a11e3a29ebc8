"""Jobs: what becomes of each exit code."""

from typing import Any

import pytest

from k8s.job import build_job
from tests.k8s.workloads import workload_of
from trainer import errors

Policy = dict[str, Any]


def answer(policy: Policy, code: int, *, disrupted: bool = False) -> str:
    """What the Job controller does with a failed pod, by the rules of its documentation: the first that matches, else Count."""
    for rule in policy["rules"]:
        conditions = [pattern["type"] for pattern in rule["onPodConditions"]] if "onPodConditions" in rule else []
        codes = rule.get("onExitCodes", {}).get("values", [])
        if code in codes or (disrupted and "DisruptionTarget" in conditions):
            return str(rule["action"])
    return "Count"


@pytest.mark.parametrize(
    ("error", "action"),
    [
        (errors.ConfigError, "FailJob"),
        (errors.DataError, "FailJob"),
        (errors.CheckpointError, "FailJob"),
        (errors.DivergedError, "FailJob"),
        (errors.RefusedError, "FailJob"),
        (errors.PreemptedError, "Ignore"),
        (errors.PeerLostError, "Ignore"),
        (errors.RetryError, "Ignore"),
        (errors.OdonataError, "Count"),
    ],
)
def test_each_of_our_errors_has_its_answer(error: type[errors.OdonataError], action: str) -> None:
    assert answer(build_job(workload_of(nodes=2))["spec"]["podFailurePolicy"], error.exit_code) == action


def test_a_disrupted_pod_does_not_count_whatever_it_ended_with_unless_the_config_is_wrong() -> None:
    policy = build_job(workload_of())["spec"]["podFailurePolicy"]
    assert answer(policy, 137, disrupted=True) == answer(policy, 1, disrupted=True) == "Ignore"
    assert answer(policy, 137) == "Count"
    assert answer(policy, 2, disrupted=True) == "FailJob"


def test_one_node_is_a_plain_job_that_meets_nobody() -> None:
    spec = build_job(workload_of())["spec"]
    assert "completionMode" not in spec
    assert (spec["completions"], spec["backoffLimit"], spec["ttlSecondsAfterFinished"]) == (1, 3, 604800)
    arguments = spec["template"]["spec"]["containers"][0]["args"]
    assert not any(argument.startswith(("--node-rank", "--main-address")) for argument in arguments)


def test_several_nodes_meet_at_the_first_under_the_name_that_the_service_gives_it() -> None:
    spec = build_job(workload_of(nodes=4, name="mine"))["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == "mine"
    assert {"--node-rank=$(JOB_COMPLETION_INDEX)", "--main-address=mine-0.mine"} <= set(pod["containers"][0]["args"])


def test_kueue_reads_its_queue_and_priority_at_the_job_and_its_topology_at_the_pods() -> None:
    queue = {"kind": "kueue", "name": "research", "priority_class": "low"}
    job = build_job(workload_of(nodes=2, queue=queue, topology={"key": "example.com/block", "required": True}))
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "low"
    template = job["spec"]["template"]
    assert template["metadata"]["annotations"] == {"kueue.x-k8s.io/podset-required-topology": "example.com/block"}
    assert "affinity" not in template["spec"], "Kueue chooses the block"
