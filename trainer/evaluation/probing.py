"""Frozen probes of a run while it trains: what its encoder is worth, checkpoint by checkpoint, beside its loss.

    a checkpoint is due -> its weights are copied, since retention may sweep it -> for each task a fresh head -> held-out clips -> a record

A process of its own, which reads what is committed and writes what is its own alone: training neither waits for it nor knows of it.
Every head has the same beginning, the same training clips in the same order and the same held-out clips, as `odonata evaluate` has them
(`planning`), so along a curve nothing differs but the encoder. The protocol is written down beside the first record and kept to: who starts
again with another one is refused, and packed data that grows is read at the version of the first probe.

Checkpoints are due at multiples of `every_steps`, and at the end; the oldest is taken first, which is the next to be swept. One that is
gone or damaged is passed over, and so is a head that diverges, which an encoder may cause; both are counted. What the records say is
served on /metrics, also what an earlier process has found.
"""

import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from monitoring.exporter import Exporter
from monitoring.metrics import PROBE_METRICS
from trainer.checkpoint.catalog import Save, choose_weights, find_saves, read_record, what_lacks
from trainer.checkpoint.manager import read_tensors, save_weights
from trainer.checkpoint.tools import CONFIG, open_place, read_run_config
from trainer.config.changes import differences, is_free
from trainer.config.load import dump_run_config
from trainer.config.run import RunConfig
from trainer.config.store import StoreConfig
from trainer.config.training import CheckpointConfig
from trainer.errors import CheckpointError, ConfigError, DivergedError, PreemptedError
from trainer.evaluation.planning import plan_run, read_encoder
from trainer.evaluation.protocol import PROTOCOLS, TaskName
from trainer.evaluation.scoring import prepare_as, score_run
from trainer.experiment import pin_data
from trainer.observe.probes import PROBES, Probe, probe_key, read_probes, without_nan, write_probe
from trainer.parallel.launch import Launch
from trainer.start import open_sources, start
from trainer.stop import StopWish, listening
from trainer.store.base import Store, StoreError
from trainer.store.open import open_store

log = logging.getLogger(__name__)

_SEED = 0
_POLL_S = 20.0
_SIGNAL_S = 0.2
_DECODER = "model.objectives.croco.decoder."
_QUIET = ("observe.metrics_port=null", "observe.evaluate_clips=8")
"""A head is trained without figures of its own: they are the probe's."""
_JUDGED = {"seed", "steps", "global_batch", "data", "encoder", "objectives", "optim"}
"""What makes two probes of one curve comparable."""


@dataclass(frozen=True)
class Probes:
    """What is probed, how, and where heads live meanwhile."""

    store: Store
    """Of the run."""
    every_steps: int
    clips: int
    heads: Mapping[TaskName, RunConfig]
    """The run that trains the head of each task on what lies in `scratch`."""
    scratch: Path
    exporter: Exporter
    given_up: set[tuple[str, TaskName]] = field(default_factory=set)
    """Checkpoint and task of what this process will not try again."""

    @property
    def weights(self) -> Path:
        """The run that holds the weights which are probed now."""
        return self.scratch / "weights"


@contextlib.contextmanager
def planned_probes(
    run: str,
    tasks: Sequence[str],
    *,
    every_steps: int,
    clips: int,
    steps: int,
    data: Sequence[str] = (),
    overrides: Sequence[str] = (),
    store: StoreConfig | None = None,
) -> Iterator[Probes]:
    """The probes of `run`, all that can be wrong with them found out; for the length of the block there is room for heads.

    ConfigError, DataError or CheckpointError where there is no such run, the data cannot serve a task, or earlier probes were others.
    """
    wanted = name_tasks(tasks)
    place = open_place(run, store)
    if place.prefix:
        raise ConfigError(f"probes follow a run, and {run} is one checkpoint; give the run, or use `odonata evaluate`")
    exporter = Exporter({"run": place.run_name}, PROBE_METRICS)
    with tempfile.TemporaryDirectory(prefix="odonata-probe-") as folder, contextlib.closing(exporter):
        scratch = Path(folder)
        chosen = read_encoder(place, name=run, uri=str(scratch / "weights"))
        settings = (*_QUIET, f"checkpoint.every_steps={steps}", *overrides)
        heads: dict[TaskName, RunConfig] = {}
        for task in wanted:
            out = str(scratch / task)
            head = plan_run(task, chosen, "frozen", seed=_SEED, out=out, steps=steps, data=data, overrides=settings, store=store)
            heads[task] = keep_protocol(head, open_store(f"{place.store.uri}/{PROBES}/{task}", store))
            open_sources(heads[task], prepare_as(heads[task]))
        _check_clips(place.store, heads, clips)
        yield Probes(place.store, every_steps, clips, heads, scratch, exporter)


