"""Curves and contact sheets for Weights & Biases (extra `wandb`).

A run keeps its W&B id in its own folder, so that each start goes on with the same page; steps that are made again after a kill keep the
values that they had first, as W&B takes no step twice. What W&B would gather of its own accord (console, system) stays off.

Left to whom: which figures there are is `curves`; the key comes from the environment, where wandb itself looks for it.
"""

import secrets
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import wandb

from trainer.config.training import WandbConfig
from trainer.observe.curves import list_figures
from trainer.observe.pictures import draw_sheet
from trainer.observe.report import Sheets, SilentObserver, StepReport
from trainer.store.base import ObjectMissingError, Store
from trainer.store.local import LocalStore

_ID = "wandb-id"
_FINISH_S = 30.0
"""That the end of a run waits for what is still to be sent."""


class WeightsAndBiases(SilentObserver):
    """Sends every `every_steps`-th step; `config` is the whole run config as plain data."""

    def __init__(self, section: WandbConfig, store: Store, config: Mapping[str, Any], *, every_steps: int) -> None:
        self._every_steps = every_steps
        self._scratch = None if isinstance(store, LocalStore) else tempfile.TemporaryDirectory(prefix="odonata-")
        self._run = wandb.init(
            project=section.project,
            entity=section.entity,
            mode=section.mode,
            id=keep_id(store),
            name=PurePosixPath(store.uri).name,
            resume="allow" if section.mode == "online" else None,
            config=dict(config),
            dir=Path(self._scratch.name if self._scratch else store.uri),
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, disable_git=True, disable_code=True),
        )
        self._is_open = True

    def step(self, report: StepReport) -> None:
        """See Observer."""
        if report.step % self._every_steps == 0:
            self._run.log(list_figures(report), step=report.step)

    def evaluation(self, step: int, figures: Mapping[str, float], *, seconds: float) -> None:
        """See Observer."""
        self._run.log({f"held_out/{name}": value for name, value in figures.items()}, step=step)

    def pictures(self, step: int, sheets: Sheets) -> None:
        """See Observer."""
        drawn = {name: draw_sheet(columns, caption=f"{name} after step {step}") for name, columns in sheets.items()}
        self._run.log({f"pictures/{name}": wandb.Image(sheet) for name, sheet in drawn.items()}, step=step)

    def close(self) -> None:
        """See Observer; what a network that is gone would not take is given up."""
        if self._is_open:
            self._is_open = False
            finishing = threading.Thread(target=self._run.finish, daemon=True)
            finishing.start()
            finishing.join(_FINISH_S)


def keep_id(store: Store) -> str:
    """The run's id in W&B, drawn at its first start."""
    try:
        return store.get(_ID).decode().strip()
    except ObjectMissingError:
        drawn = secrets.token_hex(4)
        store.put(_ID, drawn.encode())
        return drawn
