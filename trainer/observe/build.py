"""Which observers a rank has: every rank its metrics, rank 0 also the record and what people look at.

A monitor that cannot even be built, say because no port is free, is left out with a warning; the record must be built.

Left to whom: each observer is a file of its own beside this one.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from rich.console import Console

from monitoring.exporter import Exporter
from trainer.config.load import dump_run_config
from trainer.config.run import RunConfig
from trainer.observe.environment import Place, describe_environment
from trainer.observe.logs import CONSOLE
from trainer.observe.metrics import Metrics
from trainer.observe.observers import Observers
from trainer.observe.pictures import Pictures
from trainer.observe.progress import Milestones, build_progress
from trainer.observe.record import RunRecord
from trainer.observe.report import Observer
from trainer.store.base import Store

log = logging.getLogger(__name__)


def build_observer(
    config: RunConfig, place: Place, store: Store, *, resumed_at: int, source: Mapping[str, Any], console: Console = CONSOLE
) -> Observers:
    """All observers of this rank as one; `source` is what the training data says of itself."""
    builders: list[Callable[[], Observer]] = []
    record = None
    if place.rank == 0:
        environment = describe_environment(place, source)
        record = RunRecord(store, resumed_at=resumed_at, config_yaml=dump_run_config(config), environment=environment)
        builders += [
            Milestones,
            lambda: Pictures(store),
            lambda: build_progress(console, every_steps=config.observe.log_every_steps),
        ]
    if config.observe.metrics_port is not None:
        builders.append(lambda: build_metrics(config, place, resumed_at=resumed_at))
    return Observers(record, build_monitors(builders))


def build_monitors(builders: list[Callable[[], Observer]]) -> list[Observer]:
    """What of `builders` can be built."""
    monitors = []
    for build in builders:
        try:
            monitors.append(build())
        except Exception as error:  # the rule of `observers`, which begins here
            log.warning("training goes on without one of its monitors: %s", error)
    return monitors


def build_metrics(config: RunConfig, place: Place, *, resumed_at: int) -> Metrics:
    """The metrics of this rank, served; local rank r asks for the configured port + r."""
    port = config.observe.metrics_port
    assert port is not None, "the caller has looked"
    exporter = Exporter({"rank": str(place.rank)})
    exporter.set(
        "odonata_run_info",
        1,
        run=PurePosixPath(config.run.uri).name,
        engine=place.engine,
        world_size=str(place.world_size),
        precision=place.precision,
    )
    bound = exporter.serve(config.observe.metrics_host, min(port + place.local_rank, 65535) if port else 0)
    log.info("metrics of rank %d: http://%s:%d/metrics", place.rank, config.observe.metrics_host, bound)
    return Metrics(exporter, resumed_at=resumed_at)
