"""Does pre-training pay? Encoders of one shape, pre-trained in six ways, on downstream tasks of held-out scenes, compared in pairs.

The protocol is docs/study.md. A cell is one pre-training, or one task on one encoder, with one seed; each is a run of the public
command in a folder of its own, which is trained once: a second call goes on where the first was stopped, and adds what is new.

    python -m benchmarks.transfer --folder runs/transfer --jobs 2             # the study: some hours on two cores
    python -m benchmarks.transfer --folder runs/look --seeds 2 --tasks depth  # a look: two seeds, one task
    python -m benchmarks.transfer --folder runs/transfer --report             # of the cells that have ended
    python -m benchmarks.transfer --folder runs/other --known benchmarks/results/transfer.json --save   # what that report lacks

JSON keys: cells (task, pretraining, mode, seed, metric, value: one object each), table (task -> metric -> "pretraining, mode" -> mean
and half_width of its 95 % interval), differences (each pre-training less scratch, paired by seed), claims (text, holds, differences),
protocol (the world, and how each task and pre-training was run: cells of another one are not taken from an earlier report), minutes
(of a core, by cell), cpu_minutes (their sum), seeds, missing (cells that have not ended).
"""

import itertools
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.report import RESULTS, Report, build_parser, write_table
from trainer.evaluation.report import summarise

RUN = Path(__file__).parents[1] / "launch" / "runs" / "transfer.yaml"
SCRATCH = "scratch"
_LIKE = "croco"
"""The pre-training whose encoder a fresh one has the shape of."""
_CITY = ("--scenes=96", "--duration-s=3", "--scale=0.125")
_SHARED = "shared"
"""What all cells have in common, beside the names of tasks and pre-trainings in a report's protocol."""
CLIPS = 100
"""Held-out clips that are scored."""
_COLUMNS = 5
"""Of pictures in a row of the figure."""


@dataclass(frozen=True)
class Pretraining:
    """One way to pre-train; all take about as many minutes of a core."""

    steps: int
    samples: int
    """In a step."""
    overrides: tuple[str, ...]

    @property
    def settings(self) -> tuple[str, ...]:
        """All that differs from the run config, but for seed and places."""
        return (f"steps={self.steps}", f"global_batch={self.samples}", *self.overrides)


_CROCO = "{kind: croco, decoder: tiny, mask: {ratio: 0.8}}"
_SIMIPU = "{kind: simipu, points: tiny}"
_MIM4D = "{kind: mim4d, volume: tiny, mask_ratio: 0.3, mask_cell_px: 16, rays: 16}"
_INSTANTS = ("data.clip.frames=3", "data.clip.spacing_s=0.5", "data.augment.crop_share=[0.95,1.0]")
PRETRAININGS: Mapping[str, Pretraining] = {
    "mae": Pretraining(1500, 36, ("objectives=[{kind: mae, decoder: tiny, mask: {ratio: 0.75}}]",)),
    "croco": Pretraining(1500, 18, (f"objectives=[{_CROCO}]",)),
    "simipu": Pretraining(900, 6, (f"objectives=[{_SIMIPU}]",)),
    "mim4d": Pretraining(1000, 1, (f"objectives=[{_MIM4D}]", *_INSTANTS)),
    "mix": Pretraining(400, 1, (f"objectives=[{_CROCO}, {_SIMIPU}, {_MIM4D}]", *_INSTANTS)),
}


@dataclass(frozen=True)
class Task:
    """A downstream task in the study."""

    metric: str
    """That claims are judged by."""
    lower_is_better: bool
    steps: int
    lr: float
    """Of the head; fine-tuned blocks learn at layer_decay of it."""
    modes: tuple[str, ...]
    overrides: tuple[str, ...]

    @property
    def settings(self) -> tuple[str, ...]:
        """All that differs from the task's protocol, but for the steps."""
        return (f"optim.lr={self.lr}", *self.overrides)


