"""Commands that live with runs on a cluster: submit, list, status, logs, stop and resume."""

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from odonata.app import AsJson, Overrides, RunFile, StoreSettings, app
from odonata.cluster import ClusterFile
from odonata.printing import clear_screen, print_table, say_age

if TYPE_CHECKING:
    from k8s.client import Cluster
    from k8s.status import RunStatus
    from k8s.workload import Workload
    from trainer.config.store import StoreConfig

RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run on the cluster, as odonata list shows it.")]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Namespace; that of the context by default.")]
Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig; its current one by default.")]
Lenient = Annotated[
    bool, typer.Option("--lenient", help="Go without what an old server leaves out of the manifests; each is named.")
]
_WATCH_S = 5.0


@app.command(
    epilog="Example: `odonata submit launch/runs/all_video_base_s3.yaml --cluster k8s/clusters/one_node.yaml run.uri=s3://bucket/runs/mine`"
)
def submit(
    run: RunFile,
    cluster: ClusterFile,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name of the objects; the last part of run.uri by default.")] = None,
    context: Context = None,
    lenient: Lenient = False,
    store: StoreSettings = None,
) -> None:
    """Start a run on a cluster, once the server has said yes to all of it in a dry run and nobody else writes to the run."""
    from k8s.client import connect
    from k8s.cluster import load_cluster_config
    from k8s.submit import submit as start
    from k8s.workload import build_workload
    from trainer.config.load import load_run_config
    from trainer.observe.logs import configure_logging

    configure_logging(rank=0)
    workload = build_workload(load_run_config(run, overrides or ()), load_cluster_config(cluster), name=name)
    connection = connect(context=context, namespace=workload.cluster.namespace)
    left_out = start(connection, workload, store=_parse_store(store) or workload.run.store, lenient=lenient)
    _say_started("submitted", workload, left_out)


@app.command(epilog="Example: `odonata resume mine --nodes 2`")
def resume(
    run: RunName,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes to go on with; as many as before by default.", min=1)] = None,
    namespace: Namespace = None,
    context: Context = None,
    lenient: Lenient = False,
    store: StoreSettings = None,
) -> None:
    """Go on with a run that was stopped or has ended, from its newest checkpoint; the cluster still has its config."""
    from k8s.client import connect
    from k8s.submit import resume as start
    from trainer.observe.logs import configure_logging

    configure_logging(rank=0)
    connection = connect(context=context, namespace=namespace)
    workload, left_out = start(
        connection, run, nodes=nodes, overrides=overrides or (), store=_parse_store(store), lenient=lenient
    )
    _say_started("resumed", workload, left_out)


@app.command(epilog="Example: `odonata stop mine`")
def stop(
    run: RunName,
    forget: Annotated[bool, typer.Option("--forget", help="Leave nothing of it in the cluster; its store keeps all.")] = False,
    namespace: Namespace = None,
    context: Context = None,
) -> None:
    """End a run's pods with a committed checkpoint, and wait until they are gone; odonata resume goes on."""
    from k8s.client import connect
    from k8s.stop import stop as end

    was_there = end(connect(context=context, namespace=namespace), run, forget=forget)
    print(f"run {run}: {'stopped, its pods have ended' if was_there else 'there was nothing to stop'}", end="")
    print("; the cluster has forgotten it" if forget else f"; go on with: odonata resume {run}")


@app.command("list", epilog="Example: `odonata list --namespace perception`")
def list_runs(namespace: Namespace = None, context: Context = None, as_json: AsJson = False) -> None:
    """List the runs of a namespace, those that were stopped included."""
    from k8s.client import connect
    from k8s.runs import find_runs, is_ready

    runs = find_runs(connect(context=context, namespace=namespace))
    columns = ("run", "flavour", "phase", "ready", "uri")
    rows = [
        (run.name, run.flavour, run.phase, f"{sum(map(is_ready, run.pods))}/{run.cluster.nodes}", run.config.run.uri)
        for run in runs
    ]
    if as_json:
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=2))
        return
    print_table(columns, rows, right=("ready",))


