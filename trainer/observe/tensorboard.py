"""Curves and contact sheets for TensorBoard, in tensorboard/ of the run (extra `tensorboard`).

Each start of a run writes a file of its own, which hides what earlier ones wrote beyond the step it goes on from. A store that is no
folder gets the files with every checkpoint and at the end, as it gets the journals; until then they lie in this pod.

Left to whom: which figures there are is `curves`.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from trainer.observe.curves import list_figures
from trainer.observe.pictures import draw_sheet
from trainer.observe.report import SavedCheckpoint, Sheets, SilentObserver, StepReport
from trainer.store.base import Store
from trainer.store.local import LocalStore

FOLDER = "tensorboard"


class TensorBoard(SilentObserver):
    """Writes every `every_steps`-th step; `resumed_at` is the step that this start went on from."""

    def __init__(self, store: Store, *, resumed_at: int, every_steps: int) -> None:
        self._store, self._every_steps = store, every_steps
        self._scratch = None if isinstance(store, LocalStore) else tempfile.TemporaryDirectory(prefix="odonata-")
        self._folder = Path(self._scratch.name if self._scratch else store.uri, FOLDER)
        self._writer = SummaryWriter(str(self._folder), purge_step=resumed_at + 1)
        self._is_open = True

    def step(self, report: StepReport) -> None:
        """See Observer."""
        if report.step % self._every_steps == 0:
            self._write(report.step, list_figures(report))

    def checkpoint(self, saved: SavedCheckpoint) -> None:
        """See Observer."""
        self._hand_over()

    def evaluation(self, step: int, figures: Mapping[str, float], *, seconds: float) -> None:
        """See Observer."""
        self._write(step, {f"held_out/{name}": value for name, value in figures.items()})

    def pictures(self, step: int, sheets: Sheets) -> None:
        """See Observer."""
        for objective, columns in sheets.items():
            sheet = np.asarray(draw_sheet(columns, caption=f"{objective} after step {step}"))
            self._writer.add_image(f"pictures/{objective}", sheet, step, dataformats="HWC")

    def close(self) -> None:
        """See Observer."""
        if self._is_open:
            self._is_open = False
            self._writer.close()
            self._hand_over()
            if self._scratch:
                self._scratch.cleanup()

    def _write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def _hand_over(self) -> None:
        """Bring the files to a store that is no folder."""
        if self._scratch:
            self._writer.flush()
            for path in self._folder.iterdir():
                self._store.put(f"{FOLDER}/{path.name}", path.read_bytes())
