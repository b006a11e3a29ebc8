"""A real Prometheus server over one scrape target, for tests."""

import json
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

from tests.runs import free_port

needs_prometheus = pytest.mark.skipif(
    not shutil.which("prometheus"), reason="no prometheus on PATH; launch/system.sh installs it"
)
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool on PATH; launch/system.sh installs it")

CONFIG = """\
global: {{scrape_interval: {every}, scrape_timeout: {every}, evaluation_interval: {every}}}
rule_files: {rules}
scrape_configs:
  - job_name: odonata
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
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

    def is_ready(self) -> bool:
        """Whether it answers at all."""
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=1):
                return True
        except OSError:
            return False


@contextmanager
def scraping(port: int, folder: Path, rules: Sequence[Path] = (), *, every: str = "200ms") -> Iterator[Prometheus]:
    """A server of its own that scrapes `port` of this machine, five times a second by default, and has done so; it evaluates `rules`."""
    config, listen = folder / "prometheus.yml", free_port()
    config.write_text(CONFIG.format(port=port, every=every, rules=json.dumps([str(path.absolute()) for path in rules])))
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


def wait_until(holds: Callable[[], bool], what: str, *, timeout_s: float = 30) -> None:
    """Return once `holds` is true."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s} s: {what}")
