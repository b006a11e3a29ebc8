"""From a task and an encoder to the runs that train its head: one frozen run config a seed.

An encoder is that of a run or checkpoint, with its weights, or a fresh one: of the same shape as a run's, or of a size by name. It is
given single images, so what its positions know of time is written down, as a clip no longer says it. Where two images meet, the decoder
of a CroCo run comes along, as CroCo has it; any other encoder meets in a fresh one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from models.config import CrocoConfig, EncoderConfig
from trainer.checkpoint.catalog import choose_weights, find_saves
from trainer.checkpoint.tools import CONFIG, Place, choose_checkpoint, holds_run, open_place, read_run_config
from trainer.config.changes import differences
from trainer.config.data import ClipConfig, DrivesData
from trainer.config.load import as_data_overrides, override_run_config
from trainer.config.run import RunConfig
from trainer.config.store import StoreConfig
from trainer.config.training import Weights
from trainer.errors import CheckpointError, ConfigError
from trainer.evaluation.protocol import LEARNING, PAIR_TASKS, PROTOCOLS, SCRATCH_CLIP, WARMUP_SHARE, Mode, TaskName
from trainer.store.open import open_store

SCRATCH = "scratch"
_DECIDES_WHAT_IS_JUDGED = ("warm_start", "optim.", "steps ")
_NOT_OF_ITS_SHAPE = ("encoder.drop_path ", "encoder.attention ")
"""Keys of an encoder that weights do not know of, as `differences` writes them."""


@dataclass(frozen=True)
class ChosenEncoder:
    """Which encoder is evaluated."""

    name: str
    """What reports call it."""
    config: EncoderConfig
    clip: dict[str, int]
    """Height and width of the images that it is used to."""
    uri: str | None
    """The checkpoint with its weights; none for a fresh one."""
    decoder: str | None = None
    """Size of the decoder of CroCo that its run has learnt with it; none where it has none."""
    weights: Weights = "model"


def choose_encoder(
    encoder: str,
    store: StoreConfig,
    *,
    weights: Weights | None = None,
    like: str | None = None,
    size: str | None = None,
    patch_px: int | None = None,
) -> ChosenEncoder:
    """That of the run or checkpoint `encoder`; for `scratch` a fresh one as in the run `like`, or of this size.

    Without `weights` what `odonata export` takes as well: the moving average, if there is one.
    """
    if encoder == SCRATCH:
        if weights:
            raise ConfigError(f"--encoder scratch has weights of no checkpoint, and --weights {weights} was given; leave it out")
        return _choose_fresh(store, like=like, size=size, patch_px=patch_px)
    if like or size or patch_px:
        raise ConfigError(
            f"--encoder {encoder} has a size of its own, and --like, --size or --patch-px was given for a fresh one; "
            "leave them out, or give --encoder scratch"
        )
    place = open_place(encoder, store)
    record = choose_checkpoint(place)
    # The run may go on meanwhile: what is judged is one checkpoint of it.
    checkpoint = encoder.rstrip("/") if place.prefix else f"{encoder.rstrip('/')}/{record.prefix.rstrip('/')}"
    taken = choose_weights(place.store, record, weights)
    name = f"{place.run_name}-step-{record.step}{'-ema' * (taken == 'ema')}"
    return replace(read_encoder(place, name=name, uri=checkpoint), weights=taken)


def read_encoder(place: Place, *, name: str, uri: str | None) -> ChosenEncoder:
    """The encoder of the run at `place`, called `name`, with its weights from `uri`, or fresh ones; no checkpoint is looked for."""
    config = read_run_config(place.store)
    if config is None:
        raise CheckpointError(
            f"the encoder of {place.uri} was to be evaluated and there is no {CONFIG}, which says what encoder it is; "
            "give a run's folder or s3://bucket/prefix, or put the config of its run there"
        )
    encoder = config.encoder.as_trained_on(config.token_grid).model_copy(update={"drop_path": 0.0})
    decoder = next((objective.decoder for objective in config.objectives if isinstance(objective, CrocoConfig)), None)
    return ChosenEncoder(name, encoder, _size_of(config.data.clip), uri, decoder)


def plan_evaluation(
    task: TaskName,
    chosen: ChosenEncoder,
    mode: Mode,
    *,
    seeds: Sequence[int],
    out: str,
    steps: int | None = None,
    data: Sequence[str] = (),
    overrides: Sequence[str] = (),
    store: StoreConfig | None = None,
) -> list[RunConfig]:
    """A run of `plan_run` for each seed, in a folder of its own in `out`; ConfigError also where that is the folder of a run."""
    if len(seeds) > len(set(seeds)):
        raise ConfigError(f"--seed was given {', '.join(map(str, seeds))}, and each seed is one training; give each once")
    place = open_store(out, store)
    if holds_run(place):
        raise ConfigError(
            f"{place.uri} was to hold an evaluation and holds a run; give another --out, a folder below it for example"
        )
    return [
        plan_run(task, chosen, mode, seed=seed, out=out, steps=steps, data=data, overrides=overrides, store=store)
        for seed in seeds
    ]


def plan_run(
    task: TaskName,
    chosen: ChosenEncoder,
    mode: Mode,
    *,
    seed: int,
    out: str,
    steps: int | None = None,
    data: Sequence[str] = (),
    overrides: Sequence[str] = (),
    store: StoreConfig | None = None,
) -> RunConfig:
    """The run that trains the head of `task` on an encoder; ConfigError says all that is wrong.

    `data` are keys of its data section, as `root=/data/nuscenes`, `overrides` of all of it.
    """
    protocol = PROTOCOLS[task]
    steps = steps or protocol.steps
    takes_decoder = chosen.decoder is not None and task in PAIR_TASKS
    content: dict[str, Any] = {
        "schema_version": 1,
        "seed": seed,
        "steps": steps,
        "global_batch": protocol.global_batch,
        "run": {"uri": f"{out.rstrip('/')}/seed-{seed}"},
        "data": {"kind": "nuscenes", "clip": {"frames": 1, **chosen.clip}, **protocol.data},
        "encoder": chosen.config.model_dump(),
        "objectives": [{"kind": task, **({"decoder": chosen.decoder} if takes_decoder else {})}],
        "optim": {**LEARNING[mode], "warmup_steps": round(WARMUP_SHARE * steps)},
        "checkpoint": {"every_steps": max(1, steps // 4), "keep_last": 1},
        "store": (store or StoreConfig()).model_dump(),
        "warm_start": chosen.uri
        and {"uri": chosen.uri, "parts": "encoder_and_decoder" if takes_decoder else "encoder", "weights": chosen.weights},
    }
    config = override_run_config(content, [*as_data_overrides(data), *overrides], origin=f"the head for {task}")
    _check_is_that_encoder(config, chosen)
    _check_is_scored(config)
    _check_is_same_run(config, task)
    return config


def _choose_fresh(store: StoreConfig, *, like: str | None, size: str | None, patch_px: int | None) -> ChosenEncoder:
    if like:
        if size or patch_px:
            raise ConfigError(f"--like {like} says which encoder it is, and so do --size and --patch-px; give one of them")
        place = open_place(like, store)
        return read_encoder(place, name=f"scratch-like-{place.run_name}", uri=None)
    if not size:
        raise ConfigError(
            "--encoder scratch was given and not which encoder; give --like RUN, the run that it is compared with, "
            "or --size and --patch-px"
        )
    config = EncoderConfig.model_validate({"size": size, **({"patch_px": patch_px} if patch_px else {})})
    return ChosenEncoder(f"scratch-{size}-{config.patch_px}", config, dict(SCRATCH_CLIP), None)


def _size_of(clip: ClipConfig) -> dict[str, int]:
    return {"height_px": clip.height_px, "width_px": clip.width_px}


def _check_is_scored(config: RunConfig) -> None:
    if isinstance(config.data, DrivesData) and config.data.val_split is None:
        raise ConfigError("an encoder is scored on held-out scenes and data.val_split is null; give --data val_split=NAME")


def _check_is_that_encoder(config: RunConfig, chosen: ChosenEncoder) -> None:
    changes = differences(chosen.config.model_dump(mode="json"), config.encoder.model_dump(mode="json"), "encoder.")
    refused = [change for change in changes if not change.startswith(_NOT_OF_ITS_SHAPE)]
    if chosen.uri and refused:
        raise ConfigError(
            f"the encoder of {chosen.name} has its shape, and another was asked for: {'; '.join(refused)}; leave that out"
        )


def _check_is_same_run(config: RunConfig, task: TaskName) -> None:
    """What is resumed must be the same training from the same encoder, or its figures would go by a wrong name."""
    store = open_store(config.run.uri, config.store)
    earlier = read_run_config(store)
    if earlier is None or not find_saves(store)[0]:
        return
    if [objective.kind for objective in earlier.objectives] != [task]:
        there = ", ".join(objective.kind for objective in earlier.objectives)
        raise ConfigError(f"{config.run.uri} was to be trained for {task} and holds a run for {there}; give another --out")
    changes = differences(earlier.model_dump(mode="json"), config.model_dump(mode="json"))
    refused = [change for change in changes if change.startswith(_DECIDES_WHAT_IS_JUDGED)]
    if refused:
        raise ConfigError(
            f"{config.run.uri} was to be trained and holds another training: {'; '.join(refused)}; give another --out, "
            "or what it was begun with (--steps, the checkpoint of before as --encoder)"
        )