_BOTH, _FROZEN = ("frozen", "finetuned"), ("frozen",)
_FOUR = "global_batch=4"
_LIFT = "objectives.0.lift={cell_m: 2.0, far_m: 33.0, depth_bins: 32, channels: 32, width: 32}"
TASKS: Mapping[str, Task] = {
    "depth": Task("abs_rel", True, 100, 1e-3, _BOTH, (_FOUR, "objectives.0.head_width=32")),
    "pose": Task("median_cm", True, 300, 1e-3, _BOTH, ("data.pairs.max_gap_s=0.5",)),
    "flow": Task("epe_px", True, 150, 1e-3, _FROZEN, ()),
    "bev": Task("drivable_iou", False, 300, 2e-3, _BOTH, (_FOUR, _LIFT, "objectives.0.cell_m=1.0")),
    "detection": Task("NDS", False, 100, 1e-3, _FROZEN, (_FOUR, _LIFT)),
    "map": Task("mAP", False, 100, 1e-3, _FROZEN, (_FOUR, _LIFT)),
}


@dataclass(frozen=True)
class Claim:
    """What must come out for one paper to be believed here; one of the comparisons is enough."""

    text: str
    better: str
    worse: str
    tasks: tuple[str, ...]


CLAIMS = (
    *(
        Claim(f"CroCo beats {called} on {task}", "croco", other, (task,))
        for task in ("pose", "flow")
        for called, other in (("MAE", "mae"), (SCRATCH, SCRATCH))
    ),
    Claim("MIM4D beats scratch on depth", "mim4d", SCRATCH, ("depth",)),
    Claim("MIM4D beats scratch on BEV", "mim4d", SCRATCH, ("bev",)),
    Claim("SimIPU beats scratch on depth or detection", "simipu", SCRATCH, ("depth", "detection")),
)


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


Key = tuple[str, str, str, int]
"""Task, pre-training, mode, seed."""
Values = Mapping[Key, Mapping[str, float]]
"""Metrics of the cells that have ended."""


@dataclass(frozen=True)
class Known:
    """Cells that need not be run, from an earlier report."""

    values: Values
    minutes: Mapping[str, float]
    """Of a core, by the name of the cell, pre-trainings included."""


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where data and cells are kept")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each cell")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="tasks; all by default")
    parser.add_argument("--pretrainings", nargs="+", choices=PRETRAININGS, default=list(PRETRAININGS), help="all by default")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, one core each")
    parser.add_argument("--report", action="store_true", help="run nothing: report the cells that have ended")
    parser.add_argument(
        "--known", type=Path, help="an earlier report, saved on another machine maybe: its cells are not run again"
    )
    arguments = parser.parse_args()
    known = read_known(arguments.known) if arguments.known else Known({}, {})
    names, tasks = arguments.pretrainings, arguments.tasks
    seeds = [list_cells(arguments.folder, names, tasks, seed, known.values) for seed in range(arguments.seeds)]
    if not arguments.report:
        synthesize(arguments.folder / "city")
        run_cells([cells for pretrained, evaluated in seeds for cells in (pretrained, list(evaluated.values()))], arguments.jobs)
    pretrained = [cell for of_seed, _ in seeds for cell in of_seed]
    evaluated = {key: cell for _, of_seed in seeds for key, cell in of_seed.items()}
    tell(Report("transfer", arguments), arguments, known, pretrained, evaluated)


def write_protocol() -> dict[str, list[str]]:
    """What makes cells comparable: the world and the run config that all share, and how each task and pre-training is run here."""
    config = [line for line in RUN.read_text().splitlines() if not line.startswith("#")]
    tasks = {name: [f"steps={task.steps}", *task.settings] for name, task in TASKS.items()}
    pretrainings = {name: list(how.settings) for name, how in PRETRAININGS.items()}
    return {_SHARED: [*_CITY, f"--clips={CLIPS}", *config], **tasks, **pretrainings}


def read_known(report: Path) -> Known:
    """The cells of a saved report, but for those of tasks and pre-trainings that are run in another way now."""
    saved = json.loads(report.read_text())
    protocol = write_protocol()
    same = {SCRATCH} | {name for name in protocol if saved["protocol"].get(name) == protocol[name]}
    if _SHARED not in same:
        return Known({}, {})
    values: dict[Key, dict[str, float]] = {}
    for cell in saved["cells"]:
        if not {cell["task"], cell["pretraining"]} <= same:
            continue
        key = (cell["task"], cell["pretraining"], cell["mode"], cell["seed"])
        values.setdefault(key, {})[cell["metric"]] = cell["value"]
    return Known(values, {cell: minutes for cell, minutes in saved["minutes"].items() if _parts_of(cell) <= same})


