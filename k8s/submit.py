"""Bring a run to a cluster: every check that can be made before a pod starts, then its objects in order, the owner of the pods last.

    1. Nobody else writes to the run: no other workload of the namespace has its URI, and no other job holds its claim in the store.
    2. The server says yes to each object in a dry run (rights, quota, admission, schemas).
    3. It would keep what it was sent. A server drops fields that it does not know without a word, and without, say, the failure policy
       a wrong config is tried again and again: so what it would keep is compared with what it got.
    4. The objects are made, and the ConfigMap of an earlier config of the run goes.

`lenient` goes on in 3 with what an old server leaves out, where the run is still the same without it.

Left to whom: what the objects are is `render`'s. The run itself refuses a second writer, too (`trainer.checkpoint.claim`); here that is
said before anybody waits for GPUs.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from k8s import labels
from k8s.client import KINDS, Cluster, KindMissingError, Manifest
from k8s.render import render
from k8s.runs import ENDED, OWNERS, KnownRun, find_run, find_runs
from k8s.workload import Workload, build_workload
from trainer.checkpoint.claim import refuse_if_held
from trainer.config.changes import differences, refuse_another_experiment
from trainer.config.load import override_run_config, parse_section
from trainer.config.store import StoreConfig
from trainer.errors import ConfigError, OdonataError, RefusedError, RetryError
from trainer.store.base import BucketMissingError
from trainer.store.open import open_store

log = logging.getLogger(__name__)

_DISPENSABLE_KINDS = {"PodDisruptionBudget", "PodMonitor"}
_INDISPENSABLE_FIELDS = ("completionMode",)
"""Without it each pod of several would take itself for node 0."""
_POLL_S = 0.5


def submit(cluster: Cluster, workload: Workload, *, store: StoreConfig, lenient: bool = False) -> list[str]:
    """Start a run that the cluster does not have; what the server leaves out of it. `store`: how the run's is reached from here."""
    runs = find_runs(cluster)
    for run in runs:
        if run.name == workload.name:
            _refuse_taken_name(workload, run)
            log.info("run %s was stopped; it goes on with what is in %s", run.name, workload.run.run.uri)
    return _start(cluster, workload, runs, store=store, lenient=lenient)


def resume(
    cluster: Cluster, name: str, *, nodes: int | None, overrides: Sequence[str], store: StoreConfig | None, lenient: bool = False
) -> tuple[Workload, list[str]]:
    """Go on with a run that has ended or was stopped, on as many nodes as before or on `nodes`; as `submit`."""
    run = find_run(cluster, name)
    if run.phase not in ENDED:
        raise RefusedError(f"run {name} was to be resumed and is {run.phase}; stop it first: odonata stop {name}")
    workload = _render_again(run, nodes=nodes, overrides=overrides)
    _refuse_another_run(run, workload)
    if run.owner:
        delete_owner(cluster, run, timeout_s=60)
    return workload, _start(cluster, workload, find_runs(cluster), store=store or workload.run.store, lenient=lenient)


def delete_owner(cluster: Cluster, run: KnownRun, *, timeout_s: float) -> None:
    """Delete what owns the pods, and return when they are gone: each gets SIGTERM, ends its step and commits."""
    kind = OWNERS[run.flavour]
    cluster.delete(kind, run.name, propagation="Foreground")
    deadline = time.monotonic() + timeout_s
    while cluster.get(kind, run.name):
        if time.monotonic() > deadline:
            raise RetryError(
                f"{kind} {run.name} was deleted and is there {timeout_s:.0f} s later; see what its pods wait for: odonata status {run.name}"
            )
        time.sleep(_POLL_S)


def find_left_out(sent: Any, kept: Any, path: str = "") -> Iterator[str]:
    """Paths of what a server has not kept of what it was sent; what it adds is its own, and so is how it writes a value, or nothing."""
    if isinstance(sent, Mapping):
        for key, value in sent.items():
            place = f"{path}.{key}" if path else str(key)
            if not isinstance(kept, Mapping) or (key not in kept and value):
                yield place
            elif key in kept:
                yield from find_left_out(value, kept[key], place)
    elif isinstance(sent, list):
        for index, value in enumerate(sent):
            if not isinstance(kept, list) or index >= len(kept):
                yield f"{path}[{index}]"
            else:
                yield from find_left_out(value, kept[index], f"{path}[{index}]")


def _start(cluster: Cluster, workload: Workload, runs: Sequence[KnownRun], *, store: StoreConfig, lenient: bool) -> list[str]:
    _refuse_second_workload(workload, runs)
    _refuse_claimed(workload, store)
    # A kind of the whole cluster is a platform team's, who applies it once; the server looks whether it is there.
    manifests = [each for each in render(workload).values() if KINDS[each["kind"]].is_namespaced]
    left_out = {each["kind"]: list(_rehearse(cluster, workload, each)) for each in manifests}
    lost = [path for paths in left_out.values() for path in paths]
    _refuse_lost(workload, lost, lenient=lenient)
    for manifest in manifests:
        if manifest["kind"] not in left_out[manifest["kind"]]:
            _send(cluster, workload, manifest, dry_run=False)
    _forget_earlier_configs(cluster, workload)
    return lost


