"""Whole runs on a real S3 server: killed and resumed, refused while another holds the run, and told what is wrong."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.runs import ROOT, SMALL_RUN, Runner, kill_tree
from tests.s3_server import S3Server
from tests.trainer.checkpoint.toy import Trainer, save_now
from trainer.checkpoint.catalog import find_saves
from trainer.checkpoint.manager import CheckpointManager, find_one, read_tensors
from trainer.config.data import NuscenesData
from trainer.config.training import CheckpointConfig
from trainer.data.build import open_nuscenes_index
from trainer.data.shards.packing import pack
from trainer.data.shards.recording import NuscenesRecording
from trainer.store.base import Store
from trainer.store.open import open_store

SHORT = ("steps=12", "optim.cosine_steps=20", "checkpoint.every_steps=4")


@pytest.fixture
def reach(s3_server: S3Server, s3_owner: None) -> tuple[str, ...]:
    return (f"store.endpoint_url={s3_server.endpoint_url}", "store.region=us-east-1")


def wait_until(holds: Callable[[], bool], *, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def read_lines(store: Store, key: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in store.get(key).splitlines()]


@pytest.fixture
def packed_runner(city: Path, s3_server: S3Server, s3_owner: None, tmp_path: Path) -> Runner:
    """The small run, reading the city from shards in S3."""
    uri = f"s3://{s3_server.bucket}/packed-city"
    pack(NuscenesRecording(open_nuscenes_index(NuscenesData(root=city))), uri, s3_server.config(), workers=1)
    data = {
        "kind": "shards",
        "datasets": [{"uri": uri}],
        "store": {"endpoint_url": s3_server.endpoint_url, "region": "us-east-1"},
    }
    run = yaml.safe_load(SMALL_RUN)
    kept = {name: value for name, value in run["data"].items() if name not in ("kind", "root")}
    return Runner(tmp_path, config=yaml.safe_dump({**run, "data": {**kept, **data, "workers": 1, "reads_in_flight": 3}}))


def test_a_run_all_on_s3_has_one_writer_survives_its_kill_and_equals_an_unbroken_one_on_disk(
    runner: Runner, packed_runner: Runner, s3_server: S3Server, reach: tuple[str, ...]
) -> None:
    unbroken = runner.run("s3-unbroken", *SHORT)
    uri = f"s3://{s3_server.bucket}/killed"
    store = open_store(uri, s3_server.config())
    run = (*SHORT, *reach, f"run.uri={uri}")

    first = packed_runner.start("s3-first", *run, "checkpoint.every_steps=2")
    wait_until(lambda: bool(find_saves(store)[0]))
    first.send_signal(signal.SIGSTOP)  # it holds the run and does not end
    second = packed_runner.finish("s3-second", packed_runner.start("s3-second", *run))
    assert second.returncode == 3, second.output
    assert f"process {first.pid}" in second.output
    kill_tree(first.pid)
    first.communicate()

    resumed = packed_runner.run("s3-resumed", *run)
    assert "resuming" in resumed.output
    steps = read_lines(store, "steps.jsonl")
    assert [(step["step"], step["loss"]) for step in steps] == [(step["step"], step["loss"]) for step in unbroken.steps]
    local = open_store(unbroken.folder)
    expected = read_tensors(local, find_one(local))
    found = read_tensors(store, find_one(store))
    assert all(found[name].equal(expected[name]) for name in expected)
    assert {info.key for info in store.list("pictures")} == {"pictures/step-000012-croco.png"}


def test_a_bucket_that_is_not_there_ends_the_run_before_it_trains(runner: Runner, reach: tuple[str, ...]) -> None:
    finished = runner.finish("s3-nowhere", runner.start("s3-nowhere", *SHORT, *reach, "run.uri=s3://no-such-bucket/run"))
    assert finished.returncode == 2, finished.output
    assert "no-such-bucket" in finished.output
    assert "step 1/" not in finished.output


def test_the_commands_reach_a_store_as_a_run_config_says(s3_server: S3Server, s3_owner: None, tmp_path: Path) -> None:
    local, uri = open_store(tmp_path / "run"), f"s3://{s3_server.bucket}/copied"
    local.put("config.yaml", SMALL_RUN.encode())
    save_now(CheckpointManager(local, CheckpointConfig()), 7, Trainer(0).state())
    reached = ("--store", f"endpoint_url={s3_server.endpoint_url}", "--store", "region=us-east-1")
    for name, arguments in {"copy": (local.uri, uri), "list": (uri,), "verify": (uri,), "show": (uri,)}.items():
        command = [sys.executable, "-m", "odonata", "checkpoints", name, *arguments, *reached]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), name
        assert "checkpoints/step-00000007-0001-" in done.stdout
