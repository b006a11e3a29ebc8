"""A real Prometheus server over targets of this machine, for tests."""

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.runs import free_port

needs_prometheus = pytest.mark.skipif(
    not shutil.which("prometheus"), reason="no prometheus on PATH; launch/system.sh installs it"
)
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool on PATH; launch/system.sh installs it")

RULES = Path(__file__).parents[2] / "monitoring" / "rules"
_AGE = re.compile(r"(time\(\) -[^>]*> )(\d+)")
_DURATION = re.compile(r"(\[|offset |^)(\d+)([smh])\b")
_MILLISECONDS = {"s": 1e3, "m": 60e3, "h": 3600e3}

CONFIG = """\
global: {{scrape_interval: {every}, scrape_timeout: {every}, evaluation_interval: {every}}}
rule_files: {rules}
scrape_configs:
  - job_name: odonata
    metrics_path: {path}
    static_configs: [{{targets: {targets}}}]
"""


class Prometheus:
    """Asks a running server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples that `expression` has now: their labels under `metric`, time and text under `value`."""
        address = f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        with urllib.request.urlopen(address, timeout=5) as answer:
            return list(json.load(answer)["data"]["result"])

    def rule_health(self) -> dict[str, str]:
        """Whether each rule could be evaluated, by name."""
        with urllib.request.urlopen(f"{self.url}/api/v1/rules", timeout=5) as answer:
            groups = json.load(answer)["data"]["groups"]
        return {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}

    def firing(self) -> set[tuple[str, str]]:
        """Alerts that fire now, each with the run that it is about."""
        with urllib.request.urlopen(f"{self.url}/api/v1/alerts", timeout=5) as answer:
            alerts = json.load(answer)["data"]["alerts"]
        return {(alert["labels"]["alertname"], alert["labels"]["run"]) for alert in alerts if alert["state"] == "firing"}

    def is_ready(self) -> bool:
        """Whether it answers at all."""
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=1):
                return True
        except OSError:
            return False


@contextmanager
def scraping(
    ports: int | Sequence[int], folder: Path, rules: Sequence[Path] = (), *, every: str = "200ms", path: str = "/metrics"
) -> Iterator[Prometheus]:
    """A server of its own that scrapes `ports` of this machine, five times a second by default, and has done so; it evaluates `rules`."""
    config, listen = folder / "prometheus.yml", free_port()
    targets = json.dumps([f"127.0.0.1:{port}" for port in ([ports] if isinstance(ports, int) else ports)])
    read = json.dumps([str(each.absolute()) for each in rules])
    config.write_text(CONFIG.format(targets=targets, path=path, every=every, rules=read))
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{listen}"], stdout=log, stderr=log, cwd=folder)
    try:
        server = Prometheus(f"http://127.0.0.1:{listen}")
        wait_until(server.is_ready, "Prometheus is ready")
        wait_until(lambda: bool(server.query("up == 1")), "the exporter is scraped")
        yield server
    finally:
        process.kill()
        process.wait()


def quicken(folder: Path, factor: float) -> list[Path]:
    """Copies in `folder` of the project's rules for which time runs `factor` times as fast, and which are evaluated five times a second.

    Durations in `for` and in queries shrink, and so do the seconds that `time() - ...` is compared with; nothing else is changed.
    """
    copies = []
    for path in sorted(RULES.glob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        for group in content["groups"]:
            group["interval"] = "200ms"
            for rule in group["rules"]:
                ages = _AGE.sub(lambda hit: f"{hit[1]}{float(hit[2]) / factor}", rule["expr"])
                rule["expr"] = _DURATION.sub(lambda hit: hit[1] + _shrink(hit, factor), ages)
                if "for" in rule:
                    rule["for"] = _DURATION.sub(lambda hit: _shrink(hit, factor), rule["for"])
        copies.append(folder / path.name)
        copies[-1].write_text(yaml.safe_dump(content))
    return copies


def _shrink(duration: re.Match[str], factor: float) -> str:
    return f"{round(int(duration[2]) * _MILLISECONDS[duration[3]] / factor)}ms"


def wait_until(holds: Callable[[], bool], what: str, *, timeout_s: float = 30) -> None:
    """Return once `holds` is true."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s} s: {what}")
