"""A model card from a run's own record: `odonata card`.

Markdown with a YAML head, as Hugging Face shows it (Mitchell et al. 2019 for what belongs in one). Everything in it is read, nothing is
typed in: config.yaml, environment.json, steps.jsonl, evaluations.jsonl, import.json and the manifest of the checkpoint, each up to the
step of that checkpoint, the newest probes, and results of `odonata evaluate`. What was not recorded is not there. Paths are cut to their
last part, since a card is made to be published.

Left to whom: reading the record is `trainer.run_history`'s. The licence is the owner's to say, and depends on that of the data.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import yaml

from models.config import TaskConfig
from trainer.checkpoint.catalog import FOLDER
from trainer.checkpoint.record import Record
from trainer.checkpoint.tools import Place
from trainer.config.data import ShardsData
from trainer.observe.probes import Probe, read_probes
from trainer.run_history import RunHistory, is_of_run, read_run

_LAST_STEPS = 100
_PAPERS = {
    "croco": "[CroCo](https://arxiv.org/abs/2211.10408)",
    "simipu": "[SimIPU](https://arxiv.org/abs/2112.04680)",
    "mim4d": "[MIM4D](https://arxiv.org/abs/2403.08760)",
}
_POSITIONS = {"rope": "rotary", "sincos": "sin-cos", "learned": "learned"}
_USE = """\
The encoder gives one vector for each patch of an image or clip of driving cameras, for heads of depth, flow, pose, detection, bird's-eye
view or maps that are trained on top of it. `odonata export` writes it for plain PyTorch, ONNX, timm and transformers; docs/export.md says
how to load each. Images are RGB, normalised with ImageNet's mean and deviation."""
_LIMITS = """\
- It has seen the cameras, places, weather and times of its training data. Test it on yours before you rely on it, and never use it
  alone where people can be hurt.
- What its training data may be used for bounds what this model may be used for."""


