"""One page of HTML of a run: `odonata view`.

What the run has recorded, up to its last step whether or not a checkpoint has followed: curves of steps.jsonl and
evaluations.jsonl, of probes beside the loss, its speed, incidents, checkpoints, the newest contact sheet of each objective, results of
`odonata evaluate` and the tables of its model card. Pictures and curves lie in the page itself, there is no script in it, and its content
policy forbids the browser to fetch anything: it opens offline and may be sent around. What was not recorded is not there. Every name is
escaped.

Left to whom: reading the record is `trainer.run_history`'s, how its tables say it the card's.
"""

import base64
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from trainer.card import (
    compare_evaluation,
    describe_encoder,
    describe_environment,
    describe_evaluation,
    describe_training,
    say,
    title_evaluation,
)
from trainer.checkpoint.tools import Checkpoint, Place, list_checkpoints
from trainer.observe.history import read_entries
from trainer.observe.probes import Probe, read_probes
from trainer.run_history import RunHistory, figures_of, read_history, read_json
from trainer.store.base import Store
from trainer.view.curves import COLOURS, Curve, Kind, draw_curves, read_curve

_PICTURE = re.compile(r"pictures/step-(\d+)-(.+)\.png")
_SHOWN_INCIDENTS = 50


@dataclass(frozen=True)
class Plot:
    """What one name came to, in training and on held-out clips."""

    title: str
    curves: Sequence[Curve]

    @property
    def svg(self) -> Markup:
        """The drawing; its few words are ours."""
        return Markup(draw_curves(self.curves))

    @property
    def legend(self) -> list[tuple[str, str, str]]:
        """Colour, kind and last value of each curve."""
        return [(COLOURS[curve.kind], curve.kind, say(curve.last)) for curve in self.curves]


@dataclass(frozen=True)
class Picture:
    """A contact sheet inside the page."""

    objective: str
    step: int
    uri: str


