"""Probes of a real run: what is due is probed once, what is gone is passed over, and what cannot work is said before anything begins."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.monitoring.test_exporter import fetch
from tests.runs import ROOT, Runner
from tests.s3_server import S3Server, upload
from tests.trainer.checkpoint.toy import save_now
from trainer.checkpoint.boxes import boxes_of
from trainer.checkpoint.catalog import find_saves
from trainer.checkpoint.manager import CheckpointManager, find_one, read_tensors
from trainer.config.training import CheckpointConfig
from trainer.errors import ConfigError, DataError, DivergedError, OdonataError
from trainer.evaluation import probing
from trainer.evaluation.probing import Probes, copy_weights, find_due, follow_run, planned_probes, serve
from trainer.observe.probes import read_probes
from trainer.parallel.launch import Launch, read_launch
from trainer.store.base import Store
from trainer.store.open import open_store

SMALL = ("global_batch=2", "objectives.0.points=64")


@pytest.fixture(scope="module")
def trained(runner: Runner) -> Path:
    """Twenty steps with checkpoints of steps 10 and 20."""
    return runner.once("alone").folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """The same run, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "base", copy_function=os.link))


@pytest.fixture
def plan(city: Path) -> Iterator[Callable[..., Probes]]:
    """Plans probes that live as long as the test."""
    with ExitStack() as stack:

        def enter(run: Path | str, tasks: Sequence[str] = ("depth",), **changes: Any) -> Probes:
            data = [f"root={city}", "kind=synthetic", "workers=0", "cameras=[CAM_FRONT]"]
            settings: dict[str, Any] = {"every_steps": 10, "clips": 4, "steps": 4, "data": data, "overrides": SMALL}
            return stack.enter_context(planned_probes(str(run), list(tasks), **(settings | changes)))

        yield enter


@pytest.fixture
def alone() -> Launch:
    from trainer.config.training import ParallelConfig

    return read_launch({}, ParallelConfig())


@pytest.fixture
def probed(trained: Path, tmp_path_factory: pytest.TempPathFactory, plan: Callable[..., Probes], alone: Launch) -> Path:
    """A copy of the run with probes of both its checkpoints, made once."""
    folder = trained.with_name("probed")
    if not folder.exists():
        shutil.copytree(trained, folder, copy_function=os.link)
        follow_run(plan(folder), alone, once=True)
    return folder


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.name: json.loads(path.read_text()) for path in sorted((folder / "probes").rglob("*.json"))}


def test_each_checkpoint_that_is_due_has_a_record_of_its_encoder(probed: Path) -> None:
    found = records(probed)
    assert list(found) == ["step-00000010.json", "step-00000020.json"]
    for step, record in zip((10, 20), found.values(), strict=True):
        assert (record["task"], record["step"], record["clips"], record["head_steps"]) == ("depth", step, 4, 4)
        assert record["figures"].keys() == record["trivial_figures"].keys() == {"delta1", "abs_rel", "rmse_m"}
        assert record["checkpoint"].startswith(f"checkpoints/step-{step:08d}-")
    one, other = found.values()
    assert one["figures"] != other["figures"]  # other encoders
    assert one["trivial_figures"] == other["trivial_figures"]  # the same clips