def _parts_of(cell: str) -> set[str]:
    """The task, if there is one, and the pre-training of a cell by its name."""
    return set(Path(cell).name.split("-")[:-1]) - set(_BOTH)


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
    needed = {_LIKE if name == SCRATCH else name for _, name, _, _ in evaluated}
    return [_pretraining_cell(folder, name, seed) for name in PRETRAININGS if name in needed], evaluated


def _pretraining_cell(folder: Path, name: str, seed: int) -> Cell:
    run = folder / "pretrained" / f"{name}-{seed}"
    places = (f"data.root={folder / 'city'}", f"run.uri={run}", "observe.metrics_port=null")
    return Cell(run, ("train", str(RUN), *places, f"seed={seed}", *PRETRAININGS[name].settings))


def _evaluation_cell(folder: Path, task: str, name: str, mode: str, seed: int) -> Cell:
    out = folder / "evaluated" / f"{task}-{name}-{mode}-{seed}"
    of_run = folder / "pretrained"
    encoder = ("scratch", "--like", str(of_run / f"{_LIKE}-{seed}")) if name == SCRATCH else (str(of_run / f"{name}-{seed}"),)
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
        subprocess.run([sys.executable, "-m", "odonata", "synthesize", "--out", str(city), *_CITY], check=True, stdout=sys.stderr)


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


def tell(report: Report, arguments: Namespace, known: Known, pretrained: Sequence[Cell], evaluated: Mapping[Key, Cell]) -> None:
    """Table, verdicts and figure of the cells that have ended and of those that were known."""
    new = {key: read_figures(cell) for key, cell in evaluated.items() if cell.has_ended}
    values = {**known.values, **new}
    table = tabulate(values)
    claims = [judge(claim, values) for claim in CLAIMS]
    report.say(as_markdown(table, claims))
    if report.save:
        (RESULTS / "transfer.md").write_text(as_markdown(table, claims))
        plot(values, RESULTS / "transfer.png")
    ended = [cell for cell in (*pretrained, *evaluated.values()) if cell.has_ended]
    minutes = {**known.minutes, **{cell.name: float(cell.cost.read_text()) for cell in ended}}
    report.finish(
        {
            "cells": [
                {"task": task, "pretraining": name, "mode": mode, "seed": seed, "metric": metric, "value": value}
                for (task, name, mode, seed), figures in values.items()
                for metric, value in figures.items()
            ],
            "table": table,
            "differences": {
                f"{task}, {name}, {mode}": as_interval(paired_differences(values, task, name, SCRATCH, mode))
                for task, name in itertools.product(TASKS, PRETRAININGS)
                for mode in TASKS[task].modes
                if len(paired_differences(values, task, name, SCRATCH, mode)) > 1
            },
            "claims": claims,
            "protocol": write_protocol(),
            "minutes": minutes,
            "cpu_minutes": sum(minutes.values()),
            "seeds": arguments.seeds,
            "missing": len(evaluated) - len(new),
        }
    )


def read_figures(cell: Cell) -> dict[str, float]:
    """Metrics of the one seed of a cell; NaN where nothing was known."""
    (of_seed,) = json.loads((cell.folder / "evaluation.json").read_text())["seeds"]
    return {name: math.nan if value is None else value for name, value in of_seed["figures"].items()}


def tabulate(values: Values) -> dict[str, Any]:
    """Mean and half width over seeds: task -> metric -> "pretraining, mode"."""
    table: dict[str, Any] = {}
    for task, name, mode in dict.fromkeys(key[:3] for key in values):
        of_seeds = [figures for key, figures in values.items() if key[:3] == (task, name, mode)]
        for metric in of_seeds[0]:
            of_metric = table.setdefault(task, {}).setdefault(metric, {})
            of_metric[f"{name}, {mode}"] = as_interval([figures[metric] for figures in of_seeds])
    return table


def as_interval(numbers: Sequence[float]) -> dict[str, float | None]:
    """Mean and half the width of its 95 % interval."""
    mean, half = summarise(numbers)
    return {"mean": mean, "half_width": half}


