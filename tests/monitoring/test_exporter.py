"""The exporter over real HTTP: what is served, on which port, and that it neither holds a process nor a port."""

import logging
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from monitoring import serving
from monitoring.exporter import Exporter
from monitoring.metrics import METRICS
from tests.monitoring.prometheus import needs_prometheus, needs_promtool, scraping, wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    exporter = Exporter({"rank": "3"})
    yield exporter
    exporter.close()


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def set_everything(exporter: Exporter) -> None:
    """Give every metric of the list a value that no other has."""
    tell: dict[str, Callable[..., None]] = {
        "gauge": exporter.set,
        "info": exporter.set,
        "counter": exporter.increase,
        "histogram": exporter.observe,
    }
    for place, metric in enumerate(METRICS, start=1):
        tell[metric.kind](metric.name, place, **{label: f"some {label}" for label in metric.labels})


def fetch(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def samples(page: str) -> dict[str, Sample]:
    """The last sample of each name."""
    return {sample.name: sample for family in text_string_to_metric_families(page) for sample in family.samples}


def test_every_metric_of_the_list_is_served_with_its_value_and_rank(exporter: Exporter) -> None:
    set_everything(exporter)
    served = samples(fetch(exporter.serve("127.0.0.1", 0)))
    for place, metric in enumerate(METRICS, start=1):
        sample = served[metric.name + ("_sum" if metric.kind == "histogram" else "")]
        assert sample.value == place
        assert sample.labels == {"rank": "3"} | {label: f"some {label}" for label in metric.labels}


def test_nothing_is_served_that_is_not_in_the_list(exporter: Exporter) -> None:
    set_everything(exporter)
    listed = {metric.name + ending for metric in METRICS for ending in ("", "_bucket", "_sum", "_count")}
    assert samples(fetch(exporter.serve("127.0.0.1", 0))).keys() <= listed


def test_what_was_never_set_is_not_served_and_counters_begin_at_zero(exporter: Exporter) -> None:
    served = samples(fetch(exporter.serve("127.0.0.1", 0)))
    assert "odonata_loss" not in served
    assert "odonata_last_step_timestamp_seconds" not in served
    assert served["odonata_clips_total"].value == 0
    assert served["odonata_step_seconds_count"].value == 0


def test_a_metric_that_is_not_in_the_list_cannot_be_set(exporter: Exporter) -> None:
    with pytest.raises(KeyError, match="odonata_typo"):
        exporter.set("odonata_typo", 1)


def test_two_exporters_in_one_process_do_not_meet(exporter: Exporter) -> None:
    other = Exporter({"rank": "4"})
    exporter.increase("odonata_clips_total", 8)
    try:
        assert samples(fetch(other.serve("127.0.0.1", 0)))["odonata_clips_total"].value == 0
    finally:
        other.close()


def test_a_taken_port_moves_on_to_the_next_free_one_and_says_so(
    exporter: Exporter, taken_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        port = exporter.serve("127.0.0.1", taken_port)
    assert taken_port < port <= taken_port + serving.PORTS_TRIED
    assert caplog.messages == [f"metrics port {taken_port} is taken; /metrics is on port {port}"]
    assert "odonata_clips_total" in samples(fetch(port))


def test_a_free_port_is_taken_as_asked_and_without_a_word(exporter: Exporter, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        free = int(listener.getsockname()[1])
    assert exporter.serve("127.0.0.1", free) == free
    assert not caplog.messages


def test_no_free_port_is_a_sentence(exporter: Exporter, taken_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "PORTS_TRIED", 0)
    with pytest.raises(OSError, match=r"are all taken; set observe\.metrics_port"):
        exporter.serve("127.0.0.1", taken_port)


def test_an_address_that_is_not_ours_is_an_error(exporter: Exporter) -> None:
    with pytest.raises(OSError, match="assign requested address"):
        exporter.serve("203.0.113.1", 0)


def test_a_closed_exporter_gives_its_port_back(exporter: Exporter) -> None:
    port = exporter.serve("127.0.0.1", 0)
    exporter.close()
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))


def run_script(script: str) -> subprocess.Popen[str]:
    opening = "import os, sys, time\nfrom monitoring.exporter import Exporter\nexporter = Exporter({'rank': '0'})\n"
    return subprocess.Popen([sys.executable, "-c", opening + script], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_process_ends_though_it_serves() -> None:
    with run_script("exporter.serve('127.0.0.1', 0)\n") as process:
        assert process.wait(timeout=30) == 0


def test_a_loader_worker_that_outlives_a_killed_rank_does_not_hold_its_port() -> None:
    script = (
        "port = exporter.serve('127.0.0.1', 0)\n"
        "if os.fork() == 0:\n"
        "    sys.stdin.close(); os.write(1, f'{port} {os.getpid()}\\n'.encode()); time.sleep(60)\n"
        "time.sleep(60)\n"
    )
    with run_script(script) as process:
        assert process.stdout
        port, child = (int(word) for word in process.stdout.readline().split())
        process.kill()
        process.wait()
        try:
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", port))
        finally:
            subprocess.run(["kill", "-9", str(child)], check=True)


@needs_promtool
def test_promtool_finds_nothing_to_say(exporter: Exporter) -> None:
    set_everything(exporter)
    page = fetch(exporter.serve("127.0.0.1", 0))
    checked = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@needs_prometheus
def test_a_real_prometheus_scrapes_every_metric(exporter: Exporter, tmp_path: Path) -> None:
    set_everything(exporter)
    with scraping(exporter.serve("127.0.0.1", 0), tmp_path) as prometheus:
        for place, metric in enumerate(METRICS, start=1):
            [sample] = prometheus.query(metric.name + ("_sum" if metric.kind == "histogram" else ""))
            assert float(sample["value"][1]) == place, metric.name
            assert sample["metric"]["rank"] == "3"


@needs_prometheus
def test_a_real_prometheus_answers_what_people_ask(exporter: Exporter, tmp_path: Path) -> None:
    with scraping(exporter.serve("127.0.0.1", 0), tmp_path) as prometheus:
        for _ in range(20):
            exporter.observe("odonata_step_seconds", 0.4)
            exporter.increase("odonata_data_wait_seconds_total", 0.1)
            exporter.set("odonata_last_step_timestamp_seconds", time.time())
            time.sleep(0.05)
        waiting = "rate(odonata_data_wait_seconds_total[1m]) / rate(odonata_step_seconds_sum[1m])"
        wait_until(lambda: bool(prometheus.query("odonata_step_seconds_count == 20")), "all steps are scraped")
        assert float(prometheus.query(waiting)[0]["value"][1]) == pytest.approx(0.25, rel=1e-6)
        median = "histogram_quantile(0.5, rate(odonata_step_seconds_bucket[1m]))"
        assert 0.3 < float(prometheus.query(median)[0]["value"][1]) <= 0.5  # the bucket that 0.4 falls into
        assert float(prometheus.query("time() - odonata_last_step_timestamp_seconds")[0]["value"][1]) < 30
