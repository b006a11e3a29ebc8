"""A journal: a file with one JSON object a line, appended to step by step and cut back to the step a resume starts from.

A line is handed to the system as soon as it is written, so `kill -9` loses none that was finished; `sync` brings them to the
disk. JSON knows no NaN and no infinity, so numbers that are not finite are written as null. Cutting back is atomic: the
lines that stay are put as a new object. A last line that is torn, and any other that cannot be read, goes.

Left to whom: what a line says is `record`'s business. Appending needs a store that is a folder.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.store.base import ObjectMissingError, Store, StoreError

log = logging.getLogger(__name__)


class Journal:
    """The lines of `key` in `store` up to `last_step`, and those that follow."""

    def __init__(self, store: Store, key: str, *, last_step: int) -> None:
        self._path = Path(store.uri) / key
        cut_back(store, key, last_step=last_step)
        with self._explaining("open"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=0)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one line; `entry` has the key `step`."""
        line = json.dumps(_finite(entry), allow_nan=False).encode() + b"\n"
        with self._explaining("append to"):
            written = self._file.write(line)
            if written != len(line):
                raise OSError(f"only {written} of {len(line)} bytes were taken")

    def sync(self) -> None:
        """Wait until the disk has every line."""
        with self._explaining("sync"):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Append nothing more."""
        self._file.close()

    @contextmanager
    def _explaining(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"the run was to {verb} {self._path} and the system says: {error.strerror or error}; "
                "mend that (space, quota, mount) and start the same job again"
            ) from error


def cut_back(store: Store, key: str, *, last_step: int) -> None:
    """Keep the lines of `key` whose step is at most `last_step`."""
    try:
        content = store.get(key)
    except ObjectMissingError:
        return
    kept = b"".join(line for line in content.splitlines(keepends=True) if _is_kept(line, last_step))
    if kept != content:
        log.info("%s in %s is cut back to step %d", key, store.uri, last_step)
        store.put(key, kept)


def _is_kept(line: bytes, last_step: int) -> bool:
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return False
    return line.endswith(b"\n") and isinstance(step, int) and step <= last_step


def _finite(value: Any) -> Any:
    """`value` with null in place of every number that JSON cannot say."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return value