def name_tasks(names: Sequence[str]) -> list[TaskName]:
    """Each task once; ConfigError where one is unknown."""
    unknown = [name for name in names if name not in PROTOCOLS]
    if unknown or not names:
        raise ConfigError(f"probes of {', '.join(unknown) or 'nothing'} were asked for; --task knows {', '.join(PROTOCOLS)}")
    return [task for task in PROTOCOLS if task in names]


def keep_protocol(head: RunConfig, store: Store) -> RunConfig:
    """`head` with the data versions of earlier probes of its task, whose protocol is in `store`; ConfigError where that is another."""
    head = pin_data(head, store)
    earlier = read_run_config(store)
    if earlier is None:
        return head
    before, now = (config.model_dump(mode="json", include=_JUDGED) for config in (earlier, head))
    changes = [change for change in differences(before, now) if not is_free(change)]
    if changes:
        raise ConfigError(
            f"a curve of probes was to go on and heads would be trained otherwise than those in {store.uri}: {'; '.join(changes)}; "
            "give the values of before, or move that folder away for a new curve"
        )
    return head


def follow_run(probes: Probes, launch: Launch, *, once: bool = False, poll_s: float = _POLL_S) -> None:
    """Probe what is due, and what becomes due until the run's last step is committed; `once` does not wait for more."""
    if launch.world_size > 1:
        raise ConfigError(
            f"probes are made by one process and {launch.world_size} were started; start `odonata probe` without a launcher, "
            "and one for each task if one is too slow"
        )
    tell_earlier(probes)
    with listening() as stop:
        for save, tasks in come_due(probes, stop, once=once, poll_s=poll_s):
            probe_checkpoint(probes, save, tasks, launch, stop)


def come_due(probes: Probes, stop: StopWish, *, once: bool, poll_s: float) -> Iterator[tuple[Save, list[TaskName]]]:
    """The oldest checkpoint that is due, as often as there is one; the wait for the next ends with the run."""
    while True:
        due = find_due(probes)
        if due:
            yield due[0]
        elif once or is_finished(probes.store):
            log.info(
                "no checkpoint of %s is left to probe, of multiples of %d steps and the run's last",
                probes.store.uri,
                probes.every_steps,
            )
            return
        else:
            log.info("waiting for checkpoints of %s", probes.store.uri)
            wait_for_one(probes, stop, poll_s=poll_s)


def wait_for_one(probes: Probes, stop: StopWish, *, poll_s: float) -> None:
    """Return once a checkpoint is due or the run has ended; PreemptedError where a signal comes."""
    asked_s = time.monotonic()
    while True:
        check_not_stopped(stop)
        time.sleep(_SIGNAL_S)  # a signal that is noted does not wake it
        if time.monotonic() - asked_s >= poll_s:
            asked_s = time.monotonic()
            if find_due(probes) or is_finished(probes.store):
                return


def check_not_stopped(stop: StopWish) -> None:
    """PreemptedError where a signal has come."""
    if stop.signal:
        raise PreemptedError(f"stopped by {stop.signal.name}; start the same command again: probes that are done are kept")


def find_due(probes: Probes) -> list[tuple[Save, list[TaskName]]]:
    """Committed checkpoints that are due, the oldest first, each with the tasks that it has no record of."""
    committed, _ = find_saves(probes.store)
    done = {info.key for info in probes.store.list(PROBES)}
    last = _last_step(probes.store)
    due = [save for save in _newest_of_each_step(committed) if save.step % probes.every_steps == 0 or save.step == last]
    wanted = [
        (save, [t for t in probes.heads if probe_key(t, save.step) not in done and (save.prefix, t) not in probes.given_up])
        for save in due
        if save.step
    ]
    return [(save, tasks) for save, tasks in wanted if tasks]


def is_finished(store: Store) -> bool:
    """Whether the run in `store` has committed its last step."""
    last = _last_step(store)
    return any(save.step == last for save in find_saves(store)[0])


def probe_checkpoint(probes: Probes, save: Save, tasks: Iterable[TaskName], launch: Launch, stop: StopWish) -> None:
    """Copy the weights of `save` and probe them for each of `tasks`; what cannot be done is told and given up."""
    reason = copy_weights(probes, save)
    for task in tasks:
        check_not_stopped(stop)
        try:
            if reason:
                raise CheckpointError(reason)
            probe_task(probes, save, task, launch)
        except (CheckpointError, DivergedError) as error:
            log.warning("no probe of %s at step %d: %s", task, save.step, error)
            probes.given_up.add((save.prefix, task))
            probes.exporter.increase("odonata_probe_failures_total", 1, task=task)


