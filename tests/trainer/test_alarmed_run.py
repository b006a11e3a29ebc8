"""Whole runs in trouble, each until the alert that is meant for it fires in a real Prometheus, with the project's rules at a quicker clock.

The story of a rank that is stopped is in `test_watched_run`.
"""

from pathlib import Path

import pytest
import yaml

from tests.faulty_proxy import Fault, faulty_proxy
from tests.monitoring.prometheus import needs_prometheus, quicken, scraping, wait_until
from tests.runs import SMALL_RUN, Runner, free_port, kill_tree
from tests.s3_server import S3Server

ENDLESS = 10**9


def served(port: int) -> tuple[str, str]:
    return f"observe.metrics_port={port}", "observe.metrics_host=127.0.0.1"


@needs_prometheus
@pytest.mark.slow
def test_a_rank_that_is_killed_again_and_again_is_a_restart_loop(runner: Runner, tmp_path: Path) -> None:
    name, port = "killed-again", free_port()
    run = ("steps=100000", "checkpoint.every_steps=4", *served(port))
    process = runner.start(name, *run)
    try:
        runner.wait_for_step(name, 5, process)
        with scraping(port, tmp_path, quicken(tmp_path, factor=12)) as prometheus:
            for start in (1, 2, 3):
                wait_until(lambda: bool(prometheus.query(f"odonata_starts == {start}")), "the start is seen", timeout_s=90)  # noqa: B023
                assert ("OdonataRestartLoop", name) not in prometheus.firing()
                kill_tree(process.pid)
                process.communicate()
                process = runner.start(name, *run)
            wait_until(lambda: ("OdonataRestartLoop", name) in prometheus.firing(), "the alert fires", timeout_s=90)
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
        process.communicate()


@needs_prometheus
@pytest.mark.slow
def test_a_slow_store_starves_the_run_and_a_full_one_fails_its_checkpoints(
    packed_s3: str, s3_server: S3Server, tmp_path: Path
) -> None:
    name, port = "slow-store", free_port()
    with faulty_proxy(s3_server.port) as proxy:
        store = {"endpoint_url": proxy.url, "region": "us-east-1", "max_attempts": 2}
        run = yaml.safe_load(SMALL_RUN)
        loose = {key: value for key, value in run["data"].items() if key not in ("kind", "root")}
        data = {
            **loose,
            "kind": "shards",
            "datasets": [{"uri": packed_s3}],
            "index_folder": str(tmp_path / "index"),
            "workers": 1,
        }
        runner = Runner(tmp_path, config=yaml.safe_dump({**run, "store": store, "data": data}))
        saved = f"run.uri=s3://{s3_server.bucket}/{name}"
        process = runner.start(
            name, "steps=100000", "checkpoint.every_steps=8", "checkpoint.max_failed_saves=1000", saved, *served(port)
        )
        try:
            wait_until(lambda: any("/checkpoints/" in target for _, target in proxy.answered), "a checkpoint", timeout_s=120)
            with scraping(port, tmp_path, quicken(tmp_path, factor=30)) as prometheus:
                assert ("OdonataDataStarvation", name) not in prometheus.firing()
                proxy.faults.append(Fault("slow", "GET", times=ENDLESS, target="/shards/", seconds=0.05))
                wait_until(lambda: ("OdonataDataStarvation", name) in prometheus.firing(), "data starves", timeout_s=120)
                assert ("OdonataStoreFailing", name) not in prometheus.firing()
                proxy.faults.append(Fault("full", "PUT", times=ENDLESS, target=f"/{name}/checkpoints/"))
                wait_until(lambda: ("OdonataStoreFailing", name) in prometheus.firing(), "the store fails", timeout_s=90)
        finally:
            if process.poll() is None:
                kill_tree(process.pid)
            process.communicate()
