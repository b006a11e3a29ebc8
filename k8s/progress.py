"""How far a run is: from the exporter of its node 0 while it trains, else from its record in the store.

The exporter knows the step that has just ended, and is asked by way of the API server, so neither the store's credentials nor a way to it
are needed. The store remembers what is left when the pods are gone; on S3 its journal ends with the newest checkpoint.

Left to whom: what the metrics mean is the list of `monitoring.metrics`, the record `trainer.observe.record`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from k8s.client import Cluster, Manifest
from k8s.runs import is_ready, read_node_rank
from trainer.checkpoint.catalog import find_saves
from trainer.errors import OdonataError
from trainer.observe.history import STARTS, read_entries
from trainer.store.base import Store


@dataclass(frozen=True)
class Progress:
    """What a run has come to; None where nobody told."""

    step: int
    steps: int
    loss: float | None
    clips_per_s: float | None
    mfu: float | None
    """Share of the devices' arithmetic; 0 to 1."""
    saved_step: int | None
    """Step of the newest checkpoint."""
    saved_s: float | None
    """When that was committed, in seconds since 1970."""
    starts: int | None
    """How often the run was started; one more than its restarts."""
    seen_s: float
    """When this was so, in seconds since 1970."""


def read_live(cluster: Cluster, pods: Sequence[Manifest], port: int) -> Progress | None:
    """What the exporter of node 0 says; None where there is none, or who asks may not ask it."""
    first = next((pod for pod in pods if read_node_rank(pod) == 0 and is_ready(pod)), None)
    if first is None:
        return None
    try:
        return parse_metrics(cluster.fetch(first["metadata"]["name"], port, "metrics"))
    except OdonataError:  # a network policy, or a role without pods/proxy: the store knows it, too
        return None


def parse_metrics(text: str) -> Progress | None:
    """Progress from a page of /metrics; None before the first step."""
    from prometheus_client.parser import text_string_to_metric_families

    values = {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}
    if "odonata_step" not in values:
        return None
    return Progress(
        step=int(values["odonata_step"]),
        steps=int(values["odonata_steps"]),
        loss=values.get("odonata_loss"),
        clips_per_s=values.get("odonata_clips_per_second"),
        mfu=values.get("odonata_mfu_ratio"),
        saved_step=int(values["odonata_step"] - values["odonata_checkpoint_lag_steps"]) or None,
        saved_s=values.get("odonata_last_checkpoint_timestamp_seconds"),
        starts=int(values["odonata_starts"]) if "odonata_starts" in values else None,
        seen_s=values.get("odonata_last_step_timestamp_seconds", time.time()),
    )


def read_stored(store: Store) -> Progress | None:
    """What the record of a run says; None before there is one."""
    starts = [entry for entry in read_entries(store, STARTS) if entry.get("event") == "start"]
    steps = read_entries(store, "steps.jsonl")
    if not steps:
        return None
    last, saves = steps[-1], find_saves(store)[0]
    saved_s = {entry["step"]: entry["time_s"] for entry in read_entries(store, "checkpoints.jsonl") if "error" not in entry}
    saved_step = saves[0].step if saves else None
    return Progress(
        step=last["step"],
        steps=last["steps"],
        loss=last["loss"],
        clips_per_s=last["clips"] / last["step_seconds"] if last["step_seconds"] else None,
        mfu=None,
        saved_step=saved_step,
        saved_s=None if saved_step is None else saved_s.get(saved_step),
        starts=len(starts),
        seen_s=last["time_s"],
    )