def copy_weights(probes: Probes, save: Save) -> str | None:
    """Bring the weights of `save` into the scratch folder in place of others; the answer says why it is not possible, if so.

    They are all that a head may want of a checkpoint, read at once while it is there; of the encoder what `odonata export` takes: the
    moving average, if there is one.
    """
    record = read_record(probes.store, save.prefix)
    if isinstance(record, str):
        return f"{save.prefix} is not whole, or was removed: {record}"
    weights: dict[str, Tensor] = {}
    try:
        kind = choose_weights(probes.store, record, None)
        for root in (f"{kind}.encoder.", _DECODER):
            weights |= read_tensors(probes.store, record, prefix=root)
    except CheckpointError as error:
        return str(error)
    except StoreError:
        lacking = what_lacks(probes.store, record)
        if lacking is None:
            raise
        return f"{save.prefix} was removed while it was read: {lacking}"
    shutil.rmtree(probes.weights, ignore_errors=True)
    bare = {name.partition(".")[2]: tensor for name, tensor in weights.items()}
    save_weights(open_store(probes.weights), bare, CheckpointConfig(), step=save.step, engine=record.engine)
    return None


def probe_task(probes: Probes, save: Save, task: TaskName, launch: Launch) -> None:
    """Train a head of `task` on the copied weights, score it, and keep and show what came out."""
    head, began_s = probes.heads[task], time.monotonic()
    shutil.rmtree(head.run.uri, ignore_errors=True)
    start(head, launch, resume=False)
    scored = score_run(head, task, clips=probes.clips, device=launch.device)
    probe = Probe(
        task=task,
        step=save.step,
        checkpoint=save.prefix,
        head_steps=head.steps,
        global_batch=head.global_batch,
        clips_asked=probes.clips,
        clips=scored.clips,
        trivial=PROTOCOLS[task].trivial,
        trivial_figures=without_nan(scored.trivial),
        figures=without_nan(scored.figures),
        seconds=time.monotonic() - began_s,
        time_s=time.time(),
    )
    config_key = f"{PROBES}/{task}/{CONFIG}"
    if not probes.store.list(config_key):
        probes.store.put(config_key, dump_run_config(head).encode())
    write_probe(probes.store, probe)
    tell(probes.exporter, probe)
    figures = ", ".join(f"{name} {value:.4g}" for name, value in scored.figures.items())
    log.info("probe of %s at step %d in %.0f s: %s", task, save.step, probe.seconds, figures)


def tell_earlier(probes: Probes) -> None:
    """Show the newest record of each task."""
    earlier = read_probes(probes.store)
    for task in probes.heads:
        probes.exporter.increase("odonata_probe_failures_total", 0, task=task)
        for probe in earlier.get(task, [])[-1:]:
            tell(probes.exporter, probe)


def tell(exporter: Exporter, probe: Probe) -> None:
    """Show what `probe` came to."""
    for name, value in probe.figures.items():
        exporter.set("odonata_probe_score", float("nan") if value is None else value, task=probe.task, metric=name)
    exporter.set("odonata_probe_step", probe.step, task=probe.task)
    exporter.set("odonata_probe_seconds", probe.seconds, task=probe.task)


def serve(probes: Probes, host: str, port: int) -> None:
    """Serve /metrics; without it, say because no port is free, probes go on."""
    try:
        bound = probes.exporter.serve(host, port)
    except OSError as error:
        log.warning("probes go on without /metrics: %s", error)
        return
    log.info("metrics of probes: http://%s:%d/metrics", host, bound)


def _check_clips(store: Store, heads: Mapping[TaskName, RunConfig], clips: int) -> None:
    for task, earlier in read_probes(store).items():
        other = [probe.clips_asked for probe in earlier if task in heads and probe.clips_asked != clips]
        if other:
            raise ConfigError(
                f"probes of {task} were to be scored on {clips} clips and those in {store.uri}/{PROBES} were on {other[0]}; "
                f"give --clips {other[0]}, or move that folder away for a new curve"
            )


def _newest_of_each_step(committed: Iterable[Save]) -> list[Save]:
    """A step that was made again after a kill may be there twice; ascending."""
    return list({save.step: save for save in sorted(committed)}.values())


def _last_step(store: Store) -> int:
    config = read_run_config(store)
    assert config, "it was there when the probes were planned"
    return config.steps
