"""What watching a run costs, and whether everything that is asked of Prometheus can be answered.

    .venv/bin/python -m benchmarks.monitoring [--city DIR] [--run launch/runs/croco_video_base.yaml] [--steps 12]

One process trains while a real Prometheus (it must be on the PATH) scrapes it every five seconds, three times as often as is usual,
with our rules, and so do we. `overhead` is the CPU seconds of metrics, their server and the watchdog over those of the training
process after its start, by the clocks of its threads: wall time on a shared machine cannot show a thousandth. Then every expression
of dashboards, recording rules and alerts is run; one fails if Prometheus refuses it. An answer may be empty: alerts should be.

JSON keys: overhead, steps, scrapes, expressions, expressions_failing, alerts, alerts_tested (with a firing and a silent case in promtool's
tests).
"""

import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import yaml
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.report import Report, build_parser
from benchmarks.training import synthesize_city
from tests.monitoring.expressions import RULES, panel_expressions, rule_expressions, rules
from tests.monitoring.prometheus import Prometheus, scraping, wait_until
from tests.runs import free_port, kill_tree

_PATIENCE_S = 1800
_LOOK_S = 5.0
"""Between two looks of ours, which the process answers like a scrape."""
_CASES = Path("tests/monitoring/rules/alerts_test.yaml")


class Watched(NamedTuple):
    """A training process and the port of its metrics."""

    port: int
    process: subprocess.Popen[bytes]


def main() -> None:
    """See the module."""
    parser = build_parser(__doc__)
    parser.add_argument("--city", type=Path, default=Path("/tmp/odonata-monitoring/city"))
    parser.add_argument("--run", default="launch/runs/croco_video_base.yaml")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("overrides", nargs="*", help="of the run config")
    arguments = parser.parse_args()
    report = Report("monitoring", arguments)
    city = synthesize_city(arguments.city, scenes=4)
    with tempfile.TemporaryDirectory() as folder, training(arguments.run, city, Path(folder), arguments.overrides) as watched:
        wait_until(lambda: read(watched).get("odonata_step", 0) >= 2, "two steps are done", timeout_s=_PATIENCE_S)
        with scraping(watched.port, Path(folder), list(RULES.glob("*.yaml")), every="5s") as prometheus:
            before = read(watched)
            last = before["odonata_step"] + arguments.steps
            wait_until(lambda: read(watched)["odonata_step"] >= last, f"step {last:.0f} is done", timeout_s=_PATIENCE_S)
            after = read(watched)
            scrapes = float(prometheus.query("count_over_time(up[1h])")[0]["value"][1])
            failing = [one for one in panel_expressions() + rule_expressions() if not is_answered(prometheus, one)]
    spent = {name: after[name] - before[name] for name in ("odonata_monitoring_cpu_seconds_total", "odonata_cpu_seconds_total")}
    figures = {
        "overhead": spent["odonata_monitoring_cpu_seconds_total"] / spent["odonata_cpu_seconds_total"],
        "cpu_seconds": spent["odonata_cpu_seconds_total"],
        "steps": arguments.steps,
        "scrapes": scrapes,
        "expressions": len(panel_expressions()) + len(rule_expressions()),
        "expressions_failing": len(failing),
        "alerts": len(rules("alert")),
        "alerts_tested": count_tested(),
    }
    cost = f"{figures['overhead']:.3%} of {figures['cpu_seconds']:.0f} CPU seconds"
    report.say(f"watching costs {cost} over {arguments.steps} steps and {scrapes:.0f} scrapes")
    report.say(
        f"{figures['expressions']} expressions, refused: {failing}; {figures['alerts_tested']} of {figures['alerts']} alerts tested"
    )
    report.finish(figures)


@contextmanager
def training(run: str, city: Path, folder: Path, overrides: list[str]) -> Iterator[Watched]:
    """A training process that is killed in the end."""
    port = free_port()
    places = [f"data.root={city}", f"run.uri={folder}/run", f"observe.metrics_port={port}", "observe.metrics_host=127.0.0.1"]
    command = [sys.executable, "-m", "odonata", "train", run, *places, *overrides]
    process = subprocess.Popen(command, stdout=sys.stderr, env={"OMP_WAIT_POLICY": "passive", **os.environ})
    try:
        yield Watched(port, process)
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
        process.wait()


def read(watched: Watched) -> dict[str, float]:
    """The samples of the process by name, nothing where it does not serve yet; those with further labels are of no interest here."""
    time.sleep(_LOOK_S)
    assert watched.process.poll() is None, "training has ended, see above"
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{watched.port}/metrics", timeout=5) as answer:
            page = answer.read().decode()
    except OSError:
        return {}
    return {sample.name: sample.value for family in text_string_to_metric_families(page) for sample in family.samples}


def is_answered(prometheus: Prometheus, expression: str) -> bool:
    """Whether Prometheus takes it."""
    try:
        prometheus.query(expression)
    except OSError:
        return False
    return True


def count_tested() -> int:
    """Alerts that have a firing and a silent case."""
    cases = [case for test in yaml.safe_load(_CASES.read_text())["tests"] for case in test["alert_rule_test"]]
    by_alert = {case["alertname"]: set() for case in cases}
    for case in cases:
        by_alert[case["alertname"]].add(bool(case["exp_alerts"]))
    return sum(outcomes == {True, False} for outcomes in by_alert.values())


if __name__ == "__main__":
    main()
