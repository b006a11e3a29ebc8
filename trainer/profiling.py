"""A trace of a few steps: what host and device did when, and what lay in the device's memory.

    profile/steps-10-12/rank-0.trace.json.gz      for chrome://tracing or https://ui.perfetto.dev
    profile/steps-10-12/rank-0.memory.pickle      on CUDA: every allocation with its stack, for https://pytorch.org/memory_viz

Steps under a profiler are slower, so their speed counts for nothing. A trace that cannot be written costs no step.
"""

import logging
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from trainer.config.training import ProfileConfig
from trainer.parallel.launch import Launch
from trainer.store.base import Store, StoreError

log = logging.getLogger(__name__)

_ALLOCATIONS = 200_000
"""Most allocations and frees that a memory snapshot remembers."""


class Profiler:
    """Watches the configured steps of this rank, and no others."""

    def __init__(self, config: ProfileConfig | None, launch: Launch, store: Store) -> None:
        self._steps = config.steps if config and launch.rank in config.ranks else None
        self._launch = launch
        self._store = store
        self._on_cuda = launch.device.type == "cuda"
        self._running: profile | None = None

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Watch step `step`, counted from 1, if it is one of those; what was seen is written after the last of them."""
        if self._steps is None or not self._steps[0] <= step <= self._steps[1]:
            yield
            return
        if self._running is None:
            self._begin()
        yield
        if step == self._steps[1]:
            self._end()

    def _begin(self) -> None:
        if self._on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_cuda else [])]
        self._running = profile(activities=activities, record_shapes=True)
        self._running.start()

    def _end(self) -> None:
        assert self._running and self._steps
        self._running.stop()  # waits for the device
        folder = f"profile/steps-{self._steps[0]}-{self._steps[1]}/rank-{self._launch.rank}"
        try:
            self._store.put(f"{folder}.trace.json.gz", export_trace(self._running))
            if self._on_cuda:
                self._store.put(f"{folder}.memory.pickle", pickle.dumps(torch.cuda.memory._snapshot()))
                torch.cuda.memory._record_memory_history(enabled=None)
        except StoreError as error:
            log.warning("the profile of steps %d to %d could not be written: %s", *self._steps, error)
        else:
            log.info("profile of steps %d to %d: %s/%s.trace.json.gz", *self._steps, self._store.uri, folder)
        self._running = None


def export_trace(finished: profile) -> bytes:
    """Chrome's trace format, compressed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json.gz")
        finished.export_chrome_trace(str(path))
        return path.read_bytes()
