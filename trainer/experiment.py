"""One experiment over all its starts: the same data in the same order, the same model, the same objectives.

A run that resumes says what has changed in its config since its last start, and refuses what would have made the steps before other
ones. Packed data sets that grow are read at the version that the run began with, unless its config names another.
"""

import logging
from typing import Any

import torch.distributed as dist
import yaml

from trainer.config.changes import differences, refuse_another_experiment
from trainer.config.data import ShardsData
from trainer.config.run import RunConfig
from trainer.data.build import choose_dataset_version
from trainer.errors import RetryError
from trainer.store.base import ObjectMissingError, Store

log = logging.getLogger(__name__)


def pin_data(config: RunConfig, store: Store) -> RunConfig:
    """`config` with the version of every packed data set: that of the run's last start, or for a new run the newest."""
    data = config.data
    if not isinstance(data, ShardsData):
        return config
    earlier = (_read_last_config(store) or {}).get("data", {}).get("datasets", [])
    versions = (
        [dataset.get("version") for dataset in earlier] if len(earlier) == len(data.datasets) else [None] * len(data.datasets)
    )
    pinned = tuple(
        dataset.model_copy(update={"version": dataset.version or version or choose_dataset_version(data, dataset)})
        for dataset, version in zip(data.datasets, versions, strict=True)
    )
    return config.model_copy(update={"data": data.model_copy(update={"datasets": pinned})})


def check_same_beginning(config: RunConfig) -> None:
    """RetryError where ranks have found other versions of data, or another checkpoint to judge: they grew while the ranks started."""
    found: dict[str, Any] = {}
    if isinstance(config.data, ShardsData):
        found["data.datasets[...].version"] = [dataset.version for dataset in config.data.datasets]
    if config.warm_start:
        found["warm_start.uri"] = config.warm_start.uri
    if not found or not dist.is_initialized():
        return
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, found)
    for key, value in found.items():
        if any(other[key] != value for other in of_ranks):
            raise RetryError(
                f"ranks have found different values of {key} ({[other[key] for other in of_ranks]}), since there was a new one while they "
                "started; start the same job again, or name the one that is meant"
            )


def check_same_experiment(config: RunConfig, store: Store) -> None:
    """Say what differs from the config of the last start; ConfigError where the steps before would have been other ones."""
    before = _read_last_config(store)
    if before is None:
        return
    changes = list(differences(before, config.model_dump(mode="json")))
    refuse_another_experiment(changes, uri=store.uri)
    if changes:
        log.warning("changed since the last start of this run: %s", "; ".join(changes))


def _read_last_config(store: Store) -> dict[str, Any] | None:
    try:
        return yaml.safe_load(store.get("config.yaml"))
    except ObjectMissingError:
        return None
