"""What frozen probes of a run came to, beside the run: a folder for each task, in it the protocol and a record for each step.

    probes/depth/config.yaml            how heads of this curve are trained, with every default written out
    probes/depth/step-00005000.json     what the encoder of step 5000 came to

Names are their own, so whoever probes needs no claim on the run; an object is whole or absent, so a record that is there is done.

Left to whom: `trainer.evaluation.probing` makes them, pages and cards show them.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trainer.errors import CheckpointError
from trainer.store.base import Store

PROBES = "probes"


@dataclass(frozen=True)
class Probe:
    """What the encoder of one checkpoint came to in one task."""

    task: str
    step: int
    checkpoint: str
    """Its prefix in the run."""
    head_steps: int
    global_batch: int
    clips_asked: int
    clips: int
    """Held-out clips that were scored, of `clips_asked` at most."""
    trivial: str
    """What the trivial answer is."""
    trivial_figures: Mapping[str, float | None]
    figures: Mapping[str, float | None]
    """None is no number."""
    seconds: float
    time_s: float
    """When it was done, since 1970."""


def probe_key(task: str, step: int) -> str:
    """Where the record of `task` at `step` lies in the run."""
    return f"{PROBES}/{task}/step-{step:08d}.json"


def write_probe(store: Store, probe: Probe) -> None:
    """Keep `probe` in the run."""
    store.put(probe_key(probe.task, probe.step), json.dumps(asdict(probe), indent=2).encode() + b"\n")


def read_probes(store: Store, *, last_step: int | None = None) -> dict[str, list[Probe]]:
    """All probes of a run up to `last_step`, by task and in order of steps; CheckpointError where one cannot be read."""
    found: dict[str, list[Probe]] = {}
    for key in sorted(info.key for info in store.list(PROBES) if info.key.endswith(".json")):
        probe = _parse(store.get(key), origin=f"{store.uri}/{key}")
        if last_step is None or probe.step <= last_step:
            found.setdefault(probe.task, []).append(probe)
    return found


def without_nan(figures: Mapping[str, float]) -> dict[str, float | None]:
    """`figures` as JSON has them."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _parse(content: bytes, *, origin: str) -> Probe:
    try:
        record: dict[str, Any] = json.loads(content)
        return Probe(**record)
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{origin} was to be read as the record of a probe and is none ({error}); remove or mend it"
        ) from error
