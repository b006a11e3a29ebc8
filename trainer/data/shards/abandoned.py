"""Abandoned packings: what one that was killed, and never started again, has left in the store; found and removed.

A packing writes the time to `packing/PACK/alive.json` when it begins and whenever a group of drives is done. One that is in no version
and has not done so for a week counts as abandoned, and its shards and rows go when the next packing begins; started again
after that, it begins anew. One that says nothing of the time stays: it cannot be told from one that runs.
"""

import json
import logging
from datetime import UTC, datetime, timedelta

from trainer.data.shards.layout import PROGRESS, Version
from trainer.store.base import Store

_PATIENCE = timedelta(days=7)

log = logging.getLogger(__name__)


def say_alive(store: Store, pack: str) -> None:
    """Note that `pack` is being packed."""
    store.put(_alive_key(pack), json.dumps({"at": datetime.now(UTC).isoformat()}).encode())


def remove_abandoned(store: Store, version: Version | None) -> None:
    """Remove what abandoned packings have left; `version` is the newest, which lists every pack that is whole."""
    listed = {pack.name for pack in version.packs} if version else set()
    found = {info.key for info in store.list(PROGRESS)}
    for pack in sorted({key.split("/")[1] for key in found}):
        if pack not in listed and _alive_key(pack) in found and _is_silent(store, pack):
            _remove(store, pack)


def _alive_key(pack: str) -> str:
    return f"{PROGRESS}{pack}/alive.json"


def _is_silent(store: Store, pack: str) -> bool:
    at = datetime.fromisoformat(json.loads(store.get(_alive_key(pack)))["at"])
    return datetime.now(UTC) - at > _PATIENCE


def _remove(store: Store, pack: str) -> None:
    """What says that it was there goes last, so that a removal that is killed is done again."""
    shards = [info for info in store.list("shards/") if info.key.startswith(f"shards/{pack}-")]
    for shard in shards:
        store.delete(shard.key)
    store.delete(f"packs/{pack}")
    store.delete(f"{PROGRESS}{pack}")
    size_gb = sum(shard.bytes for shard in shards) / 1e9
    log.info("removed %d shards, %.2f GB, of packing %s, which has not gone on for a week", len(shards), size_gb, pack)
