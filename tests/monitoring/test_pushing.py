"""A run's last word: what lasts reaches a real Pushgateway under names of its own, and a gateway that is gone stops nothing."""

import logging
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from monitoring.exporter import Exporter
from monitoring.metrics import METRICS, SUMMARY
from tests.monitoring.expressions import known_names, names_in, rule_expressions
from tests.monitoring.prometheus import wait_until
from tests.runs import free_port
from tests.trainer.observe_fakes import Saved, report
from trainer.observe.metrics import Metrics
from trainer.observe.observers import Observers


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a running Pushgateway."""
    if not shutil.which("prometheus-pushgateway"):
        pytest.skip("no prometheus-pushgateway on PATH; launch/system.sh installs it")
    url = f"http://127.0.0.1:{free_port()}"
    log = tmp_path_factory.mktemp("gateway") / "log"
    command = ["prometheus-pushgateway", f"--web.listen-address={url.removeprefix('http://')}"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=log.parent)
    try:
        wait_until(lambda: answers(url), "the Pushgateway is ready")
        yield url
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=1):
            return True
    except OSError:
        return False


def left_with(gateway: str) -> dict[tuple[str, str], float]:
    """Value by metric and run."""
    with urllib.request.urlopen(f"{gateway}/metrics", timeout=5) as page:
        families = text_string_to_metric_families(page.read().decode())
        samples = [sample for family in families for sample in family.samples if sample.name.startswith("odonata_")]
    return {(sample.name, sample.labels["run"]): sample.value for sample in samples}


def ended_run(run: str, gateway: str, *, steps: int) -> None:
    exporter = Exporter({"run": run, "rank": "0"})
    metrics = Metrics(exporter, resumed_at=0, pushgateway=gateway)
    for step in range(1, steps + 1):
        metrics.step(report(step, loss=1 / step))
    metrics.checkpoint(Saved(step=steps))
    metrics.close()
    metrics.close()


def test_the_summary_of_each_run_is_left_and_a_later_start_replaces_it(gateway: str) -> None:
    ended_run("first", gateway, steps=2)
    ended_run("second", gateway, steps=1)
    ended_run("first", gateway, steps=4)
    left = left_with(gateway)
    assert left["odonata_final_step", "first"] == 4
    assert left["odonata_final_loss", "first"] == 0.25
    assert left["odonata_final_last_checkpoint_step", "first"] == 4
    assert left["odonata_final_step", "second"] == 1
    assert {name for name, _ in left} <= {metric.name for metric in SUMMARY.values()}


def test_what_is_left_can_raise_no_alert_of_a_run_that_is_gone() -> None:
    final = {metric.name for metric in SUMMARY.values()}
    assert final.isdisjoint({metric.name for metric in METRICS})
    assert final.isdisjoint(known_names())
    assert all(final.isdisjoint(names_in(expression)) for expression in rule_expressions())


def test_a_gateway_that_is_gone_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    exporter = Exporter({"run": "first", "rank": "0"})
    observers = Observers(None, [Metrics(exporter, resumed_at=0, pushgateway=f"http://127.0.0.1:{free_port()}")])
    observers.step(report(1))
    with caplog.at_level(logging.ERROR):
        observers.close()
    assert "training goes on without it" in caplog.text
