"""How a run stands: its phase, its pods, how far it is, and what it waits for.

What holds a pod up is told in different places: the queue at the owner, quota in the events of the Job that may not make pods, the
scheduler in a condition of the pod, images and Secrets at the container, volumes in the events of the pod. Here each becomes one line.

Left to whom: finding and judging objects is `runs`, how far it is `progress`; tables are the command's.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from k8s import labels
from k8s.client import Cluster, Manifest
from k8s.logs import ASKED_FOR_A_RETRY, describe_exit, order_pods
from k8s.progress import Progress, read_live, read_stored
from k8s.runs import (
    KnownRun,
    Phase,
    describe_end,
    is_ending,
    is_ready,
    read_container,
    read_exit,
    read_node_rank,
    was_ready,
)
from trainer.config.store import StoreConfig
from trainer.errors import EXIT_DONE, OdonataError
from trainer.store.open import open_store

_STARTING = {"ContainerCreating", "PodInitializing"}
_SHOWN_FAILURES = 3
_LAST_WORDS = 600
"""Characters that are shown of a pod's last line, which is the sentence of the error."""
_LOG_HEAD = re.compile(r"^[\d-]{10} [\d:,]{12} [A-Z]+ +|^odonata: ")


@dataclass(frozen=True)
class PodStatus:
    """One pod of a run."""

    name: str
    node: int
    """Which of the run's nodes it is."""
    machine: str
    """Node of the cluster that it is on; empty while it is on none."""
    state: str
    restarts: int
    """Of its container, in place."""


@dataclass(frozen=True)
class RunStatus:
    """One run, as far as cluster and store tell."""

    name: str
    namespace: str
    flavour: str
    phase: Phase
    uri: str
    nodes: int
    pods: Sequence[PodStatus]
    """The newest one of each node."""
    progress: Progress | None
    restarts: int
    """Starts of the run after its first; where nobody counted those, pods that failed and containers that were started again."""
    reasons: Sequence[str]
    """Why it waits, or has failed."""


def read_status(cluster: Cluster, run: KnownRun, *, store: StoreConfig | None) -> RunStatus:
    """Where `run` stands; `store` says how the run's is reached from here, as its own config by default."""
    progress, troubles = _read_progress(cluster, run, store)
    phase = run.phase
    if phase == "stopped" and progress and progress.step == progress.steps:
        phase = "complete"  # and its owner is gone, as ttl_s has it
    return RunStatus(
        name=run.name,
        namespace=cluster.namespace,
        flavour=run.flavour,
        phase=phase,
        uri=run.config.run.uri,
        nodes=run.cluster.nodes,
        pods=[_describe_pod(pod) for pod in {read_node_rank(pod): pod for pod in run.pods}.values()],
        progress=progress,
        restarts=_count_restarts(run, progress),
        reasons=[*find_reasons(cluster, run), *troubles],
    )


def find_reasons(cluster: Cluster, run: KnownRun) -> list[str]:
    """What a run waits for, or why it has failed, each in a line."""
    if run.owner is None or run.phase == "complete":
        return []
    reasons = [*_read_owner(run.owner), *(line for pod in run.pods for line in _read_waiting(pod)), *_read_failures(run.pods)]
    if run.phase in ("waiting", "starting"):
        reasons += _read_events(cluster, run)
    return list(dict.fromkeys(reasons))  # of 128 pods that wait for the same, one line


def _read_owner(owner: Manifest) -> Iterator[str]:
    spec = owner["spec"]
    if spec.get("suspend"):
        queue = owner["metadata"]["labels"].get(labels.KUEUE_QUEUE)
        yield f"queue: Kueue has not admitted it yet to {queue}" if queue else "suspended: somebody has set spec.suspend"
    if end := describe_end(owner):
        yield f"failed: {end}"


def _read_waiting(pod: Manifest) -> Iterator[str]:
    for condition in pod["status"].get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            word = "queue" if condition.get("reason") == "SchedulingGated" else "unschedulable"
            yield f"{word}: {condition.get('message', condition.get('reason', ''))}"
    waiting = read_container(pod).get("state", {}).get("waiting", {})
    if waiting.get("reason", "") not in {"", *_STARTING}:
        word = "image" if "Image" in waiting["reason"] else "container"
        yield f"{word}: {waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")


def _read_failures(pods: Sequence[Manifest]) -> Iterator[str]:
    """The gravest ends of pods; those that asked for another try, after a preemption or a lost peer, got it."""
    ended = [(pod, read_exit(pod)) for pod in order_pods(pods)]
    failures = [(pod, end) for pod, end in ended if end and end["exitCode"] not in (EXIT_DONE, *ASKED_FOR_A_RETRY)]
    for pod, end in failures[:_SHOWN_FAILURES]:
        last_line = ((end.get("message") or "").strip().splitlines() or [end.get("reason", "")])[-1]
        words = _LOG_HEAD.sub("", last_line)
        yield f"node {read_node_rank(pod)} {describe_exit(end['exitCode'])}: {words[:_LAST_WORDS]}"


def _read_events(cluster: Cluster, run: KnownRun) -> Iterator[str]:
    """Warnings about what makes pods, and about pods whose container has not begun."""
    jobs = cluster.list("Job", labels.select(run.name))
    owners = {run.name, *(job["metadata"]["name"] for job in jobs)}
    pods = {pod["metadata"]["name"] for pod in run.pods if not read_container(pod).get("state", {}).get("running")}
    for event in _newest_last(cluster.list("Event", {}, type="Warning")):
        name, message = event["involvedObject"]["name"], " ".join(event.get("message", "").split())
        if name in owners and event["reason"] == "FailedCreate":
            yield f"{'quota' if 'exceeded quota' in message else 'pods cannot be made'}: {message}"
        elif name in pods and event["reason"] == "FailedMount":
            yield f"volume: {message}"


def _newest_last(events: Iterable[Manifest]) -> list[Manifest]:
    return sorted(events, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")


def _describe_pod(pod: Manifest) -> PodStatus:
    container, status = read_container(pod), pod["status"]
    if is_ending(pod):
        state = "ending"
    elif ended := read_exit(pod):
        state = describe_exit(ended["exitCode"])
    elif is_ready(pod):
        state = "training"
    elif was_ready(pod):
        state = "takes no step"
    else:
        state = "starting" if status.get("phase") == "Running" else "waiting"
    return PodStatus(
        name=pod["metadata"]["name"],
        node=read_node_rank(pod),
        machine=pod["spec"].get("nodeName", ""),
        state=state,
        restarts=container.get("restartCount", 0),
    )


def _read_progress(cluster: Cluster, run: KnownRun, store: StoreConfig | None) -> tuple[Progress | None, list[str]]:
    config = run.config
    assert config.observe.metrics_port is not None, "`workload` has looked"
    if live := read_live(cluster, run.pods, config.observe.metrics_port):
        return live, []
    try:
        return read_stored(open_store(config.run.uri, (store or config.store).impatient)), []
    except OdonataError as error:  # of the run the cluster still knows much
        return None, [f"store: {error}"]


def _count_restarts(run: KnownRun, progress: Progress | None) -> int:
    if progress and progress.starts:
        return progress.starts - 1
    failed: int = (run.owner or {}).get("status", {}).get("failed", 0)
    return failed + sum(read_container(pod).get("restartCount", 0) for pod in run.pods)
