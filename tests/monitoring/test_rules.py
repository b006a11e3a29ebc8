"""Rules hold under promtool's own tests, each alert with a firing and a silent case, and say where to read on."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.monitoring.expressions import RULES, known_names, names_in, rule_expressions, rules
from tests.monitoring.prometheus import needs_promtool

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).parent / "rules" / "alerts_test.yaml"


def promtool(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, check=False)


@needs_promtool
def test_promtool_takes_the_rules() -> None:
    checked = promtool("check", "rules", *(path.name for path in sorted(RULES.glob("*.yaml"))), folder=RULES)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@needs_promtool
def test_promtool_takes_the_config_of_make_monitoring() -> None:
    checked = promtool("check", "config", "prometheus.yml", folder=RULES.parent)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@needs_promtool
def test_alerts_fire_where_they_must_and_are_silent_where_they_must_not(tmp_path: Path) -> None:
    for path in (*RULES.glob("*.yaml"), CASES):
        shutil.copy(path, tmp_path)
    tested = promtool("test", "rules", CASES.name, folder=tmp_path)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_each_alert_has_a_firing_and_a_silent_case() -> None:
    cases = [case for test in yaml.safe_load(CASES.read_text())["tests"] for case in test["alert_rule_test"]]
    for alert in rules("alert"):
        expected = [bool(case["exp_alerts"]) for case in cases if case["alertname"] == alert["alert"]]
        assert {True, False} == set(expected), alert["alert"]


@pytest.mark.parametrize("alert", rules("alert"), ids=lambda alert: alert["alert"])
def test_an_alert_says_how_bad_it_is_what_it_is_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert "{{ $labels.run }}" in alert["annotations"]["summary"]
    page = ROOT / alert["annotations"]["runbook_url"]
    assert page.stem == alert["alert"]
    text = page.read_text()
    for heading in ("## What it means", "## What to type", "## When it is over"):
        assert heading in text, f"{page} lacks {heading}"
    assert "```" in text.partition("## What to type")[2], f"{page} has no command"


def test_runbooks_are_about_alerts_that_there_are() -> None:
    pages = {path.stem for path in (ROOT / "docs" / "runbooks").glob("*.md")}
    assert pages == {alert["alert"] for alert in rules("alert")}


@pytest.mark.parametrize("expression", rule_expressions())
def test_a_rule_asks_only_for_what_there_is(expression: str) -> None:
    assert names_in(expression)
    assert names_in(expression) <= known_names()