def write_card(
    place: Place, *, step: int | None = None, licence: str | None = None, evaluations: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The card of the newest checkpoint at `place`, or that of `step`, with results of evaluations.

    CheckpointError where there is no whole checkpoint, or no config beside it.
    """
    run = read_run(place, step)
    sections = [
        _head(run, licence),
        f"# {run.name}\n\n{_introduce(run)}",
        f"## Encoder\n\n{_table(describe_encoder(run))}",
        "" if run.origin else f"## Training\n\n{_table(describe_training(run))}",
        _figures("Losses", f"mean of the last {min(_LAST_STEPS, len(run.steps))} steps", _last_losses(run)),
        _figures("Held-out clips", "pretext task", run.held_out),
        *(_probe(probes[-1]) for probes in read_probes(place.store, last_step=run.step).values()),
        *(_evaluation(run, one) for one in evaluations),
        f"## Hardware and software\n\n{_table(describe_environment(run))}" if run.environment else "",
        f"## Intended use\n\n{_USE}",
        f"## Limits\n\n- {_limit(run)}\n{_LIMITS}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(run: RunHistory, licence: str | None) -> str:
    fields: dict[str, Any] = {"license": licence} if licence else {}
    fields |= {
        "library_name": "odonata",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["vision-transformer", "video", "autonomous-driving", *_learnt(run)],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False).strip()}\n---"


def _learnt(run: RunHistory) -> list[str]:
    """Tags of what it was trained for."""
    if run.origin:
        return []
    return [*([] if _tasks_of(run) else ["self-supervised"]), *(objective.kind for objective in run.config.objectives)]


def _tasks_of(run: RunHistory) -> list[str]:
    """Objectives with ground truth."""
    return [objective.kind for objective in run.config.objectives if isinstance(objective, TaskConfig)]


def _limit(run: RunHistory) -> str:
    """What its training does not say of it."""
    if run.origin:
        return "What it was trained on, and for what, is said by who published it."
    tasks = _tasks_of(run)
    how = f"with the ground truth of {', '.join(tasks)}" if tasks else "without labels and knows no classes"
    return f"It was trained {how}; how good it is for a task is what an evaluation of that task says."


def _introduce(run: RunHistory) -> str:
    encoder, clip = run.config.encoder, run.config.data.clip
    what = (
        f"A ViT-{encoder.size}/{encoder.patch_px} for clips of {clip.frames} frames of {clip.width_px} x {clip.height_px} pixels"
    )
    if run.origin:
        origin = run.origin
        changes = "".join(f"\n- {change}" for change in origin["changes"])
        return (
            f"{what}, not trained here: its weights are those of `{origin['file']}` ({origin['layout']}, SHA-256 "
            f"`{origin['sha256']}`), taken over with\n{changes or chr(10) + '- no change'}"
        )
    learnt = ", ".join(_PAPERS.get(objective.kind, objective.kind) for objective in run.config.objectives)
    return f"{what}, trained with {learnt} on {_describe_data(run)}."


def _describe_data(run: RunHistory) -> str:
    """The data by kind and name, and what it says of itself."""
    data, figures = run.config.data, run.environment.get("data", {})
    if isinstance(data, ShardsData):
        names = ", ".join(f"{_last(dataset.uri)} (version {dataset.version})" for dataset in data.datasets)
    else:
        version = figures.get("version")
        names = f"{_last(str(data.root))}{f' ({version})' if version else ''}"
    samples = figures.get("samples")
    return f"{data.kind} data, {names}{f', {samples:,} samples' if samples else ''}"


def describe_encoder(run: RunHistory) -> Iterator[tuple[str, str]]:
    """Rows on the encoder."""
    encoder, shape = run.config.encoder, run.config.encoder.shape
    yield "blocks, width, heads", f"{shape.depth}, {shape.width}, {shape.heads}"
    yield "patch", f"{encoder.patch_px} x {encoder.patch_px} pixels of {encoder.tubelet_frames} frames"
    yield "positions", _POSITIONS[encoder.positions] + (", of time too" if encoder.knows_time(run.config.token_grid) else "")
    yield "registers", str(encoder.registers)
    if run.record:
        weights, averages = (_count_elements(run.record, f"{kind}.encoder.") for kind in ("model", "ema"))
        yield "parameters", f"{weights:,}" + (", with a moving average" if averages else "")


def describe_training(run: RunHistory) -> Iterator[tuple[str, str]]:
    """Rows on what it learnt from, and for how long."""
    config, steps = run.config, run.steps
    yield "step", f"{run.step:,} of {config.steps:,}"
    yield "objectives", ", ".join(f"{one.kind} (weight {one.weight:g})" for one in config.objectives)
    yield "data", _describe_data(run)
    if steps:
        yield "clips seen", f"{sum(step['clips'] for step in steps):,}, {config.global_batch:,} a step"
        yield "tokens seen", f"{sum(step['tokens'] for step in steps):,}"
        seconds, waited = (sum(step[name] for step in steps) for name in ("step_seconds", "data_seconds"))
        yield "time in steps", f"{_say_hours(seconds)}, {waited / seconds:.0%} of it waiting for data"
        yield "skipped steps, replaced clips", f"{steps[-1]['skipped_steps']}, {steps[-1]['replaced_clips']}"
    optim = config.optim
    yield "optimiser", f"AdamW, betas {optim.betas}, weight decay {optim.weight_decay:g}"
    yield "learning rate", f"{optim.lr:g}, {optim.warmup_steps:,} steps of warm-up, then a cosine to {optim.min_lr:g}"
    if config.warm_start:
        yield "began with", f"{config.warm_start.parts} of {_without_folders(config.warm_start.uri)}"
    yield "seed", str(config.seed)
    if run.record:
        yield "checkpoint", f"{run.record.created}, by {run.record.engine} on {run.record.world_size} ranks"


def describe_environment(run: RunHistory) -> Iterator[tuple[str, str]]:
    """Rows on where it ran; there is an environment."""
    environment = run.environment
    hardware, launch = environment["hardware"], environment["launch"]
    gpus = [gpu["name"] for gpu in hardware["gpus"]]
    yield "ranks", f"{launch['world_size']}, {launch['engine']}, {launch['precision']}"
    yield "GPUs of a node", ", ".join(f"{gpus.count(name)} x {name}" for name in sorted(set(gpus))) or "none"
    yield "CPU of a node", f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_bytes'] / 2**30:.0f} GiB"
    yield "versions", ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    revision = environment["revision"]
    if revision:
        yield "revision", revision["commit"] + (", with changes" if revision["changed"] else "")


def _last_losses(run: RunHistory) -> dict[str, float]:
    """Means over the last steps that moved a weight."""
    last = [step for step in run.steps[-_LAST_STEPS:] if not step["skipped"]]
    names = {name for step in last for name in step["parts"]}
    parts = {name: fmean(step["parts"][name] for step in last if name in step["parts"]) for name in sorted(names)}
    return {"loss": fmean(step["loss"] for step in last), **parts} if last else {}


def title_evaluation(run: RunHistory, result: Mapping[str, Any]) -> str:
    """Task and mode, and whose encoder it is where it is not the run's."""
    of_whom = "" if is_of_run(result, run.name) else f", of another encoder: {result['encoder']}"
    return f"{result['task']}, {result['mode']}{of_whom}"


def describe_evaluation(result: Mapping[str, Any]) -> str:
    """How one result of `odonata evaluate` came about."""
    seeds = len(result["seeds"])
    return (
        f"{result['steps']} steps of {result['global_batch']} clips on {result['encoder']}, {seeds} seed{'s' * (seeds != 1)}, "
        f"scored on {result['clips']} held-out clips. Trivial answer: {result['trivial']}."
    )


def compare_evaluation(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Metric, figure of this encoder and of the trivial answer."""
    for name, figure in result["summary"].items():
        yield name, f"{say(figure['mean'])}{_say_half(figure['half_width'])}", say(result["trivial_figures"][name])


def _evaluation(run: RunHistory, result: Mapping[str, Any]) -> str:
    return "\n".join(
        [
            f"## Evaluation: {title_evaluation(run, result)}",
            "",
            describe_evaluation(result),
            "",
            "| metric | this encoder | trivial answer |",
            "| --- | --- | --- |",
            *(f"| {' | '.join(row)} |" for row in compare_evaluation(result)),
        ]
    )


def _probe(newest: Probe) -> str:
    of_what = f"head of {newest.head_steps} steps on the frozen encoder, {newest.clips} held-out clips"
    return _figures(f"Probe: {newest.task}, after step {newest.step:,}", of_what, newest.figures)


def _figures(heading: str, of_what: str, figures: Mapping[str, float | None]) -> str:
    if not figures:
        return ""
    rows = [f"| {name} | {say(value)} |" for name, value in figures.items()]
    return "\n".join([f"## {heading}", "", f"| {of_what} | |", "| --- | --- |", *rows])


def _table(rows: Iterator[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def _count_elements(record: Record, root: str) -> int:
    return sum(math.prod(tensor.shape) for name, tensor in record.tensors.items() if name.startswith(root))


def _without_folders(uri: str) -> str:
    """The name of a run, and that of the checkpoint in it where one is meant."""
    run, _, checkpoint = uri.rstrip("/").rpartition(f"/{FOLDER}/")
    return f"{_last(run)}, {checkpoint}" if checkpoint.startswith("step-") else _last(uri)


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def say(value: float | None) -> str:
    """A figure in four digits."""
    return "not a number" if value is None else f"{value:.4g}"


def _say_half(half_width: float | None) -> str:
    return "" if half_width is None else f" ± {half_width:.2g}"


def _say_hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
