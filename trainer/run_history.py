"""What a run has left behind, read back: its config, its journals, where it ran, results of `odonata evaluate`.

Nothing in it is typed in: all is what `trainer.observe.record` and `odonata evaluate` wrote. A run that is still going on can be read;
what was not recorded is empty.

Left to whom: lines of journals are `observe.history`'s, probes `observe.probes`', checkpoints `checkpoint.tools`'; how all this is said
is the card's and the page's.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.checkpoint.record import Record
from trainer.checkpoint.tools import CONFIG, Place, choose_checkpoint, read_run_config
from trainer.config.run import RunConfig
from trainer.errors import CheckpointError
from trainer.importing import IMPORT
from trainer.observe.history import read_entries
from trainer.store.base import ObjectMissingError, Store

EVALUATION = "evaluation.json"
_OF_AN_EVALUATION = (
    "task",
    "encoder",
    "mode",
    "steps",
    "global_batch",
    "clips",
    "trivial",
    "trivial_figures",
    "seeds",
    "summary",
)


@dataclass(frozen=True)
class RunHistory:
    """What a run has left behind, up to one of its checkpoints or up to now."""

    name: str
    record: Record | None
    """Of the newest checkpoint that belongs to it, where there is one."""
    config: RunConfig
    environment: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    """Of the pretext task, on held-out clips."""
    origin: Mapping[str, Any]
    """Where imported weights come from."""

    @property
    def step(self) -> int:
        """How far it has come."""
        return max(self.steps[-1]["step"] if self.steps else 0, self.record.step if self.record else 0)

    @property
    def held_out(self) -> dict[str, Any]:
        """Figures of the last evaluation of the pretext task."""
        return figures_of(self.evaluations[-1]) if self.evaluations else {}


def read_evaluation(store: Store) -> dict[str, Any]:
    """What `odonata evaluate` wrote to `store`; CheckpointError where it wrote nothing that can be read."""
    try:
        result = json.loads(store.get(EVALUATION))
        return {name: result[name] for name in _OF_AN_EVALUATION}
    except (ObjectMissingError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"an evaluation was to be read and {store.uri} holds no {EVALUATION} that can be read ({error}); "
            "give the --out of an `odonata evaluate`"
        ) from error


def is_of_run(evaluation: Mapping[str, Any], run_name: str) -> bool:
    """Whether an evaluation is of a checkpoint of the run of this name, by what `odonata evaluate` calls encoders."""
    return str(evaluation["encoder"]).startswith(f"{run_name}-step-")


def read_run(place: Place, step: int | None) -> RunHistory:
    """The record of the run at `place` up to its newest whole checkpoint, or that of `step`."""
    record = choose_checkpoint(place, step)
    return read_history(place, record, last_step=record.step)


def read_history(place: Place, record: Record | None, *, last_step: int = sys.maxsize) -> RunHistory:
    """The run at `place` up to `last_step`, with the `record` of the checkpoint that belongs to it; CheckpointError without a config."""
    store = place.store
    config = read_run_config(store)
    if config is None:
        raise CheckpointError(f"the record of {store.uri} was to be read and there is no {CONFIG}; put the one of its run there")
    return RunHistory(
        name=place.run_name,
        record=record,
        config=config,
        environment=read_json(store, "environment.json"),
        steps=[entry for entry in read_entries(store, "steps.jsonl") if entry["step"] <= last_step],
        evaluations=[entry for entry in read_entries(store, "evaluations.jsonl") if entry["step"] <= last_step],
        origin=read_json(store, IMPORT),
    )


def figures_of(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a line of evaluations.jsonl."""
    return {name: value for name, value in evaluation.items() if name not in ("step", "time_s", "seconds")}


def read_json(store: Store, key: str) -> dict[str, Any]:
    """The object `key` of a run's record, empty where there is none; CheckpointError where it cannot be read."""
    try:
        return dict(json.loads(store.get(key)))
    except ObjectMissingError:
        return {}
    except ValueError as error:
        raise CheckpointError(
            f"the record of a run was to be read and {store.uri}/{key} is not JSON ({error}); remove or mend it"
        ) from error
