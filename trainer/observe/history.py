"""What a run's journals say of its earlier starts.

Left to whom: what they mean for goodput is `monitoring.goodput`, writing them `record`.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from monitoring.goodput import Goodput, measure_goodput
from trainer.errors import ConfigError
from trainer.store.base import ObjectMissingError, Store

STARTS = "starts.jsonl"
_JOURNALS = (STARTS, "steps.jsonl", "checkpoints.jsonl", "evaluations.jsonl")


def read_goodput(store: Store) -> Goodput:
    """Of the run in `store`; ConfigError where no run ever started there."""
    journals = [read_entries(store, key) for key in _JOURNALS]
    if not journals[0]:
        raise ConfigError(f"goodput was asked of {store.uri}, which has no {STARTS}; give the run.uri of a run that has started")
    return measure_goodput(*journals)


def read_entries(store: Store, key: str) -> list[dict[str, Any]]:
    """Whole lines of a journal; a torn or foreign one is no entry."""
    try:
        lines = store.get(key).splitlines(keepends=True)
    except ObjectMissingError:
        return []
    return [entry for entry in map(_parse, lines) if entry]


def read_last_save_s(store: Store) -> float | None:
    """When the last checkpoint that the run goes on from was committed, since 1970; none where there is none."""
    committed = [entry["time_s"] for entry in read_entries(store, "checkpoints.jsonl") if "error" not in entry]
    return committed[-1] if committed else None


def describe_start(store: Store, *, resumed_at: int) -> dict[str, Any]:
    """This start, before the journals are cut back to the step that it goes on from."""
    earlier = read_entries(store, "steps.jsonl")
    lost = [entry["step_seconds"] for entry in earlier if entry["step"] > resumed_at]
    signs = [entry["time_s"] for journal in (earlier, read_entries(store, STARTS)) for entry in journal[-1:]]
    began_s = time.time() - find_age_s()
    return {
        "event": "start",
        "step": resumed_at,
        "began_s": began_s,
        "last_sign_s": max(signs, default=began_s),
        "lost_steps": len(lost),
        "lost_seconds": float(sum(lost)),
    }


def find_age_s() -> float:
    """Seconds since this process was started; 0 where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    is_ours = line.endswith(b"\n") and isinstance(entry, dict) and isinstance(entry.get("step"), int) and "time_s" in entry
    return entry if is_ours else None
