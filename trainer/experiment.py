"""One experiment over all its starts: the same data in the same order, the same model, the same objectives.

A run that resumes says what has changed in its config since its last start, and refuses what would have made the steps before other
ones. Packed data sets that grow are read at the version that the run began with, unless its config names another.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
import yaml

from trainer.config.data import ShardsData
from trainer.config.run import RunConfig
from trainer.data.build import choose_dataset_version
from trainer.errors import ConfigError, RetryError
from trainer.store.base import ObjectMissingError, Store

_DECIDES_WHAT_IS_LEARNT = ("seed ", "global_batch ", "data.", "encoder.", "objectives")
_FREE = re.compile(
    r"(encoder\.attention|data\.(root|index_folder|workers|prefetch_batches|reads_in_flight|timeout_s|max_replaced_share"
    r"|store\..*|cache\b.*|datasets\[\d+\]\.uri)) "
)
"""Where things are and how fast they come, as `differences` writes it."""

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


def check_same_data(config: RunConfig) -> None:
    """RetryError where ranks have found other versions, because the data set grew while they started."""
    if not isinstance(config.data, ShardsData) or not dist.is_initialized():
        return
    versions = [dataset.version for dataset in config.data.datasets]
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, versions)
    if any(other != versions for other in of_ranks):
        raise RetryError(
            f"ranks have found different versions of their data ({of_ranks}), which has grown while they started; "
            "start the same job again, or name data.datasets[...].version"
        )


def check_same_experiment(config: RunConfig, store: Store) -> None:
    """Say what differs from the config of the last start; ConfigError where the steps before would have been other ones."""
    before = _read_last_config(store)
    if before is None:
        return
    changes = list(differences(before, config.model_dump(mode="json")))
    refused = [change for change in changes if change.startswith(_DECIDES_WHAT_IS_LEARNT) and not is_free(change)]
    if refused:
        raise ConfigError(
            f"{store.uri} was to be resumed and is another experiment: {'; '.join(refused)}; "
            "give the values of before, or another run.uri (warm_start.uri takes the weights along)"
        )
    if changes:
        log.warning("changed since the last start of this run: %s", "; ".join(changes))


def is_free(change: str) -> bool:
    """Whether what `differences` wrote is only where things are, or how fast they come."""
    return bool(_FREE.match(change))


def differences(before: Mapping[str, Any], now: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """`data.clip.frames 4 -> 8` for every key of which both say something else."""
    for key, value in now.items():
        if key not in before or before[key] == value:
            continue
        if isinstance(value, Mapping) and isinstance(before[key], Mapping):
            yield from differences(before[key], value, f"{place}{key}.")
        elif _are_sections(value) and _are_sections(before[key]) and len(value) == len(before[key]):
            for number, (earlier, later) in enumerate(zip(before[key], value, strict=True)):
                yield from differences(earlier, later, f"{place}{key}[{number}].")
        else:
            yield f"{place}{key} {before[key]} -> {value}"


def _are_sections(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, Mapping) for one in value)


def _read_last_config(store: Store) -> dict[str, Any] | None:
    try:
        return yaml.safe_load(store.get("config.yaml"))
    except ObjectMissingError:
        return None
