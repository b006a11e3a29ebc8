"""Which observers a rank has: rank 0 keeps the record, every rank serves its metrics, a taken port stops nothing."""

import io
import json
import logging
import re
import socket
import urllib.request
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from tests.trainer.observe_fakes import Saved, Seat, report, sheets
from trainer.config.load import parse_run_config
from trainer.config.run import RunConfig
from trainer.errors import ConfigError
from trainer.observe import build
from trainer.observe.build import build_observer
from trainer.store.open import open_store


def run_config(folder: Path, **observe: object) -> RunConfig:
    content = {
        "schema_version": 1,
        "steps": 4,
        "global_batch": 8,
        "run": {"uri": str(folder)},
        "data": {"kind": "synthetic", "root": "/data"},
        "objectives": [{"kind": "croco"}],
        "observe": {"metrics_port": None, "metrics_host": "127.0.0.1"} | observe,
    }
    return parse_run_config(content, origin="the test")


def pipe() -> Console:
    return Console(force_terminal=False, file=io.StringIO())


def test_rank_0_leaves_a_whole_run_folder(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    observer = build_observer(config, Seat(), open_store(tmp_path), resumed_at=0, source={"samples": 3}, console=pipe())
    observer.step(report(1))
    observer.checkpoint(Saved(step=1))
    observer.evaluation(1, {"croco/true": 0.5}, seconds=0.5)
    observer.pictures(1, sheets())
    observer.close()
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    records = {"steps.jsonl", "evaluations.jsonl", "checkpoints.jsonl", "starts.jsonl"}
    assert files == records | {"config.yaml", "environment.json", "pictures/step-000001-croco.png"}
    assert parse_run_config(yaml.safe_load((tmp_path / "config.yaml").read_text()), origin="the record") == config
    assert json.loads((tmp_path / "environment.json").read_text())["data"] == {"samples": 3}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    observer = build_observer(run_config(tmp_path), Seat(rank=1), open_store(tmp_path), resumed_at=0, source={}, console=pipe())
    observer.step(report(1))
    observer.pictures(1, sheets())
    observer.close()
    assert list(tmp_path.iterdir()) == []


def test_each_rank_serves_its_metrics_even_if_its_port_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as listener, caplog.at_level(logging.INFO):
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = int(listener.getsockname()[1])
        config = run_config(tmp_path, metrics_port=taken - 1)
        observer = build_observer(
            config, Seat(rank=5, local_rank=1), open_store(tmp_path), resumed_at=0, source={}, console=pipe()
        )
    observer.step(report(1))
    assert f"metrics port {taken} is taken" in caplog.text
    [url] = re.findall(r"metrics of rank 5: (\S+)", caplog.text)
    with urllib.request.urlopen(url, timeout=5) as page:
        assert f'odonata_loss{{rank="5",run="{tmp_path.name}"}} 0.5' in page.read().decode()
    observer.close()


def test_a_metrics_host_that_is_not_ours_does_not_stop_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = run_config(tmp_path, metrics_port=0, metrics_host="203.0.113.1")
    observer = build_observer(config, Seat(), open_store(tmp_path), resumed_at=0, source={}, console=pipe())
    observer.step(report(1))
    observer.close()
    assert "training goes on without one of its monitors" in caplog.text
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("observe", "package"), [({"tensorboard": True}, "tensorboard"), ({"wandb": {"project": "odonata"}}, "wandb")]
)
def test_an_extra_that_is_not_installed_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, observe: dict[str, object], package: str
) -> None:
    config = run_config(tmp_path, **observe)
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"package {package} is not installed; pip install 'odonata\[{package}\]'"):
        build.check_extras(config.observe)


def test_what_nobody_asked_for_need_not_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    build.check_extras(run_config(tmp_path).observe)


def test_tensorboard_is_written_by_rank_0_of_a_run_that_asks_for_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    for rank in (0, 1):
        folder = tmp_path / str(rank)
        config = run_config(folder, tensorboard=True)
        build_observer(config, Seat(rank=rank), open_store(folder), resumed_at=0, source={}, console=pipe()).close()
    assert list((tmp_path / "0" / "tensorboard").iterdir())
    assert not (tmp_path / "1").exists()
