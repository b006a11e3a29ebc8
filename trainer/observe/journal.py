"""A journal: a file with one JSON object a line, appended to step by step and cut back to the step a resume starts from.

A line is handed to the system as soon as it is written, so `kill -9` loses none that was finished; `sync` brings them to the
disk, or to a store that is no folder: there the file is kept in this pod and put whole, with every checkpoint. JSON knows no
NaN and no infinity, so numbers that are not finite are written as null. Cutting back is atomic: the lines that stay are put as
a new object. A last line that is torn, and any other that cannot be read, goes.

Left to whom: what a line says is `record`'s business.
"""

import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.store.base import ObjectMissingError, Store, StoreError
from trainer.store.local import LocalStore

log = logging.getLogger(__name__)


class Journal:
    """The lines of `key` in `store` up to `last_step`, and those that follow."""

    def __init__(self, store: Store, key: str, *, last_step: int) -> None:
        self._store = store
        self._key = key
        cut_back(store, key, last_step=last_step)
        self._scratch = None if isinstance(store, LocalStore) else tempfile.TemporaryDirectory(prefix="odonata-")
        self._path = Path(self._scratch.name if self._scratch else store.uri, key)
        with self._explaining("open"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._scratch:
                self._path.write_bytes(_get_or_nothing(store, key))
            self._file = self._path.open("ab", buffering=0)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one line; `entry` has the key `step`."""
        line = json.dumps(_finite(entry), allow_nan=False).encode() + b"\n"
        with self._explaining("append to"):
            written = self._file.write(line)
            if written != len(line):
                raise OSError(f"only {written} of {len(line)} bytes were taken")

    def sync(self) -> None:
        """Wait until the disk, or the store, has every line."""
        if self._file.closed:
            return
        with self._explaining("sync"):
            os.fsync(self._file.fileno())
        if self._scratch:
            self._store.put(self._key, self._path.read_bytes())

    def close(self) -> None:
        """Append nothing more."""
        self._file.close()
        if self._scratch:
            self._scratch.cleanup()

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
    content = _get_or_nothing(store, key)
    kept = b"".join(line for line in content.splitlines(keepends=True) if _is_kept(line, last_step))
    if kept != content:
        log.info("%s in %s is cut back to step %d", key, store.uri, last_step)
        store.put(key, kept)


def _get_or_nothing(store: Store, key: str) -> bytes:
    try:
        return store.get(key)
    except ObjectMissingError:
        return b""


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
