"""What an evaluation says: `evaluation.json` for machines and `evaluation.md` for people, in the store that holds its runs.

Over n seeds a figure has its mean and the half width of its 95 % interval, t(0.975, n - 1) s / sqrt(n), s the unbiased deviation
(Student 1908); a single seed has no interval.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student_t  # type: ignore[import-untyped]

from trainer.evaluation.protocol import Mode, TaskName
from trainer.run_history import EVALUATION
from trainer.store.base import Store


@dataclass(frozen=True)
class SeedResult:
    """Figures of one seed."""

    seed: int
    uri: str
    """Of its run."""
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """What an encoder came to in one task."""

    task: TaskName
    encoder: str
    uri: str | None
    """Where its weights came from; none for a fresh one."""
    mode: Mode
    steps: int
    global_batch: int
    clips: int
    """Held-out clips that were scored."""
    trivial: str
    """What the trivial answer is."""
    trivial_figures: Mapping[str, float]
    seeds: Sequence[SeedResult]

    @property
    def summary(self) -> dict[str, tuple[float, float | None]]:
        """Mean and half width of the interval of each figure."""
        return {name: summarise([one.figures[name] for one in self.seeds]) for name in self.seeds[0].figures}

    def as_json(self) -> dict[str, Any]:
        """Plain data; a figure that is not a number is null."""
        summary = {name: {"mean": mean, "half_width": half} for name, (mean, half) in self.summary.items()}
        return _without_nan({**asdict(self), "summary": summary})

    def as_markdown(self) -> str:
        """A heading and a table."""
        numbers = ", ".join(str(one.seed) for one in self.seeds)
        seeds = f"seeds {numbers} (± is half of their 95 % interval)" if len(self.seeds) > 1 else f"seed {numbers}"
        lines = [
            f"# {self.task}: {self.encoder}, {self.mode}",
            "",
            f"{self.steps} steps of {self.global_batch} clips, {seeds}; scored on {self.clips} held-out clips. "
            f"Weights: {self.uri or 'fresh ones'}. Trivial answer: {self.trivial}.",
            "",
            "| metric | this encoder | trivial answer |",
            "| --- | --- | --- |",
        ]
        lines += [
            f"| {name} | {_say(mean, half)} | {self.trivial_figures[name]:.4g} |" for name, (mean, half) in self.summary.items()
        ]
        return "\n".join(lines) + "\n"


def summarise(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % interval; none of one value."""
    n = len(values)
    if n == 1:
        return values[0], None
    return float(np.mean(values)), float(student_t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))


def write_evaluation(evaluation: Evaluation, store: Store) -> None:
    """Both files, over those of an earlier evaluation."""
    store.put(EVALUATION, json.dumps(evaluation.as_json(), indent=2).encode() + b"\n")
    store.put("evaluation.md", evaluation.as_markdown().encode())


def _say(mean: float, half: float | None) -> str:
    return f"{mean:.4g}" if half is None else f"{mean:.4g} ± {half:.2g}"


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value
