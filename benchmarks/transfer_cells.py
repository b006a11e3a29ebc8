"""Cells of the study: one pre-training, or one task on one encoder, with one seed; each is run once, in a folder of its own."""

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.transfer_protocol import (
    BOTH_MODES,
    CITY,
    CLIPS,
    LIKE,
    PRETRAININGS,
    RUN,
    SCRATCH,
    SHARED,
    TASKS,
    TRIVIAL,
    write_protocol,
)

Key = tuple[str, str, str, int]
"""Task, pre-training, mode, seed."""
Values = Mapping[Key, Mapping[str, float]]
"""Metrics of the cells that have ended."""


@dataclass(frozen=True)
class Cell:
    """One command, and the folder that it fills."""

    folder: Path
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def cost(self) -> Path:
        """Minutes of a core; written when the command has succeeded."""
        return self.folder.with_suffix(".minutes")

    @property
    def has_ended(self) -> bool:
        return self.cost.exists()


@dataclass(frozen=True)
class Known:
    """Cells that need not be run, from an earlier report."""

    values: Values
    trivial: Mapping[str, Mapping[str, float]]
    """Task -> metric -> that of the trivial answer."""
    minutes: Mapping[str, float]
    """Of a core, by the name of the cell, pre-trainings included."""


def read_known(report: Path) -> Known:
    """The cells of a saved report, but for those of tasks and pre-trainings that are run in another way now."""
    saved = json.loads(report.read_text())
    protocol = write_protocol()
    same = {SCRATCH} | {name for name in protocol if saved["protocol"].get(name) == protocol[name]}
    if SHARED not in same:
        return Known({}, {}, {})
    values: dict[Key, dict[str, float]] = {}
    for cell in saved["cells"]:
        if not {cell["task"], cell["pretraining"]} <= same:
            continue
        key = (cell["task"], cell["pretraining"], cell["mode"], cell["seed"])
        values.setdefault(key, {})[cell["metric"]] = cell["value"]
    trivial = {
        task: {metric: of_metric[TRIVIAL]["mean"] for metric, of_metric in of_task.items()}
        for task, of_task in saved["table"].items()
        if task in same
    }
    return Known(values, trivial, {cell: minutes for cell, minutes in saved["minutes"].items() if _parts_of(cell) <= same})


def _parts_of(cell: str) -> set[str]:
    """The task, if there is one, and the pre-training of a cell by its name."""
    return set(Path(cell).name.split("-")[:-1]) - set(BOTH_MODES)


def list_cells(
    folder: Path, names: Sequence[str], tasks: Sequence[str], seed: int, known: Values
) -> tuple[list[Cell], dict[Key, Cell]]:
    """What is to be evaluated with one seed and is not known, and the pre-trainings for it."""
    evaluated = {
        (task, name, mode, seed): _evaluation_cell(folder, task, name, mode, seed)
        for task, name in itertools.product(tasks, (SCRATCH, *names))
        for mode in TASKS[task].modes
        if (task, name, mode, seed) not in known
    }
    needed = {LIKE if name == SCRATCH else name for _, name, _, _ in evaluated}
    return [_pretraining_cell(folder, name, seed) for name in PRETRAININGS if name in needed], evaluated


def _pretraining_cell(folder: Path, name: str, seed: int) -> Cell:
    run = folder / "pretrained" / f"{name}-{seed}"
    places = (f"data.root={folder / 'city'}", f"run.uri={run}", "observe.metrics_port=null")
    return Cell(run, ("train", str(RUN), *places, f"seed={seed}", *PRETRAININGS[name].settings))


def _evaluation_cell(folder: Path, task: str, name: str, mode: str, seed: int) -> Cell:
    out = folder / "evaluated" / f"{task}-{name}-{mode}-{seed}"
    of_run = folder / "pretrained"
    encoder = ("scratch", "--like", str(of_run / f"{LIKE}-{seed}")) if name == SCRATCH else (str(of_run / f"{name}-{seed}"),)
    how = ("--frozen" if mode == "frozen" else "--finetune", "--seed", str(seed), "--steps", str(TASKS[task].steps))
    data = ("--data", "kind=synthetic", "--data", f"root={folder / 'city'}", "--data", "workers=1")
    rest = (
        "--clips",
        str(CLIPS),
        "--out",
        str(out),
        "observe.metrics_port=null",
        "observe.evaluate_clips=16",
        *TASKS[task].settings,
    )
    return Cell(out, ("evaluate", task, "--encoder", *encoder, *how, *data, *rest))


def synthesize(city: Path) -> None:
    """The world of the study, unless it is there; every fourth scene is held out."""
    if not city.is_dir():
        subprocess.run([sys.executable, "-m", "odonata", "synthesize", "--out", str(city), *CITY], check=True, stdout=sys.stderr)


def run_cells(waves: Sequence[Sequence[Cell]], jobs: int) -> None:
    """Every cell that has not ended, wave by wave; SystemExit names those that failed, when all others are done."""
    console = Console(stderr=True)
    failed: list[Cell] = []
    for number, wave in enumerate(waves, 1):
        todo = [cell for cell in wave if not cell.has_ended]
        with ThreadPoolExecutor(jobs) as pool:
            ended = pool.map(run_cell, todo)
            shown = track(ended, f"cells of wave {number} of {len(waves)}", total=len(todo), console=console)
            failed += [cell for cell, is_done in zip(todo, shown, strict=True) if not is_done]
    if failed:
        raise SystemExit("these cells failed, see their logs: " + " ".join(str(cell.log) for cell in failed))


def run_cell(cell: Cell) -> bool:
    """Run the command on one core; the answer is whether it succeeded."""
    cell.log.parent.mkdir(parents=True, exist_ok=True)
    with cell.log.open("w") as log:
        one_core = os.environ | {"OMP_NUM_THREADS": "1"}
        started = subprocess.Popen([sys.executable, "-m", "odonata", *cell.command], stdout=log, stderr=log, env=one_core)
        _, status, used = os.wait4(started.pid, 0)
    started.returncode = os.waitstatus_to_exitcode(status)  # Popen has not waited itself
    if started.returncode == 0:
        cell.cost.write_text(f"{(used.ru_utime + used.ru_stime) / 60:.3f}\n")
    return cell.has_ended


def read_figures(cell: Cell) -> dict[str, float]:
    """Metrics of the one seed of a cell; NaN where nothing was known."""
    (of_seed,) = _read_evaluation(cell)["seeds"]
    return _with_nan(of_seed["figures"])


def read_trivial(cell: Cell) -> dict[str, float]:
    """Metrics of the trivial answer, which are the same in all cells of a task."""
    return _with_nan(_read_evaluation(cell)["trivial_figures"])


def _read_evaluation(cell: Cell) -> dict[str, Any]:
    return json.loads((cell.folder / "evaluation.json").read_text())


def _with_nan(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in figures.items()}
