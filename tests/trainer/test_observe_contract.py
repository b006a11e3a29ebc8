"""What every observer must bear: any event in any order, numbers that are not finite, being closed twice."""

import io
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from monitoring.exporter import Exporter
from tests.trainer.observe_fakes import NotingObserver, Saved, report, sheets
from trainer.observe.metrics import Metrics
from trainer.observe.observers import Observers
from trainer.observe.pictures import Pictures
from trainer.observe.progress import Milestones, ProgressBar, ProgressLines
from trainer.observe.record import RunRecord
from trainer.observe.report import Observer, SilentObserver
from trainer.observe.tensorboard import TensorBoard
from trainer.store.open import open_store


def served_metrics() -> Metrics:
    exporter = Exporter({"rank": "0"})
    exporter.serve("127.0.0.1", 0)
    return Metrics(exporter, resumed_at=0)


OBSERVERS: dict[str, Callable[[Path], Observer]] = {
    "silent": lambda folder: SilentObserver(),
    "record": lambda folder: RunRecord(open_store(folder), resumed_at=0, config_yaml="steps: 4\n", environment={}),
    "pictures": lambda folder: Pictures(open_store(folder)),
    "milestones": lambda folder: Milestones(),
    "lines": lambda folder: ProgressLines(every_steps=2),
    "bar": lambda folder: ProgressBar(Console(force_terminal=True, file=io.StringIO())),
    "metrics": lambda folder: served_metrics(),
    "tensorboard": lambda folder: TensorBoard(open_store(folder), resumed_at=0, every_steps=1),
    "many": lambda folder: Observers(NotingObserver(), [NotingObserver(), SilentObserver()]),
}


@pytest.fixture(params=OBSERVERS)
def observer(request: pytest.FixtureRequest, tmp_path: Path) -> Observer:
    return OBSERVERS[request.param](tmp_path)


def test_every_observer_bears_a_whole_run(observer: Observer) -> None:
    for step in (1, 2, 3):
        observer.step(report(step))
    observer.checkpoint(Saved(step=3))
    observer.evaluation(3, {"croco/true": 0.5}, seconds=0.5)
    observer.pictures(3, sheets())
    observer.step(report(4))
    observer.close()


def test_every_observer_bears_numbers_that_are_not_finite(observer: Observer) -> None:
    observer.step(report(1, loss=math.nan, parts={"croco/pixels": math.nan}, grad_norm=math.inf, skipped=True, skipped_steps=1))
    observer.evaluation(1, {"croco/true": math.nan}, seconds=0.5)
    broken = sheets()
    broken["croco"]["reconstruction"][:] = math.nan
    observer.pictures(1, broken)
    observer.close()


def test_every_observer_bears_a_step_that_took_no_time_and_names_without_a_part(observer: Observer) -> None:
    observer.step(report(1, step_seconds=0.0, data_seconds=0.0, parts={"whole": 1.0}))
    observer.close()


def test_every_observer_can_be_closed_at_once_and_twice(observer: Observer) -> None:
    observer.close()
    observer.close()
