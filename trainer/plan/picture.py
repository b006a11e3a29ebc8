"""The plan as a picture: memory of a rank by category, and what a clip takes of GPUs by what bounds it, over the numbers of GPUs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.plan.memory import USABLE_SHARE
from trainer.plan.run import Row

_PARTS = {"compute_s": "matrix products", "memory_s": "HBM traffic", "nvlink_s": "NVLink", "network_s": "network"}


def draw_plan(rows: Sequence[Row], path: Path) -> None:
    """Write the picture to `path`, whose ending says the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_memory(left, rows)
    _draw_seconds(right, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw_memory(axes: Any, rows: Sequence[Row]) -> None:
    parts = {name: [vars(row.option.memory)[name] / 1e9 for row in rows] for name in vars(rows[0].option.memory)}
    _stack(axes, rows, parts)
    memory_gb = rows[0].gpu.memory_bytes / 1e9
    axes.axhline(memory_gb, color="black", linewidth=1)
    axes.axhline(USABLE_SHARE * memory_gb, color="black", linewidth=1, linestyle="--")
    axes.set(title=f"memory of a rank at its peak; {rows[0].gpu.device_name} has {memory_gb:.0f} GB", ylabel="GB")
    axes.legend(fontsize="small")


def _draw_seconds(axes: Any, rows: Sequence[Row]) -> None:
    scale = np.array([1e3 * row.gpus / row.clips for row in rows])
    parts = {label: list(scale * [getattr(row.option.duration, name) for row in rows]) for name, label in _PARTS.items()}
    _stack(axes, rows, parts)
    best = scale * [row.option.duration.best_s for row in rows]
    axes.plot(np.arange(len(rows)), best, "k_", markersize=24, label="best: wire hidden")
    axes.set(title="GPU milliseconds of a clip; their sum is the worst", ylabel="ms")
    axes.legend(fontsize="small")


def _stack(axes: Any, rows: Sequence[Row], parts: dict[str, list[float]]) -> None:
    places, bottom = np.arange(len(rows)), np.zeros(len(rows))
    for label, values in parts.items():
        axes.bar(places, values, bottom=bottom, width=0.6, label=label)
        bottom += np.array(values)
    axes.set_xticks(places, [f"{row.gpus:,} GPUs\n{row.option.setup.name}" for row in rows])
