"""What two configs of one run differ in, and which of that would have made its steps other ones."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trainer.errors import ConfigError

_DECIDES_WHAT_IS_LEARNT = ("seed ", "global_batch ", "data.", "encoder.", "objectives")
_FREE = re.compile(
    r"(encoder\.attention|data\.(root|index_folder|workers|prefetch_batches|reads_in_flight|timeout_s|max_replaced_share"
    r"|store\..*|cache\b.*|datasets\[\d+\]\.uri)) "
)
"""Where things are and how fast they come, as `differences` writes it."""


def refuse_another_experiment(changes: Iterable[str], *, uri: str) -> None:
    """ConfigError where, with these `changes`, the run at `uri` would not have made the steps that it has made."""
    refused = [change for change in changes if change.startswith(_DECIDES_WHAT_IS_LEARNT) and not is_free(change)]
    if refused:
        raise ConfigError(
            f"{uri} was to be resumed and is another experiment: {'; '.join(refused)}; "
            "give the values of before, or another run.uri (warm_start.uri takes the weights along), which of `odonata evaluate` is --out"
        )


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
