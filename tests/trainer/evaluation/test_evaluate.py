"""Evaluation through the public command, and its runs under a sharding engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.pretraining import build_model
from tests.runs import ROOT, Finished, Runner
from tests.trainer.evaluation.test_detection import devkit_figures
from tests.trainer.test_parity import assert_same_run, final_weights
from trainer.checkpoint.manager import read_tensors
from trainer.checkpoint.tools import choose_checkpoint, open_place
from trainer.config.load import load_run_config
from trainer.config.store import StoreConfig
from trainer.errors import ConfigError
from trainer.evaluation.detection import RESULTS_FILE
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.planning import choose_encoder, plan_run
from trainer.parallel.launch import read_launch
from trainer.store.open import open_store

FROZEN = ("objectives=[{kind: depth, points: 64}]", "data.clip.frames=1", "optim.train_encoder=false", "optim.ema_decay=null")
SHORT = ("data.cameras=[CAM_FRONT]", "steps=5", "checkpoint.every_steps=5", "encoder.has_time=true")


def odonata(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "odonata", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)


def test_an_evaluation_from_a_run_to_both_files(runner: Runner, city: Path, tmp_path: Path) -> None:
    base = runner.once("alone").folder
    data = [f"root={city}", "kind=synthetic", "workers=0", "cameras=[CAM_FRONT]"]
    done = odonata(
        "evaluate", "depth", "--encoder", base, *(part for key in data for part in ("--data", key)), "--seed", 0, "--seed", 1,
        "--steps", 4, "--clips", 6, "--out", tmp_path, "global_batch=2", "observe.metrics_port=null", "objectives.0.points=64",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    newest = choose_checkpoint(open_place(str(base)))
    assert f"# depth: alone-step-{newest.step}-ema, frozen" in done.stdout
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert (content["task"], content["mode"], content["clips"]) == ("depth", "frozen", 6)
    assert [one["seed"] for one in content["seeds"]] == [0, 1]
    assert content["uri"] == f"{base}/{newest.prefix.rstrip('/')}", "one checkpoint, since the run may go on"
    assert content["summary"].keys() == content["trivial_figures"].keys() == {"delta1", "abs_rel", "rmse_m"}
    assert content["summary"]["abs_rel"]["half_width"] > 0
    assert (tmp_path / "evaluation.md").read_text() == done.stdout
    average, after = read_tensors(open_store(base), newest, prefix="ema.encoder."), final_weights(tmp_path / "seed-1")
    assert all(torch.equal(after[name.replace("ema.", "model.")], weight) for name, weight in average.items())


@pytest.mark.parametrize(
    ("task", "small"),
    [("depth", ["head_width=16"]), ("detection", ["lift.cell_m=2", "lift.channels=8", "lift.width=16", "lift.depth_bins=8"])],
)
def test_a_head_is_trained_and_scored_on_the_real_keyframe(
    task: str, small: list[str], keyframe_dataroot: Path, tmp_path: Path
) -> None:
    data = [f"root={keyframe_dataroot}", "train_split=all", "val_split=all", "workers=0", f"index_folder={tmp_path / 'index'}"]
    done = odonata(
        "evaluate", task, "--encoder", "scratch", "--size", "nano", *(part for key in data for part in ("--data", key)),
        "--steps", 2, "--out", tmp_path / "out", "global_batch=1", "observe.metrics_port=null", *(f"objectives.0.{key}" for key in small),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    (of_seed,) = content["seeds"]
    assert content["clips"] == 1
    if task == "depth":
        assert 0 < of_seed["figures"]["delta1"] <= 1 and of_seed["figures"]["rmse_m"] > 0
    else:
        results = (tmp_path / "out" / "seed-0" / RESULTS_FILE).read_bytes()
        assert devkit_figures(keyframe_dataroot, "mini_train", results, tmp_path) == pytest.approx(of_seed["figures"], abs=1e-5)


def test_several_seeds_under_a_launcher_are_refused_before_anything_begins(tmp_path: Path) -> None:
    chosen = choose_encoder("scratch", StoreConfig(), size="tiny")
    configs = [plan_run("depth", chosen, "frozen", seed=seed, out=str(tmp_path), data=["root=city"]) for seed in range(2)]
    launch = read_launch({"WORLD_SIZE": "2"}, configs[0].parallel)
    with pytest.raises(ConfigError, match=r"2 seeds were asked for under a launcher, .* train them one by one with --seed"):
        evaluate("depth", chosen, "frozen", configs, launch, out=str(tmp_path), clips=1)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def frozen(runner: Runner) -> Finished:
    return runner.run("frozen", *FROZEN, *SHORT)


def test_a_frozen_encoder_stays_as_it_is_and_the_head_learns(frozen: Finished) -> None:
    config = load_run_config(frozen.folder / "config.yaml")
    torch.manual_seed(config.seed)
    fresh = build_model(config.encoder, config.objectives, config.token_grid, cameras=config.cameras).state_dict()
    weights = final_weights(frozen.folder)
    changed = {name for name, weight in fresh.items() if not torch.equal(weights[f"model.{name}"], weight)}
    assert changed == {name for name in fresh if name.startswith("objectives.")}


@pytest.mark.parametrize(
    "engine", ["fsdp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero1", "zero2", "zero3"))]
)
def test_a_head_on_a_frozen_encoder_learns_the_same_under_every_engine(runner: Runner, frozen: Finished, engine: str) -> None:
    assert_same_run(runner.run(f"frozen-{engine}", *FROZEN, *SHORT, engine=engine, processes=2), frozen)
