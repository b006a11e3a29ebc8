"""The objects around the pods."""

from k8s.render import render
from k8s.surroundings import (
    build_disruption_budget,
    build_network_policy,
    build_pod_monitor,
    build_service,
    build_service_account,
)
from tests.k8s.workloads import workload_of


def test_drains_evict_one_pod_at_a_time_or_wait() -> None:
    assert build_disruption_budget(workload_of(nodes=4))["spec"]["minAvailable"] == 3
    assert build_disruption_budget(workload_of(nodes=4, evictable=False))["spec"]["minAvailable"] == 4
    assert build_disruption_budget(workload_of())["spec"]["minAvailable"] == 0


def test_nobody_but_the_run_itself_and_prometheus_reaches_the_pods() -> None:
    spec = build_network_policy(workload_of(gpus_per_node=2, monitoring={"namespace": "observability"}))["spec"]
    own, prometheus = spec["ingress"]
    assert own["from"] == [{"podSelector": {"matchLabels": {"odonata/run": "all-video-base"}}}]
    assert prometheus["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "observability"}}}]
    assert [each["port"] for each in prometheus["ports"]] == [9400], "local rank 0 answers for the pod"


def test_the_pods_reach_each_other_names_and_stores_and_no_cloud_metadata() -> None:
    own, dns, stores = build_network_policy(workload_of(s3_endpoint_url="http://s3.storage.svc:9000"))["spec"]["egress"]
    assert own == {"to": [{"podSelector": {"matchLabels": {"odonata/run": "all-video-base"}}}]}
    assert {each["port"] for each in dns["ports"]} == {53}
    assert [each["port"] for each in stores["ports"]] == [443, 9000]
    assert stores["to"][0]["ipBlock"]["except"] == ["169.254.0.0/16"]
    assert "fd00:ec2::/32" in stores["to"][1]["ipBlock"]["except"]


def test_pods_find_each_other_before_they_are_ready() -> None:
    spec = build_service(workload_of(nodes=2))["spec"]
    assert (spec["clusterIP"], spec["publishNotReadyAddresses"]) == ("None", True)


def test_the_account_carries_a_cloud_s_role_and_no_token_and_no_role_is_bound_to_it() -> None:
    annotations = {"example.com/role": "reader"}
    account = build_service_account(workload_of(service_account_annotations=annotations))
    assert account["metadata"]["annotations"] == annotations
    assert account["automountServiceAccountToken"] is False
    kinds = {each["kind"] for each in render(workload_of(nodes=2)).values()}
    assert not {kind for kind in kinds if "Role" in kind}


def test_an_account_that_exists_is_used_and_not_made() -> None:
    objects = render(workload_of(service_account="theirs"))
    assert "service_account.yaml" not in objects
    assert objects["job.yaml"]["spec"]["template"]["spec"]["serviceAccountName"] == "theirs"


def test_prometheus_scrapes_one_page_of_a_pod_and_finds_the_monitor_by_its_own_labels() -> None:
    monitor = build_pod_monitor(workload_of(gpus_per_node=4, monitoring={"labels": {"release": "prometheus"}}))
    assert monitor["spec"]["podMetricsEndpoints"] == [{"port": "metrics", "path": "/metrics/pod", "interval": "15s"}]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert "pod_monitor.yaml" not in render(workload_of(monitoring={"pod_monitor": False}))


def test_volcano_is_told_of_the_group_before_its_pods_come() -> None:
    objects = render(workload_of(nodes=4, queue={"kind": "volcano", "name": "research"}, priority_class="high"))
    assert objects["pod_group.yaml"]["spec"] == {"minMember": 4, "queue": "research", "priorityClassName": "high"}
    template = objects["job.yaml"]["spec"]["template"]
    assert template["metadata"]["annotations"] == {"scheduling.k8s.io/group-name": "all-video-base"}
    assert template["spec"]["schedulerName"] == "volcano"
    assert list(objects).index("pod_group.yaml") < list(objects).index("job.yaml")
