"""What the cells of the study say: a table, differences paired by seed, a verdict for each claim, and a figure."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import write_table
from benchmarks.transfer_cells import Values
from benchmarks.transfer_protocol import PRETRAININGS, SCRATCH, TASKS, TRIVIAL, Claim
from trainer.evaluation.report import summarise

Interval = Mapping[str, float | None]
"""Mean, half_width and seeds."""
_COLUMNS = 5
"""Of pictures in a row of the figure."""


def tabulate(values: Values, trivial: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Mean and half width over seeds: task -> metric -> "pretraining, mode" or "trivial"."""
    table: dict[str, Any] = {
        task: {metric: {TRIVIAL: as_interval([value])} for metric, value in figures.items()} for task, figures in trivial.items()
    }
    for task, name, mode in dict.fromkeys(key[:3] for key in values):
        of_seeds = [figures for key, figures in values.items() if key[:3] == (task, name, mode)]
        for metric in of_seeds[0]:
            table[task][metric][f"{name}, {mode}"] = as_interval([figures[metric] for figures in of_seeds])
    return table


def as_interval(numbers: Sequence[float]) -> Interval:
    """Mean and half the width of its 95 % interval, over so many seeds."""
    mean, half = summarise(numbers)
    return {"mean": mean, "half_width": half, "seeds": len(numbers)}


def is_above_zero(interval: Interval) -> bool:
    """Whether all of it is; one seed has no interval."""
    mean, half = interval["mean"], interval["half_width"]
    return mean is not None and half is not None and mean > half


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


def compare_with_scratch(values: Values) -> dict[str, Any]:
    """Mean and half width of what each pre-training is better by: "task, pretraining, mode" -> interval, where two seeds are known."""
    paired = {
        f"{task}, {name}, {mode}": paired_differences(values, task, name, SCRATCH, mode)
        for task, name in itertools.product(TASKS, PRETRAININGS)
        for mode in TASKS[task].modes
    }
    return {cell: as_interval(differences) for cell, differences in paired.items() if len(differences) > 1}


def judge(claim: Claim, values: Values) -> dict[str, Any]:
    """Whether the interval of the paired difference lies above zero, frozen, in one of the claim's tasks; null before it is known."""
    paired = {task: paired_differences(values, task, claim.better, claim.worse, "frozen") for task in claim.tasks}
    found = {task: as_interval(differences) for task, differences in paired.items() if len(differences) > 1}
    holds = any(is_above_zero(interval) for interval in found.values()) if found else None
    return {"text": claim.text, "holds": holds, "differences": found}


def as_markdown(table: Mapping[str, Any], differences: Mapping[str, Any], claims: Sequence[Mapping[str, Any]]) -> str:
    """A table of the metric that each task is judged by, and the verdicts; bold is what is better than scratch, seed by seed."""
    names = [SCRATCH, *_known_pretrainings(table)]
    rows = []
    for task, mode in _known_modes(table):
        metric, arrow = TASKS[task].metric, "↓" if TASKS[task].lower_is_better else "↑"
        said = [_say(table[task][metric].get(f"{name}, {mode}"), differences.get(f"{task}, {name}, {mode}")) for name in names]
        rows.append((f"{task}, {mode}: {metric} {arrow}", _say(table[task][metric][TRIVIAL]), *said))
    verdicts = {True: "holds", False: "does not hold", None: "not known yet"}
    return "\n".join(
        [
            *write_table(("", TRIVIAL, *names), rows),
            "",
            f"Means over {_say_seeds(table)}, with 95 % intervals. Bold: better than scratch, by a difference taken seed by seed whose own "
            "95 % interval lies above zero.",
            "",
            *(f"- {claim['text']}: {verdicts[claim['holds']]}{_say_differences(claim)}" for claim in claims),
            "",
        ]
    )


def _known_modes(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Tasks, each in all of its modes."""
    return [(task, mode) for task in table for mode in TASKS[task].modes]


def _known_pretrainings(table: Mapping[str, Any]) -> list[str]:
    cells = [cell for task, of_task in table.items() for cell in of_task[TASKS[task].metric]]
    return [name for name in PRETRAININGS if any(cell.startswith(f"{name}, ") for cell in cells)]


def _say_seeds(table: Mapping[str, Any]) -> str:
    """`5 seeds`, or `2 to 3 seeds` while some have not ended."""
    intervals = [interval for task, of_task in table.items() for interval in of_task[TASKS[task].metric].items()]
    counts = [interval["seeds"] for name, interval in intervals if name != TRIVIAL]
    return f"{min(counts)} seeds" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)} seeds"


def _say_differences(claim: Mapping[str, Any]) -> str:
    """By how much, in the metric of each task; nothing before it is known."""
    said = [f"{task}: {TASKS[task].metric} {_say_lead(interval)}" for task, interval in claim["differences"].items()]
    return f" ({', '.join(said)})" if said else ""


def _say_lead(interval: Interval) -> str:
    mean = interval["mean"]
    assert mean is not None, "a difference without a mean is none"
    return f"{'worse' if mean < 0 else 'better'} by {_say({**interval, 'mean': abs(mean)})}"


def _say(interval: Interval | None, lead: Interval | None = None) -> str:
    """Bold if the lead is above zero."""
    if interval is None:
        return "-"
    mean, half = interval["mean"], interval["half_width"]
    assert mean is not None, "an interval without a mean is none"
    said = _round(mean, 3) if half is None else f"{_round(mean, 3)} ± {_round(half, 2)}"
    return f"**{said}**" if lead and is_above_zero(lead) else said


def _round(number: float, digits: int) -> str:
    """To significant digits, without an exponent where there need be none."""
    return f"{float(f'{number:.{digits}g}'):g}"


def plot(table: Mapping[str, Any], differences: Mapping[str, Any], path: Path) -> None:
    """For each task and mode how much better than scratch each pre-training is, in the metric's own unit, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown, names = _known_modes(table), _known_pretrainings(table)
    columns = min(_COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    size = (2.6 * columns, 2.6 * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, (task, mode) in zip(axes.flat[: len(shown)], shown, strict=True):
        axis.axvline(0, color="0.6", linewidth=1)
        for place, name in enumerate(names):
            if interval := differences.get(f"{task}, {name}, {mode}"):
                axis.errorbar(interval["mean"], place, xerr=interval["half_width"], fmt="o", capsize=3, color=f"C{place}")
        axis.set_title(f"{task}, {mode}\n{TASKS[task].metric}", fontsize=9)
        axis.set_yticks(range(len(names)), names)
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
    axes[0][0].invert_yaxis()
    figure.supxlabel("better than scratch by, in the unit of each metric", fontsize=9)
    figure.savefig(path, dpi=120)