def _rehearse(cluster: Cluster, workload: Workload, manifest: Manifest) -> Iterator[str]:
    """What the server would leave out of `manifest`, the whole kind included; its errors where it would refuse it."""
    kind = manifest["kind"]
    try:
        kept = _send(cluster, workload, manifest, dry_run=True)
    except KindMissingError as error:
        if kind not in _DISPENSABLE_KINDS:
            raise
        log.debug("%s", error)
        yield kind
        return
    yield from (f"{kind} {path}" for path in find_left_out(manifest, kept))


def _send(cluster: Cluster, workload: Workload, manifest: Manifest, *, dry_run: bool) -> Manifest:
    """The owner of the pods must be new, and so it is this run's alone; what is around it may be left from an earlier start."""
    make = cluster.create if manifest["kind"] == OWNERS[workload.cluster.flavour] else cluster.apply
    return make(manifest, dry_run=dry_run)


def _refuse_taken_name(workload: Workload, run: KnownRun) -> None:
    if run.phase not in ENDED:
        raise RefusedError(
            f"run {run.name} was to be submitted and is {run.phase}, for {run.config.run.uri}; watch it with odonata status {run.name}, "
            f"stop it first: odonata stop {run.name}, or give another --name"
        )
    if run.owner:
        raise ConfigError(
            f"run {run.name} was to be submitted and is {run.phase}; go on with it: odonata resume {run.name}, make room for it: odonata "
            f"stop {run.name}, or give another --name"
        )
    if run.config.run.uri != workload.run.run.uri:
        raise ConfigError(
            f"run {run.name} was to be submitted for {workload.run.run.uri} and that name is that of the stopped run {run.config.run.uri}; "
            f"give another --name, or have that one forgotten: odonata stop {run.name} --forget"
        )


def _refuse_another_run(run: KnownRun, workload: Workload) -> None:
    """A resume goes on with the steps that there are."""
    uri = run.config.run.uri
    if workload.run.run.uri != uri:
        raise ConfigError(
            f"run {run.name} was to be resumed at {workload.run.run.uri} and lives at {uri}; leave run.uri out, or submit another run "
            "(warm_start.uri takes the weights along)"
        )
    changes = differences(run.config.model_dump(mode="json"), workload.run.model_dump(mode="json"))
    refuse_another_experiment(changes, uri=uri)


def _refuse_second_workload(workload: Workload, runs: Sequence[KnownRun]) -> None:
    uri = workload.run.run.uri
    for run in runs:
        if run.name != workload.name and run.phase not in ENDED and run.config.run.uri.rstrip("/") == uri.rstrip("/"):
            raise RefusedError(
                f"{uri} was to be written to by {workload.name}, and run {run.name} ({run.phase}) writes to it; stop that one first: "
                f"odonata stop {run.name}, or give another run.uri"
            )


def _refuse_claimed(workload: Workload, config: StoreConfig) -> None:
    """RefusedError where another job holds the run, ConfigError where its bucket is not there; else a store that cannot be asked from here
    is the run's own business."""
    run = workload.run
    job = labels.name_job(workload.cluster.namespace, workload.name)
    try:
        refuse_if_held(open_store(run.run.uri, config.impatient), job=job, expiry_s=run.checkpoint.claim_expiry_s)
    except (RefusedError, BucketMissingError):
        raise
    except OdonataError as error:
        log.warning("whether somebody else writes to the run could not be looked up from here; the run itself will (%s)", error)


def _render_again(run: KnownRun, *, nodes: int | None, overrides: Sequence[str]) -> Workload:
    content = run.config.model_dump(mode="json")
    content["parallel"]["world_size"] = None  # that of the nodes it had
    config = override_run_config(content, overrides, origin=f"the config of run {run.name}")
    cluster = run.cluster
    if nodes is not None:
        changed = cluster.model_dump(mode="json") | {"nodes": nodes}
        if nodes == 1 and cluster.engine == "hsdp":
            changed["engine"] = "fsdp2"  # the same shards, and nobody to replicate them to
        cluster = parse_section(type(cluster), changed, complaint=f"run {run.name} cannot be resumed on {nodes} nodes")
    return build_workload(config, cluster, name=run.name)


def _refuse_lost(workload: Workload, lost: Sequence[str], *, lenient: bool) -> None:
    asked = f"run {workload.name} was to be submitted and this cluster would leave out of it"
    fatal = [path for path in lost if path.endswith(_INDISPENSABLE_FIELDS)]
    if fatal:
        raise ConfigError(f"{asked}: {'; '.join(fatal)}; it is too old for several nodes: take one")
    if lost and not lenient:
        unwatched = ", or monitoring.pod_monitor: false in the cluster config" if "PodMonitor" in lost else ""
        raise ConfigError(f"{asked}: {'; '.join(lost)}; have it brought up to date, or go without with --lenient{unwatched}")


def _forget_earlier_configs(cluster: Cluster, workload: Workload) -> None:
    for config_map in cluster.list("ConfigMap", labels.select(workload.name)):
        if config_map["metadata"]["name"] != workload.config_name:
            cluster.delete("ConfigMap", config_map["metadata"]["name"])
