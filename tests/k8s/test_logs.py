"""Logs: the node that failed first comes first."""

from typing import Any

import pytest

from k8s.logs import describe_exit, order_pods, read_logs
from k8s.runs import KnownRun
from k8s.surroundings import build_config_map
from tests.k8s.workloads import workload_of
from trainer.errors import ConfigError

Manifest = dict[str, Any]


def pod(node: int, code: int | None = None, finished: str = "") -> Manifest:
    state = {"running": {}} if code is None else {"terminated": {"exitCode": code, "finishedAt": finished}}
    return {
        "metadata": {"name": f"mine-{node}", "labels": {"batch.kubernetes.io/job-completion-index": str(node)}},
        "spec": {"containers": [{"name": "node"}]},
        "status": {"phase": "Running" if code is None else "Failed", "containerStatuses": [{"state": state}]},
    }


class Log:
    """A cluster that has nothing but logs."""

    def read_log(self, pod: str, container: str, *, tail: int | None, follow: bool) -> list[str]:
        return [f"{pod} {container} {tail} {follow}\n"]


def logs_of(*pods: Manifest, **options: Any) -> str:
    run = KnownRun("mine", build_config_map(workload_of()), None, pods)
    return "".join(read_logs(Log(), run, **{"node": None, "follow": False, "tail": None} | options))  # type: ignore[arg-type]


def test_the_gravest_failure_comes_first_and_of_equals_the_first() -> None:
    pods = [
        pod(0),
        pod(1, 75, "09"),
        pod(2, 1, "12"),
        pod(3, 1, "11"),
        pod(4, 2, "13"),
        pod(5, 3, "10"),
        pod(6, 0),
        pod(7, 143, "08"),
    ]
    names = [each["metadata"]["name"] for each in order_pods(pods)]
    assert names == [f"mine-{node}" for node in (4, 5, 3, 2, 7, 1, 0, 6)]


def test_each_log_stands_under_a_line_that_says_which() -> None:
    text = logs_of(pod(0, 75), pod(1, 2), tail=5)
    assert text.splitlines() == [
        "== node 1, pod mine-1: ended with 2 (config, data or checkpoint wrong, or the loss diverged: no use trying again)",
        "mine-1 node 5 False",
        "== node 0, pod mine-0: ended with 75 (asks for another try)",
        "mine-0 node 5 False",
    ]


def test_one_node_is_chosen_and_one_is_followed() -> None:
    assert "mine-0" not in logs_of(pod(0), pod(1), node=1)
    assert "mine-1" not in logs_of(pod(0), pod(1), follow=True)


def test_a_pod_that_has_not_begun_has_no_log() -> None:
    pending = pod(0)
    pending["status"] = {"phase": "Pending"}
    assert logs_of(pending) == "== node 0, pod mine-0: pending\n"


def test_a_node_that_has_no_pod_is_said_so() -> None:
    with pytest.raises(ConfigError, match=r"of node 7 .* there are nodes: 0, 1\."):
        logs_of(pod(0), pod(1), node=7)
    with pytest.raises(ConfigError, match=r"there are nodes: none\. Logs go with their pods"):
        logs_of()


def test_a_code_that_nobody_gave_is_a_defect() -> None:
    assert describe_exit(1) == "ended with 1 (a defect)"
    assert describe_exit(137) == "ended with 137 (killed, perhaps for want of memory)"
