"""Start real runs through the public command, and read what they leave behind."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
ACCELERATE = ROOT / "launch" / "accelerate"

SMALL_RUN = """\
schema_version: 1
steps: 20
global_batch: 4
run: {uri: unset}
data:
  kind: synthetic
  root: unset
  clip: {frames: 4, spacing_s: 0.25, height_px: 32, width_px: 32}
  pairs: {min_overlap: 0.05}
  workers: 0
encoder: {size: tiny, patch_px: 8, tubelet_frames: 2}
objectives:
  - kind: croco
    decoder: tiny
    mask: {kind: random, ratio: 0.75}
optim: {lr: 1.0e-3, warmup_steps: 2, clip_grad_norm: 0.5, ema_decay: 0.9}
checkpoint: {every_steps: 10}
observe: {evaluate_clips: 8, metrics_port: null, log_every_steps: 5}
"""


@dataclass(frozen=True)
class Finished:
    """A run that ended."""

    folder: Path
    returncode: int
    output: str

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "steps.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        return [step["loss"] for step in self.steps]


class Runner:
    """Starts variants of one small run, each in a folder of its own; `data` says where theirs is."""

    def __init__(self, folder: Path, *data: str, config: str = SMALL_RUN) -> None:
        self.folder = folder
        self.config = folder / "run.yaml"
        self.config.write_text(config)
        self.data = data
        self._finished: dict[str, Finished] = {}

    def once(self, name: str, *, engine: str | None = None, processes: int = 1) -> Finished:
        """Run `name` the first time it is asked for, so that several tests look at one run."""
        if name not in self._finished:
            self._finished[name] = self.run(name, engine=engine, processes=processes)
        return self._finished[name]

    def copy_finished(self, name: str) -> Finished:
        """The unbroken run of one process that several tests look at, as a run of its own."""
        whole = self.once("alone")
        shutil.copytree(whole.folder, self.folder / name)
        return replace(whole, folder=self.folder / name)

    def start(
        self, name: str, *overrides: str, engine: str | None = None, processes: int = 1, options: tuple[str, ...] = ()
    ) -> subprocess.Popen[str]:
        """Start run `name`: alone, or `processes` ranks under accelerate's config file `engine`."""
        train = ["odonata", "train", str(self.config), *options]
        train += [*self.data, f"run.uri={self.folder / name}", *overrides]
        launcher = [sys.executable, "-m"]
        if engine:
            launcher += ["accelerate.commands.launch", "--config_file", str(ACCELERATE / f"{engine}.yaml")]
            launcher += ["--num_processes", str(processes), "--main_process_port", str(free_port()), "-m"]
        return subprocess.Popen(
            [*launcher, *train],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, name: str, process: subprocess.Popen[str], *, timeout_s: float = 180) -> Finished:
        """Wait for run `name` and take its output."""
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
            output, _ = process.communicate()
            raise AssertionError(f"run {name} did not end in {timeout_s} s:\n{output[-4000:]}") from None
        return Finished(self.folder / name, process.returncode, output)

    def run(self, name: str, *overrides: str, engine: str | None = None, processes: int = 1) -> Finished:
        """Start run `name` and wait for it to succeed."""
        finished = self.finish(name, self.start(name, *overrides, engine=engine, processes=processes))
        assert finished.returncode == 0, finished.output[-4000:]
        return finished

    def wait_for_step(self, name: str, step: int, process: subprocess.Popen[str], *, timeout_s: float = 120) -> None:
        """Return once run `name` has recorded `step`."""
        steps = self.folder / name / "steps.jsonl"
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if steps.exists() and len(steps.read_text().splitlines()) >= step:
                return
            assert process.poll() is None, f"run {name} ended early:\n{process.communicate()[0][-4000:]}"
            time.sleep(0.05)
        raise AssertionError(f"run {name} did not reach step {step} in {timeout_s} s")


def kill_tree(pid: int) -> None:
    """kill -9 for `pid` and all below it; the launcher puts its workers into sessions of their own."""
    root = psutil.Process(pid)
    for process in [*root.children(recursive=True), root]:
        process.kill()


def ranks_of(launcher: int) -> list[psutil.Process]:
    """The ranks that a launcher has started, not the loader workers below them."""
    return [child for child in psutil.Process(launcher).children() if "odonata" in child.cmdline()]


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