def paired_differences(values: Values, task: str, better: str, worse: str, mode: str) -> list[float]:
    """By how much `better` is better than `worse` in the metric of `task`, one number a seed that both have."""
    sign = -1 if TASKS[task].lower_is_better else 1
    metric = TASKS[task].metric
    seeds = [seed for of_task, name, of_mode, seed in values if (of_task, name, of_mode) == (task, better, mode)]
    return [
        sign * (values[task, better, mode, seed][metric] - values[task, worse, mode, seed][metric])
        for seed in seeds
        if (task, worse, mode, seed) in values
    ]


def judge(claim: Claim, values: Values) -> dict[str, Any]:
    """Whether the interval of the paired difference lies above zero, frozen, in one of the claim's tasks; null before it is known."""
    found = {
        task: as_interval(paired_differences(values, task, claim.better, claim.worse, "frozen"))
        for task in claim.tasks
        if len(paired_differences(values, task, claim.better, claim.worse, "frozen")) > 1
    }
    holds = any(interval["mean"] > interval["half_width"] for interval in found.values()) if found else None  # type: ignore[operator]
    return {"text": claim.text, "holds": holds, "differences": found}


def as_markdown(table: Mapping[str, Any], claims: Sequence[Mapping[str, Any]]) -> str:
    """A table of the metric that each task is judged by, and the verdicts."""
    columns = [(task, mode) for task in table for mode in TASKS[task].modes]
    heads = [f"{task}, {mode}: {TASKS[task].metric}" for task, mode in columns]
    rows = [
        (name, *(_say(table[task][TASKS[task].metric].get(f"{name}, {mode}")) for task, mode in columns))
        for name in (SCRATCH, *PRETRAININGS)
    ]
    verdicts = {True: "holds", False: "does not hold", None: "not known yet"}
    return "\n".join(
        [
            *write_table(("pre-training", *heads), rows),
            "",
            *(f"- {claim['text']}: {verdicts[claim['holds']]}{_say_differences(claim)}" for claim in claims),
            "",
        ]
    )


def _say_differences(claim: Mapping[str, Any]) -> str:
    """By how much, in the metric of each task; nothing before it is known."""
    said = [f"{TASKS[task].metric} better by {_say(interval)}" for task, interval in claim["differences"].items()]
    return f" ({', '.join(said)})" if said else ""


def _say(interval: Mapping[str, float | None] | None) -> str:
    if interval is None:
        return "-"
    mean, half = interval["mean"], interval["half_width"]
    assert mean is not None, "an interval without a mean is none"
    return _round(mean, 3) if half is None else f"{_round(mean, 3)} ± {_round(half, 2)}"


def _round(number: float, digits: int) -> str:
    """To significant digits, without an exponent where there need be none."""
    return f"{float(f'{number:.{digits}g}'):g}"


def plot(values: Values, path: Path) -> None:
    """For each task and mode how much better than scratch each pre-training is, in percent of scratch, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [(task, mode) for task in TASKS for mode in TASKS[task].modes if any(key[0] == task for key in values)]
    columns = min(_COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    size = (2.6 * columns, 2.6 * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, (task, mode) in zip(axes.flat[: len(shown)], shown, strict=True):
        of_scratch = [figures[TASKS[task].metric] for key, figures in values.items() if key[:3] == (task, SCRATCH, mode)]
        axis.axvline(0, color="0.6", linewidth=1)
        for place, name in enumerate(PRETRAININGS):
            differences = paired_differences(values, task, name, SCRATCH, mode)
            if len(differences) > 1:
                mean, half = (100 * number / summarise(of_scratch)[0] for number in as_interval(differences).values())  # type: ignore[operator]
                axis.errorbar(mean, place, xerr=half, fmt="o", capsize=3, color=f"C{place}")
        axis.set_title(f"{task}, {mode}\n{TASKS[task].metric}", fontsize=9)
        axis.set_yticks(range(len(PRETRAININGS)), PRETRAININGS)
        axis.grid(alpha=0.3)
    axes[0][0].invert_yaxis()
    figure.supxlabel("better than scratch by, in %", fontsize=9)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