def write_page(place: Place, *, evaluations: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page of the run at `place`, with results of evaluations.

    CheckpointError where there is no run, or no config of one.
    """
    checkpoints = list(list_checkpoints(Place(place.store)))
    run = read_history(place, next((one.record for one in checkpoints if one.record), None))
    probes = read_probes(place.store)
    return render(
        "page.html",
        name=run.name,
        head=dict(_head(run)),
        steps=list(_plot_steps(run)),
        objectives=_plot_objectives(run),
        probes={task: [*_plot_loss(run), *_plot_probes(found)] for task, found in probes.items()},
        speed=list(_plot_speed(run)),
        pictures=list(_newest_pictures(place.store)),
        evaluations=[_evaluation(run, one) for one in evaluations],
        shown_incidents=_SHOWN_INCIDENTS,
        incidents=list(_incidents(place.store)),
        checkpoints=[_checkpoint(one) for one in checkpoints],
        tables=dict(_tables(run)),
    )


def render(template: str, **values: Any) -> str:
    """The page that `template` makes of `values`; every one of them is escaped."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template(template).render(**values)


def inline_picture(content: bytes, kind: str = "png") -> str:
    """An image file as an address inside a page."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _head(run: RunHistory) -> Iterator[tuple[str, str]]:
    if run.origin:
        yield "weights of", run.origin["file"]
    else:
        yield "step", f"{run.step:,} of {run.config.steps:,}"
        yield "objectives", ", ".join(one.kind for one in run.config.objectives)
    yield "encoder", f"ViT-{run.config.encoder.size}/{run.config.encoder.patch_px}"
    if run.environment:
        yield "ranks", dict(describe_environment(run))["ranks"]
    if run.steps:
        yield "first step", _say_time(run.steps[0]["time_s"])
        yield "last step", _say_time(run.steps[-1]["time_s"])


def _plot_steps(run: RunHistory) -> Iterator[Plot]:
    for column in ("loss", "learning_rate", "grad_norm") if run.steps else ():
        yield _plot_training(run, column.replace("_", " "), [step[column] for step in run.steps])


def _plot_objectives(run: RunHistory) -> dict[str, list[Plot]]:
    """A plot for each name `objective/part`, by objective: parts have units of their own, so no two share axes."""
    lines: dict[Kind, Sequence[Mapping[str, Any]]] = {"training": run.steps, "held-out": run.evaluations}
    figures = {"training": [step["parts"] for step in run.steps], "held-out": [figures_of(line) for line in run.evaluations]}
    plots: dict[str, list[Plot]] = {}
    for name in dict.fromkeys(name for entries in figures.values() for entry in entries for name in entry):
        curves = [
            read_curve(kind, lines[kind], [entry.get(name) for entry in figures[kind]])
            for kind in lines
            if any(name in entry for entry in figures[kind])
        ]
        objective, _, part = name.partition("/")
        plots.setdefault(objective, []).append(Plot(part.replace("_", " "), curves))
    return plots


def _plot_loss(run: RunHistory) -> Iterator[Plot]:
    """The pretext task's, to stand beside what it is good for."""
    if run.steps:
        yield _plot_training(run, "loss of the run", [step["loss"] for step in run.steps])


def _plot_probes(probes: Sequence[Probe]) -> Iterator[Plot]:
    """A plot for each figure of a task, with the trivial answer to the same clips."""
    lines = [{"step": probe.step} for probe in probes]
    for name in probes[-1].figures:
        found = read_curve("probe", lines, [probe.figures.get(name) for probe in probes])
        trivial = read_curve("trivial answer", lines, [probe.trivial_figures.get(name) for probe in probes])
        yield Plot(name, [found, trivial])


def _plot_speed(run: RunHistory) -> Iterator[Plot]:
    steps = run.steps
    if not steps:
        return
    seconds = [step["step_seconds"] or math.nan for step in steps]
    waiting = [step["data_seconds"] / taken for step, taken in zip(steps, seconds, strict=True)]
    yield _plot_training(run, "clips a second", [step["clips"] / taken for step, taken in zip(steps, seconds, strict=True)])
    yield _plot_training(run, "seconds a step", seconds)
    yield _plot_training(run, "share of it spent waiting for data", waiting)
    yield _plot_training(run, "GiB of rank 0", [step["memory_bytes"] / 2**30 for step in steps])


def _plot_training(run: RunHistory, title: str, values: Sequence[float | None]) -> Plot:
    return Plot(title, [read_curve("training", run.steps, values)])


def _newest_pictures(store: Store) -> Iterator[Picture]:
    """The last contact sheet of each objective."""
    found = (_PICTURE.fullmatch(info.key) for info in store.list("pictures"))
    newest = {match[2]: match for match in sorted(filter(None, found), key=lambda match: int(match[1]))}
    for objective, match in sorted(newest.items()):
        yield Picture(objective, int(match[1]), inline_picture(store.get(match[0])))


def _incidents(store: Store) -> Iterator[tuple[str, str]]:
    """Step and sentence: the last steps that were skipped, and saves that failed."""
    for key in sorted(info.key for info in store.list("incidents"))[-_SHOWN_INCIDENTS:]:
        incident = read_json(store, key)
        clips = ", ".join(incident["clips"])
        yield f"{incident['step']:,}", f"skipped: loss {incident['loss']} on rank {incident['rank']}, of the clips {clips}"
    for line in read_entries(store, "checkpoints.jsonl"):
        if "error" in line:
            yield f"{line['step']:,}", f"not saved: {line['error']}"


def _checkpoint(found: Checkpoint) -> tuple[str, ...]:
    record = found.record
    engine, ranks = (record.engine, str(record.world_size)) if record else ("", "")
    state = f"{found.state}: {found.reason}" if found.reason else found.state
    return f"{found.save.step:,}", found.created or "", f"{found.bytes / 2**20:,.1f} MiB", engine, ranks, state


def _evaluation(run: RunHistory, result: Mapping[str, Any]) -> tuple[str, str, Iterable[tuple[str, ...]]]:
    return title_evaluation(run, result), describe_evaluation(result), compare_evaluation(result)


def _tables(run: RunHistory) -> Iterator[tuple[str, dict[str, str]]]:
    """Those of the model card."""
    if not run.origin:
        yield "Training", dict(describe_training(run))
    yield "Encoder", dict(describe_encoder(run))
    if run.environment:
        yield "Hardware and software", dict(describe_environment(run))


def _say_time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