@app.command(epilog="Example: `odonata status mine --watch`")
def status(
    run: RunName,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again every few seconds until the run ends.")] = False,
    namespace: Namespace = None,
    context: Context = None,
    store: StoreSettings = None,
    as_json: AsJson = False,
) -> None:
    """Say where a run stands: phase, step, loss, speed, newest checkpoint, pods, and what it waits for."""
    from k8s.client import connect
    from k8s.runs import ENDED

    connection, settings = connect(context=context, namespace=namespace), _parse_store(store)
    found = _read_status(connection, run, settings)
    while watch and found.phase not in ENDED:
        clear_screen()
        _show_status(found, as_json=as_json)
        time.sleep(_WATCH_S)
        found = _read_status(connection, run, settings)
    _show_status(found, as_json=as_json)


@app.command(epilog="Example: `odonata logs mine --node 3 --tail 50`")
def logs(
    run: RunName,
    node: Annotated[int | None, typer.Option(help="Only this node of the run; all by default.", min=0)] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the pod ends; the first one alone.")] = False,
    tail: Annotated[int | None, typer.Option(help="Only so many lines at the end of each.", min=0)] = None,
    namespace: Namespace = None,
    context: Context = None,
) -> None:
    """Print what a run's pods have written: the node that failed first, then the others."""
    from k8s.client import connect
    from k8s.logs import read_logs
    from k8s.runs import find_run

    connection = connect(context=context, namespace=namespace)
    for piece in read_logs(connection, find_run(connection, run), node=node, follow=follow, tail=tail):
        print(piece, end="", flush=True)


def _parse_store(settings: list[str] | None) -> "StoreConfig | None":
    from trainer.config.load import parse_store_config

    return parse_store_config(settings) if settings else None


def _read_status(cluster: "Cluster", name: str, store: "StoreConfig | None") -> "RunStatus":
    from k8s.runs import find_run
    from k8s.status import read_status

    return read_status(cluster, find_run(cluster, name), store=store)


def _say_started(how: str, workload: "Workload", left_out: list[str]) -> None:
    for path in left_out:
        print(f"this cluster leaves out: {path}")
    name, cluster = workload.name, workload.cluster
    if any(path.endswith("podFailurePolicy") for path in left_out):
        print(
            f"without podFailurePolicy every preemption and lost peer counts as one of the {cluster.failures} failures, and what exit "
            "codes 2 and 3 call hopeless is tried again; raise failures in the cluster config if pods come and go"
        )
    print(f"run {name} is {how}, nodes: {cluster.nodes}; watch it with: odonata status {name} -n {cluster.namespace} --watch")


def _show_status(found: "RunStatus", *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    print(f"{found.flavour} {found.namespace}/{found.name}: {found.phase}, restarts: {found.restarts}, {found.uri}")
    if found.progress:
        print(_say_progress(found))
    for reason in found.reasons:
        print(f"  {reason}")
    if not found.pods:
        return
    print_table(
        ("node", "pod", "on", "state", "restarts"),
        ((str(pod.node), pod.name, pod.machine, pod.state, str(pod.restarts)) for pod in found.pods),
        right=("node", "restarts"),
    )


def _say_progress(found: "RunStatus") -> str:
    progress = found.progress
    assert progress is not None, "the caller has looked"
    parts = [f"step {progress.step}/{progress.steps}"]
    parts += [f"loss {progress.loss:.4f}"] if progress.loss is not None else []
    parts += [f"{progress.clips_per_s:.1f} clips/s"] if progress.clips_per_s else []
    parts += [f"MFU {progress.mfu:.1%}"] if progress.mfu is not None else []
    if progress.saved_step:
        age = f" ({say_age(progress.saved_s)} ago)" if progress.saved_s else ""
        parts.append(f"checkpoint at step {progress.saved_step}{age}")
    return f"{', '.join(parts)}; as of {say_age(progress.seen_s)} ago"
