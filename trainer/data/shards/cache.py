"""A cache of fetched ranges on this node's disk, shared by its processes, bounded, kept over restarts.

diskcache does the work: large values are files, an SQLite table knows which were read last, and what exceeds the bound goes.
Two things are ours. It never unpickles: a value is bytes or it is no value, so whoever can write the folder gains nothing. And it
never stops a run: a full disk or a locked table is a miss.
"""

import logging
import sqlite3
from collections.abc import Callable
from functools import cached_property
from typing import Any

import diskcache

from trainer.config.data import CacheConfig

_TABLES = 8
"""SQLite files that share the load of many processes."""

log = logging.getLogger(__name__)


class _PlainDisk(diskcache.Disk):
    """Bytes as they are."""

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        if mode not in (diskcache.core.MODE_RAW, diskcache.core.MODE_BINARY):
            raise OSError(f"{filename or 'a value'} in the cache is not of our making")
        return super().fetch(mode, filename, value, read)


class RangeCache:
    """Bytes by key."""

    def __init__(self, config: CacheConfig) -> None:
        self._config = config
        self._has_complained = False

    def __reduce__(self) -> tuple[type["RangeCache"], tuple[CacheConfig]]:
        return type(self), (self._config,)

    def get(self, key: str) -> bytes | None:
        """What is kept under `key`, which may be damaged, or nothing."""
        kept = self._try(lambda: self._values.get(key))
        return kept if isinstance(kept, bytes) else None

    def put(self, key: str, data: bytes) -> None:
        """Keep `data`, if there is room for it."""
        self._try(lambda: self._values.set(key, data))

    @cached_property
    def _values(self) -> diskcache.FanoutCache:
        return diskcache.FanoutCache(
            str(self._config.folder),
            shards=_TABLES,
            disk=_PlainDisk,
            size_limit=int(self._config.size_gb * 1e9),
            eviction_policy="least-recently-used",
        )

    def _try(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (OSError, sqlite3.Error, diskcache.Timeout) as error:
            if not self._has_complained:
                log.warning("the cache in %s cannot be used for now, data is fetched instead: %s", self._config.folder, error)
            self._has_complained = True
            return None
