"""Runs of benchmarks that train: through the public command, with what they cost, and the models that come out."""

import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from models.pretraining import PretrainingModel, build_preparations
from trainer.assembly import assemble_model
from trainer.checkpoint.manager import load_into_model
from trainer.config.load import load_run_config
from trainer.config.run import RunConfig
from trainer.data.build import build_source
from trainer.data.loader import needed_fields
from trainer.held_out import HeldOut, read_held_out
from trainer.parallel.launch import read_launch
from trainer.store.open import open_store


class TrainedRun(NamedTuple):
    """A run that ended and what it cost."""

    folder: Path
    minutes: float
    cpu_minutes: float
    """Of all its processes, on all cores."""

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Figures on held-out clips, as training went on."""
        return [json.loads(line) for line in (self.folder / "evaluations.jsonl").read_text().splitlines()]

    @property
    def config(self) -> RunConfig:
        """With every default written out."""
        return load_run_config(self.folder / "config.yaml")


def odonata(*arguments: object) -> None:
    """The public command, its output on stderr so that stdout stays the report's."""
    command = [sys.executable, "-m", "odonata", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=sys.stderr, env={"OMP_WAIT_POLICY": "passive", **os.environ})


def synthesize_city(folder: Path, scenes: int) -> Path:
    """A synthetic city, unless it is there already; every fourth scene is held out."""
    if not folder.is_dir():
        odonata("synthesize", "--out", folder, "--scenes", scenes, "--duration-s", 6, "--scale", 0.125)
    return folder


def train_run(config: Path, folder: Path, city: Path, *overrides: str) -> TrainedRun:
    """One run, unless it is there already; its cost is kept beside it."""
    kept = folder.with_suffix(".json")
    if not kept.exists():
        began, cpu_s = time.monotonic(), _children_cpu_s()
        odonata("train", config, f"data.root={city}", f"run.uri={folder}", "observe.metrics_port=null", *overrides)
        cost = {"minutes": (time.monotonic() - began) / 60, "cpu_minutes": (_children_cpu_s() - cpu_s) / 60}
        kept.write_text(json.dumps(cost))
    return TrainedRun(folder, **json.loads(kept.read_text()))


def load_model(run: TrainedRun) -> PretrainingModel:
    """The model of a run's last checkpoint."""
    config = run.config
    model = assemble_model(config)
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # so DCP says of one process
    load_into_model(open_store(run.folder), model, parts="model")
    return model.eval()


def read_held_out_clips(config: RunConfig, clips: int) -> HeldOut:
    """Clips of the held-out scenes, as the objectives of `config` prepare them, in batches as large as in training."""
    preparations = build_preparations(config.objectives, config.token_grid, config.encoder, cameras=config.cameras)
    source = build_source(config.data, "val", needed_fields(preparations), augment=False)
    assert source is not None, "the benchmark's run holds scenes out"
    launch = read_launch({}, config.parallel)
    return read_held_out(source, source, preparations, seed=0, clips=clips, micro_batch=config.global_batch, launch=launch)


def mean_figures(model: PretrainingModel, held_out: HeldOut) -> Mapping[str, float]:
    """Every figure of the model's objectives, a mean over all held-out batches."""
    sums: dict[str, float] = {}
    with torch.no_grad():
        for batch in held_out.batches:
            for name, values in model(batch, "evaluate").items():
                sums[name] = sums.get(name, 0.0) + float(values.mean())
    return {name: total / len(held_out.batches) for name, total in sums.items()}


def _children_cpu_s() -> float:
    """Of all processes that this one started and their children, once they have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
