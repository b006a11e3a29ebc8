"""Rules for a cluster: the same as those that promtool tests, in the operator's words; and the scrape config for those without operator."""

import copy
import subprocess
from pathlib import Path

import pytest
import yaml

from k8s import labels
from k8s.pod import build_pod_template
from k8s.render import dump_manifest
from k8s.rules import PLACE, build_prometheus_rule
from tests.k8s.validators import find_problems
from tests.k8s.workloads import workload_of
from tests.monitoring.expressions import RULES
from tests.monitoring.prometheus import needs_promtool
from tests.runs import ROOT

SCRAPE_CONFIG = ROOT / "k8s" / "monitoring" / "scrape_config.yaml"


def test_the_committed_rule_has_the_groups_of_the_rule_files() -> None:
    committed = yaml.safe_load(PLACE.read_text())
    groups = [group for path in sorted(RULES.glob("*.yaml")) for group in yaml.safe_load(path.read_text())["groups"]]
    assert committed["spec"]["groups"] == groups
    assert PLACE.read_text() == dump_manifest(build_prometheus_rule()), "run python -m k8s.rules"


def test_the_operator_takes_the_rule() -> None:
    assert find_problems(build_prometheus_rule()) == []


@pytest.mark.parametrize(("key", "value"), [("expr", None), ("for", "ten minutes"), ("severity", "critical")])
def test_a_rule_with_a_mistake_is_found(key: str, value: str | None) -> None:
    rule = copy.deepcopy(build_prometheus_rule())
    alert = rule["spec"]["groups"][0]["rules"][0]
    if value is None:
        del alert[key]
    else:
        alert[key] = value
    assert find_problems(rule)


def test_kustomize_applies_the_rule_and_nothing_else() -> None:
    kustomization = yaml.safe_load((PLACE.parent / "kustomization.yaml").read_text())
    assert kustomization["resources"] == [PLACE.name]


@needs_promtool
def test_promtool_takes_the_scrape_config_but_for_discovery_which_debian_s_leaves_out(tmp_path: Path) -> None:
    content = yaml.safe_load(SCRAPE_CONFIG.read_text())
    discovered = content["scrape_configs"][0].pop("kubernetes_sd_configs")
    assert [each["role"] for each in discovered] == ["pod"]
    copied = tmp_path / "prometheus.yml"
    copied.write_text(yaml.safe_dump(content))
    checked = subprocess.run(["promtool", "check", "config", str(copied)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_scrape_config_finds_what_pods_say_of_themselves() -> None:
    template = build_pod_template(workload_of(gpus_per_node=4, monitoring={"pod_monitor": False}), None)
    annotations = template["metadata"]["annotations"]
    assert annotations == {"prometheus.io/scrape": "true", "prometheus.io/port": "9400", "prometheus.io/path": "/metrics/pod"}
    [job] = yaml.safe_load(SCRAPE_CONFIG.read_text())["scrape_configs"]
    [selector] = job["kubernetes_sd_configs"][0]["selectors"]
    name, value = selector["label"].split("=")
    assert template["metadata"]["labels"][name] == value
    by_name = next(
        each for each in job["relabel_configs"] if "__meta_kubernetes_pod_container_port_name" in each["source_labels"]
    )
    ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
    assert by_name["regex"] == labels.METRICS_PORT
    assert ports[labels.METRICS_PORT] == 9400


def test_pods_with_a_monitor_are_not_scraped_twice() -> None:
    assert "annotations" not in build_pod_template(workload_of(), None)["metadata"]
