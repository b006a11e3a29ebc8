"""The stores of a run: may we do what it will do, how fast, and does the server's clock agree with ours?

Everything is tried on an object of our own under the run's prefix, which is removed again.
"""

import secrets
import time
from collections.abc import Callable

from trainer.config.data import ShardsData
from trainer.config.run import RunConfig
from trainer.data.build import choose_dataset_version
from trainer.doctor.finding import Finding
from trainer.errors import DataError
from trainer.store.base import Store, StoreError, check_exclusive
from trainer.store.open import open_store
from trainer.store.s3 import S3Store

_PROBE_BYTES = 16 * 2**20


def check_store(store: Store) -> Finding:
    """Put, put only where there is nothing, get, list, delete; errors say which right is missing."""
    key, payload = f"doctor-{secrets.token_hex(8)}", secrets.token_bytes(_PROBE_BYTES)
    check_exclusive(store)
    try:
        wrote_s = _measure(lambda: store.put(key, payload))
        if key not in {info.key for info in store.list(key)} or store.get(key) != payload:
            raise StoreError(f"{store.uri} was given {key} and does not give it back; see what else writes there")
        read_s = _measure(lambda: store.get(key))
    finally:
        store.delete(key)
    rates = f"write {_PROBE_BYTES / wrote_s / 1e6:.0f} MB/s, read {_PROBE_BYTES / read_s / 1e6:.0f} MB/s"
    return Finding("store", f"{store.uri}: put, conditional put, get, list, delete; {rates}")


def check_clock(store: Store, *, tolerance_s: float) -> Finding:
    """Our clock against the store's: claims expire by it, and S3 refuses signatures that are 15 minutes off."""
    if not isinstance(store, S3Store):
        return Finding("clock", "the store is a folder: nothing to compare")
    skew_s = store.measure_clock_skew_s()
    cure = f"set the clock of this machine: more than {tolerance_s:.0f} s off" if abs(skew_s) > tolerance_s else ""
    return Finding("clock", f"{abs(skew_s):.0f} s {'ahead of' if skew_s >= 0 else 'behind'} the store's", cure)


def check_data(config: RunConfig) -> Finding:
    """The training data is there and may be read."""
    data = config.data
    if isinstance(data, ShardsData):
        versions = {dataset.uri: choose_dataset_version(data, dataset) for dataset in data.datasets}
        return Finding("data", ", ".join(f"{uri} version {version}" for uri, version in versions.items()))
    if not data.root.is_dir():
        raise DataError(f"data.root is {data.root}, which is no folder here; give one that all nodes see")
    return Finding("data", str(data.root))


def open_run_store(config: RunConfig) -> Store:
    """The store of the run, asked with less patience than in training."""
    return open_store(config.run.uri, config.store.impatient)


def _measure(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started