def test_a_second_start_probes_nothing_and_shows_what_the_first_has_found(
    probed: Path,
    plan: Callable[..., Probes],
    alone: Launch,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    probes = plan(probed)
    assert find_due(probes) == []
    monkeypatch.setattr(probing, "start", lambda *_, **__: pytest.fail("a head was trained again"))
    with caplog.at_level("INFO"):
        follow_run(probes, alone)  # ends of itself: the last step is committed
    assert "no checkpoint of" in caplog.text and "is left to probe, of multiples of" in caplog.text
    page = fetch(probes.exporter.serve("127.0.0.1", 0))
    newest = read_probes(open_store(probed))["depth"][-1]
    assert 'odonata_probe_step{run="probed",task="depth"} 20.0' in page
    for name, value in newest.figures.items():
        assert f'odonata_probe_score{{metric="{name}",run="probed",task="depth"}} {value}' in page
    assert 'odonata_probe_failures_total{run="probed",task="depth"} 0.0' in page
    assert 'odonata_probe_seconds{run="probed",task="depth"}' in page


def test_the_same_checkpoint_comes_to_the_same_figures(
    probed: Path, plan: Callable[..., Probes], alone: Launch, tmp_path: Path
) -> None:
    again = Path(shutil.copytree(probed, tmp_path / "again", copy_function=os.link))
    before = records(again)["step-00000010.json"]
    (again / "probes" / "depth" / "step-00000010.json").unlink()
    follow_run(plan(again), alone, once=True)
    assert records(again)["step-00000010.json"]["figures"] == before["figures"]


def test_a_run_in_s3_is_probed_as_the_same_one_in_a_folder(
    trained: Path, probed: Path, plan: Callable[..., Probes], alone: Launch, s3_server: S3Server, s3_owner: None
) -> None:
    store = open_store(f"s3://{s3_server.bucket}/probed", s3_server.config())
    upload(trained, store)
    follow_run(plan(store.uri, store=s3_server.config()), alone, once=True)
    in_s3, in_folder = (read_probes(of)["depth"] for of in (store, open_store(probed)))
    assert [(probe.step, probe.figures) for probe in in_s3] == [(probe.step, probe.figures) for probe in in_folder]


def test_what_is_copied_is_the_decoder_and_the_average_of_the_encoder_as_export_takes_them(
    run: Path, plan: Callable[..., Probes]
) -> None:
    probes = plan(run)
    newest = find_saves(probes.store)[0][0]
    assert copy_weights(probes, newest) is None
    copied = open_store(probes.weights)
    tensors, trained = (read_tensors(store, find_one(store)) for store in (copied, probes.store))
    assert {name.split(".")[1] for name in tensors} == {"encoder", "objectives"}
    averages = {name: trained[name.replace("model.encoder.", "ema.encoder.")] for name in tensors}
    assert all(torch.equal(tensor, averages[name]) for name, tensor in tensors.items())


def test_what_is_copied_of_a_run_without_averages_are_its_weights(
    trained: Path, tmp_path: Path, plan: Callable[..., Probes]
) -> None:
    store = open_store(tmp_path / "plain")
    store.put("config.yaml", (trained / "config.yaml").read_bytes())
    save_now(CheckpointManager(store, CheckpointConfig()), 10, {"model.encoder.weight": boxes_of(torch.ones(2))})
    probes = plan(tmp_path / "plain")
    assert copy_weights(probes, find_saves(probes.store)[0][0]) is None
    copied = open_store(probes.weights)
    assert torch.equal(read_tensors(copied, find_one(copied))["model.encoder.weight"], torch.ones(2))


class Sweeping:
    """A store in which retention removes a checkpoint as soon as its tensors are read."""

    def __init__(self, store: Store) -> None:
        self.uri = store.uri
        self._store = store

    def read_into(self, key: str, offset: int, places: Sequence[memoryview]) -> None:
        self._sweep(key)
        self._store.read_into(key, offset, places)

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        self._sweep(key)
        return self._store.get(key, offset, length)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def _sweep(self, key: str) -> None:
        if re.search(r"step-00000010-.*\.bin", key):
            self._store.delete(key.rpartition("/")[0])


def test_a_checkpoint_that_is_swept_while_it_is_read_is_passed_over(
    run: Path, plan: Callable[..., Probes], monkeypatch: pytest.MonkeyPatch, alone: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    probes = plan(run)
    probes = replace(probes, store=Sweeping(probes.store))
    seen: list[int] = []
    monkeypatch.setattr(probing, "probe_task", lambda probes, save, task, launch: seen.append(save.step) or give_up(probes, save))
    with caplog.at_level(logging.WARNING):
        follow_run(probes, alone, once=True)
    assert seen == [20]
    assert "no probe of depth at step 10" in caplog.text and "was removed while it was read" in caplog.text
    assert 'odonata_probe_failures_total{run="base",task="depth"} 1.0' in fetch(probes.exporter.serve("127.0.0.1", 0))


def give_up(probes: Probes, save: Any) -> None:
    """In place of a head: what was seen is not seen again."""
    probes.given_up.add((save.prefix, "depth"))


def test_a_damaged_checkpoint_and_a_head_that_diverges_are_passed_over(
    run: Path, plan: Callable[..., Probes], monkeypatch: pytest.MonkeyPatch, alone: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    (binary,) = run.glob("checkpoints/step-00000010-*/rank-00000.bin")
    content = bytearray(binary.read_bytes())
    content[:] = bytes(len(content))
    binary.unlink()  # the other copies share it
    binary.write_bytes(content)

    def diverge(*_: object, **__: object) -> None:
        raise DivergedError("the head has come to nothing")

    monkeypatch.setattr(probing, "start", diverge)
    probes = plan(run)
    with caplog.at_level(logging.WARNING):
        follow_run(probes, alone, once=True)
    assert "no probe of depth at step 10: " in caplog.text and "checksum" in caplog.text
    assert "no probe of depth at step 20: the head has come to nothing" in caplog.text
    assert not (run / "probes").exists()


def test_due_are_multiples_and_the_last_step_the_oldest_first(run: Path, plan: Callable[..., Probes]) -> None:
    assert [save.step for save, _ in find_due(plan(run))] == [10, 20]
    assert [save.step for save, _ in find_due(plan(run, every_steps=15))] == [20]
    assert [tasks for _, tasks in find_due(plan(run, ("depth", "pose"), every_steps=20, overrides=()))] == [["depth", "pose"]]


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"steps": 5}, ConfigError, r"steps 4 -> 5; give the values of before, or move that folder away"),
        ({"clips": 5}, ConfigError, r"scored on 5 clips and those in .* were on 4; give --clips 4"),
        ({"overrides": ("global_batch=2", "objectives.0.points=32")}, ConfigError, r"points 64 -> 32"),
    ],
)
def test_a_curve_has_one_protocol(
    probed: Path, plan: Callable[..., Probes], changes: dict[str, Any], error: type[OdonataError], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        plan(probed, **changes)


def test_what_cannot_be_probed_is_said_at_once(run: Path, plan: Callable[..., Probes], tmp_path: Path, alone: Launch) -> None:
    with pytest.raises(OdonataError, match=r"there is no config\.yaml"):
        plan(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"probes follow a run, and .* is one checkpoint"):
        plan(next((run / "checkpoints").iterdir()))
    with pytest.raises(ConfigError, match="probes of dept were asked for; --task knows depth, pose"):
        plan(run, ("depth", "dept"))
    with pytest.raises(ConfigError, match="did you mean root"):
        plan(run, data=["rooot=city"])
    with pytest.raises(DataError, match=r"is not a folder|no such|nuScenes dataroot"):
        plan(run, data=[f"root={tmp_path / 'nowhere'}"])
    with pytest.raises(ConfigError, match=r"one process and 2 were started"):
        follow_run(plan(run), replace(alone, world_size=2))


def test_a_pair_task_without_its_truth_is_refused(run: Path, plan: Callable[..., Probes], city: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(city, tmp_path / "bare", copy_function=os.link, ignore=shutil.ignore_patterns("ground_truth")))
    with pytest.raises(DataError, match="ground_truth"):
        plan(run, ("flow",), data=[f"root={bare}", "kind=synthetic", "workers=0"], overrides=())


def test_a_port_that_cannot_be_had_stops_no_probe(
    run: Path, plan: Callable[..., Probes], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        serve(plan(run), "192.0.2.1", 0)  # an address that no machine has (RFC 5737)
    assert "probes go on without /metrics" in caplog.text


def test_a_run_that_trains_is_followed_and_sigterm_asks_for_a_retry(run: Path, probed: Path, city: Path, tmp_path: Path) -> None:
    shutil.copytree(probed / "probes", run / "probes")
    (run / "probes" / "depth" / "step-00000020.json").unlink()
    for last in run.glob("checkpoints/step-00000020-*"):
        shutil.rmtree(last)
    data = [f"root={city}", "kind=synthetic", "workers=0", "cameras=[CAM_FRONT]"]
    command = [sys.executable, "-m", "odonata", "probe", run, "--task", "depth", "--every", 10, "--steps", 4, "--clips", 4]
    command += [*(part for key in data for part in ("--data", key)), "--metrics-port", 0, *SMALL]
    started = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    said = ""
    assert started.stderr
    deadline = time.monotonic() + 120
    while "waiting for checkpoints" not in said:
        line = started.stderr.readline()
        assert line and time.monotonic() < deadline, said
        said += line
    port = re.search(r"metrics of probes: http://0\.0\.0\.0:(\d+)/metrics", said)
    assert port and 'odonata_probe_step{run="base",task="depth"} 10.0' in fetch(int(port[1]))
    started.send_signal(signal.SIGTERM)
    _, rest = started.communicate(timeout=60)
    assert started.returncode == 75, said + rest
    assert "stopped by SIGTERM" in rest
