"""Whole runs as a monitor sees them: every metric is there, probes answer, and a rank that is stopped is noticed, named and survived."""

import json
import re
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from monitoring.metrics import METRICS
from tests.monitoring.prometheus import needs_prometheus, quicken, scraping, wait_until
from tests.runs import Runner, free_port, kill_tree, ranks_of
from trainer.observe.history import read_goodput
from trainer.store.open import open_store

EVERYTHING_SOON = ("checkpoint.every_steps=4", "observe.evaluate_every_steps=4", "observe.metrics_host=127.0.0.1")


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        return str(answer.read().decode())


def families(page: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(page)}


@pytest.fixture(scope="module")
def page(runner: Runner) -> Iterator[str]:
    """What one running process says after some steps, checkpoints and evaluations."""
    port = free_port()
    process = runner.start("scraped", "steps=100000", f"observe.metrics_port={port}", *EVERYTHING_SOON)
    try:
        runner.wait_for_step("scraped", 12, process)
        wait_until(lambda: "odonata_checkpoint_bytes{" in get(port, "/metrics"), "a checkpoint is committed")
        assert get(port, "/readyz") == get(port, "/healthz") == "ok\n"
        yield get(port, "/metrics")
    finally:
        kill_tree(process.pid)
        process.communicate()


def test_a_run_exports_every_metric_of_the_list_and_no_other(page: str) -> None:
    assert families(page).keys() == {metric.name.removesuffix("_total") for metric in METRICS}
    unset = {name for name, family in families(page).items() if not family.samples}
    assert unset == {"odonata_valid_pairs"}, "CroCo alone has no pairs with LiDAR"


def test_phases_fit_into_the_step(page: str) -> None:
    phases = {sample.labels["phase"]: sample.value for sample in families(page)["odonata_step_phase_seconds"].samples}
    assert phases.keys() == {"data_wait", "host_to_device", "forward", "backward", "collective_wait", "optimiser"}
    [step_s] = [each.value for each in families(page)["odonata_step_seconds"].samples if each.name.endswith("_sum")]
    assert 0.8 * step_s < sum(phases.values()) <= step_s


def test_utilisation_and_goodput_are_shares(page: str) -> None:
    for name in ("odonata_mfu_ratio", "odonata_hfu_ratio", "odonata_goodput_ratio"):
        [sample] = families(page)[name].samples
        assert 0 < sample.value < 1, name


def test_the_data_is_counted(page: str) -> None:
    read = {name: families(page)[f"odonata_data_{name}"].samples[0].value for name in ("files", "read_bytes", "decode_seconds")}
    assert read["files"] > 0
    assert read["read_bytes"] / read["files"] > 100
    assert 0 < read["decode_seconds"] < families(page)["odonata_data_load_seconds"].samples[0].value


@needs_prometheus
@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_a_stopped_rank_is_noticed_named_dumped_raises_the_alert_and_the_run_resumes(
    runner: Runner, processes: int, tmp_path: Path
) -> None:
    name, port = f"stopped-{processes}", free_port()
    patience = ("observe.hang_least_s=3", "observe.hang_grace_s=30", "data.timeout_s=2", "parallel.timeout_s=120")
    served = (f"observe.metrics_port={port}", "observe.metrics_host=127.0.0.1", "checkpoint.every_steps=8")
    process = runner.start(name, "steps=100000", *served, *patience, engine="fsdp2", processes=processes)
    folder = runner.folder / name
    try:
        runner.wait_for_step(name, 9, process)
        wait_until(lambda: any(folder.glob("checkpoints/*/manifest.json")), "step 8 is saved", timeout_s=60)
        on_page = {sample.labels["rank"] for sample in families(get(port, "/metrics/pod"))["odonata_loss"].samples}
        assert on_page == {str(rank) for rank in range(processes)}
        victim = next(rank for rank in ranks_of(process.pid) if rank.environ()["RANK"] == "1")
        with scraping(port, tmp_path, quicken(tmp_path, factor=60)) as prometheus:
            assert prometheus.firing() == set()
            victim.send_signal(signal.SIGSTOP)
            wait_until(lambda: bool(incidents(folder)), "a watchdog gives up", timeout_s=60)
            victim.kill()  # the launcher would take half a minute for it
            stopped = runner.finish(name, process, timeout_s=60)
            wait_until(lambda: ("OdonataTrainingStalled", name) in prometheus.firing(), "the alert fires", timeout_s=60)
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
    assert "frozen: rank 1 (stopped, or its node is gone)" in stopped.output
    assert "exitcode  : 75" in stopped.output
    blames = [incident.read_text().splitlines()[1] for incident in incidents(folder)]
    assert all(blame.startswith(("frozen: rank 1 (", "nobody can be named")) for blame in blames), "no rank that lives is blamed"
    text = incidents(folder)[0].read_text()
    assert "frozen: rank 1 (" in text
    assert re.search(r'loop\.py", line \d+ in queue_step', text), "the stack of the training thread"
    recorded = json.loads(next(folder.glob("incidents/hang-*-collectives.json")).read_text())
    assert recorded["entries"][-1]["profiling_name"].startswith("gloo:"), "the collective that did not end is the last one"
    last = len(stopped.steps)

    resumed = runner.run(name, f"steps={last + 2}", "checkpoint.every_steps=8", engine="fsdp2", processes=processes)
    assert [step["step"] for step in resumed.steps] == list(range(1, last + 3))
    goodput = read_goodput(open_store(folder))
    assert goodput.starts == 2
    saved = int(re.search(r"resuming .* after step (\d+)", resumed.output)[1])  # type: ignore[index]
    assert saved % 8 == 0 and 8 <= saved <= last  # perhaps not the last multiple of 8: who is stopped has not committed that
    assert goodput.lost_steps == last - saved
    assert goodput.seconds["down"] > 3


def incidents(folder: Path) -> list[Path]:
    return sorted(folder.glob("incidents/hang-*.txt"))
