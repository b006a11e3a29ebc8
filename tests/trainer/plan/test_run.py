"""The plan of a whole run through its command: a table, JSON and a picture; and what is asked wrongly."""

import json
from pathlib import Path

import pytest

from odonata.door import app
from tests.trainer.plan.short import run_config
from trainer.errors import ConfigError


def call(*arguments: object) -> int:
    return app([str(argument) for argument in arguments], standalone_mode=False) or 0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_text(run_config().model_dump_json())
    return path


@pytest.mark.slow
def test_the_command_plans_every_number_of_gpus(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.png"
    assert call("plan", run, "--gpus", "1,8,64", "--gpu", "h100", "--dollars-per-hour", "2", "--json", "-o", picture) == 0
    printed = json.loads(capsys.readouterr().out)
    alone, node, nodes = printed["plans"]
    assert [one["gpus"] for one in printed["plans"]] == [1, 8, 64]
    assert alone["setup"]["engine"] == "single" and not any(alone["wire"]["payload_bytes"].values())
    assert node["wire"]["network_bytes"] == 0
    assert node["step_s"]["best"] < alone["step_s"]["best"]
    assert nodes["wire"]["network_bytes"] > 0
    assert all(one["dollars"] == pytest.approx(2 * one["gpu_hours"]) for one in printed["plans"])
    assert all(0 < one["mfu_ceiling"] < 0.7 for one in printed["plans"])
    assert "computed: more shards" in " ".join(printed["assumed"])
    assert all(one["largest_micro_batch"] >= one["setup"]["micro_batch"] for one in printed["plans"])
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--gpu", "v100"), "a GPU called v100 was asked for"),
        (("--gpus", "8,x"), "no list of numbers from 1 on"),
        (("--gpus", "48"), "global_batch is 64, which 48 does not divide"),
        (("--gpus", "64", "--shards", "24"), "give --shards a divisor of 64"),
        (("-o", "plan.xyz"), "let it end in .png, .svg or .pdf"),
    ],
)
def test_what_is_asked_wrongly_is_told_at_once(run: Path, arguments: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        call("plan", run, *(() if "--gpus" in arguments else ("--gpus", "8,64")), *arguments)
