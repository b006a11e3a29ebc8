"""Which observers a rank has: every rank its metrics, rank 0 also the record and what people look at.

A monitor that cannot even be built, say because no port is free, is left out with a warning; the record must be built.

Left to whom: each observer is a file of its own beside this one.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import Any

from rich.console import Console

from models.config import CompletionConfig, Mim4dConfig
from monitoring.exporter import Exporter
from monitoring.goodput import Goodput
from monitoring.pulse import Pulse
from trainer.config.load import dump_run_config
from trainer.config.run import RunConfig
from trainer.config.training import ObserveConfig, WandbConfig
from trainer.errors import ConfigError
from trainer.observe.environment import Place, describe_environment
from trainer.observe.history import read_goodput, read_last_save_s
from trainer.observe.logs import CONSOLE
from trainer.observe.metrics import Metrics, Work
from trainer.observe.observers import Observers
from trainer.observe.pictures import Pictures
from trainer.observe.progress import Milestones, build_progress
from trainer.observe.record import RunRecord
from trainer.observe.report import Observer
from trainer.store.base import Store

log = logging.getLogger(__name__)


def build_observer(
    config: RunConfig,
    place: Place,
    store: Store,
    *,
    resumed_at: int,
    source: Mapping[str, Any],
    pulse: Pulse | None = None,
    measure_work: Callable[[], Work | None] = lambda: None,
    watchdog_cpu_seconds: Callable[[], float] = lambda: 0.0,
    console: Console = CONSOLE,
) -> Observers:
    """All observers of this rank as one; `source` is what the training data says of itself.

    `pulse` is what probes ask, `measure_work` is called where utilisation can be shown.
    """
    builders: list[Callable[[], Observer]] = []
    record = None
    if place.rank == 0:
        environment = describe_environment(place, source)
        record = RunRecord(store, resumed_at=resumed_at, config_yaml=dump_run_config(config), environment=environment)
        builders += [
            Milestones,
            lambda: Pictures(store),
            lambda: build_progress(console, every_steps=config.observe.log_every_steps),
            *list_curve_writers(config, store, resumed_at=resumed_at),
        ]
    if config.observe.metrics_port is not None:

        def build() -> Metrics:
            goodput = read_goodput(store) if record else None
            return build_metrics(
                config,
                place,
                resumed_at=resumed_at,
                pulse=pulse,
                work=measure_work(),
                goodput=goodput,
                saved_s=read_last_save_s(store) if record else None,
                watchdog_cpu_seconds=watchdog_cpu_seconds,
            )

        builders.append(build)
    return Observers(record, build_monitors(builders))


def check_extras(observe: ObserveConfig) -> None:
    """ConfigError where the run is to be shown by a package that is not installed."""
    asked = {"tensorboard": observe.tensorboard, "wandb": observe.wandb is not None}
    for package in (name for name, is_asked in asked.items() if is_asked):
        found = find_spec(package)
        if found is None or found.origin is None:  # a mere folder of that name has none
            raise ConfigError(
                f"observe.{package} is set, and the package {package} is not installed; pip install 'odonata[{package}]', "
                f"or drop observe.{package}"
            )


def list_curve_writers(config: RunConfig, store: Store, *, resumed_at: int) -> list[Callable[[], Observer]]:
    """Builders of those that the config asks for; their packages are imported when they are built."""
    every_steps, section = config.observe.log_every_steps, config.observe.wandb
    builders: list[Callable[[], Observer]] = []

    def build_tensorboard() -> Observer:
        from trainer.observe.tensorboard import TensorBoard

        return TensorBoard(store, resumed_at=resumed_at, every_steps=every_steps)

    def build_wandb(section: WandbConfig) -> Observer:
        from trainer.observe.weights_and_biases import WeightsAndBiases

        return WeightsAndBiases(section, store, config.model_dump(mode="json"), every_steps=every_steps)

    if config.observe.tensorboard:
        builders.append(build_tensorboard)
    if section:
        builders.append(partial(build_wandb, section))
    return builders


def build_monitors(builders: list[Callable[[], Observer]]) -> list[Observer]:
    """What of `builders` can be built."""
    monitors = []
    for build in builders:
        try:
            monitors.append(build())
        except Exception as error:  # the rule of `observers`, which begins here
            log.warning("training goes on without one of its monitors: %s", error)
    return monitors


def build_metrics(
    config: RunConfig,
    place: Place,
    *,
    resumed_at: int,
    pulse: Pulse | None = None,
    work: Work | None = None,
    goodput: Goodput | None = None,
    saved_s: float | None = None,
    watchdog_cpu_seconds: Callable[[], float] = lambda: 0.0,
) -> Metrics:
    """The metrics of this rank, served; local rank r asks for the configured port + r, and local rank 0 knows the others there."""
    port = config.observe.metrics_port
    assert port is not None, "the caller has looked"
    exporter = Exporter({"run": PurePosixPath(config.run.uri).name, "rank": str(place.rank)})
    exporter.set("odonata_run_info", 1, engine=place.engine, world_size=str(place.world_size), precision=place.precision)
    exporter.set("odonata_world_size", place.world_size)
    for objective, ratio in find_mask_ratios(config).items():
        exporter.set("odonata_mask_ratio", ratio, objective=objective)
    peers = range(port + 1, port + place.local_world_size) if port and not place.local_rank else ()
    own = min(port + place.local_rank, 65535) if port else 0
    bound = exporter.serve(config.observe.metrics_host, own, pulse=pulse, peer_ports=peers)
    log.info("metrics of rank %d: http://%s:%d/metrics", place.rank, config.observe.metrics_host, bound)
    return Metrics(
        exporter,
        resumed_at=resumed_at,
        device=place.device,
        work=work,
        goodput=goodput,
        saved_s=saved_s,
        other_cpu_seconds=lambda: exporter.cpu_seconds + watchdog_cpu_seconds(),
        pushgateway=config.observe.pushgateway if place.rank == 0 else None,
    )


def find_mask_ratios(config: RunConfig) -> dict[str, float]:
    """Share of what each objective that hides something hides of it; shapes are fixed, so it is the same in every step."""
    ratios = {each.kind: each.mask.ratio for each in config.objectives if isinstance(each, CompletionConfig)}
    return ratios | {each.kind: each.mask_ratio for each in config.objectives if isinstance(each, Mim4dConfig)}
