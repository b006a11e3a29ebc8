"""Commands of Kubernetes: render manifests, and train in the pods that they describe."""

import os
from pathlib import Path
from typing import Annotated

import typer

from odonata.app import Overrides, RunFile, app
from trainer.errors import EXIT_RETRY

ClusterFile = Annotated[Path, typer.Option("--cluster", metavar="CLUSTER.yaml", help="Cluster config; k8s/clusters/ has some.")]


def _print_schema(asked: bool) -> None:
    from k8s.cluster import cluster_config_schema

    if asked:
        print(cluster_config_schema())
        raise typer.Exit


@app.command(
    epilog="Example: `odonata render launch/runs/all_video_base_s3.yaml --cluster k8s/clusters/spot_four_nodes.yaml -o manifests "
    "run.uri=s3://bucket/runs/mine && kubectl apply -k manifests`"
)
def render(
    run: RunFile,
    cluster: ClusterFile,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write the manifests into, one object a file.")
    ],
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name of the objects; the last part of run.uri by default.")] = None,
    schema: Annotated[
        bool,
        typer.Option("--schema", help="Print the JSON schema of cluster configs instead.", is_eager=True, callback=_print_schema),
    ] = False,
) -> None:
    """Write the Kubernetes manifests of a run: Job, JobSet, TrainJob or PyTorchJob, and what belongs around it."""
    from k8s.cluster import load_cluster_config
    from k8s.render import render_files, write_files
    from k8s.workload import build_workload
    from trainer.config.load import load_run_config

    workload = build_workload(load_run_config(run, overrides or ()), load_cluster_config(cluster), name=name)
    files = render_files(workload)
    write_files(files, out)
    print(
        f"{workload.cluster.flavour} {workload.cluster.namespace}/{workload.name}, config {workload.hash}: {len(files)} files in {out}"
    )


@app.command(
    epilog="Example: `odonata pod run.yaml --accelerate accelerate.yaml --node-rank 1 --main-address base-0.base`, as rendered pods do"
)
def pod(
    run: RunFile,
    accelerate: Annotated[Path, typer.Option(metavar="FILE", help="Accelerate's config file, for all nodes.")],
    overrides: Overrides = None,
    node_rank: Annotated[
        int | None, typer.Option(help="Which of the nodes this is, from 0 on; not given where there is one.")
    ] = None,
    main_address: Annotated[str | None, typer.Option(help="Where node 0 is.")] = None,
    main_port: Annotated[int, typer.Option(help="Port of node 0 at which all meet.", min=1, max=65535)] = 29500,
    meeting_s: Annotated[int, typer.Option(help="Seconds to wait for the other nodes.", min=1)] = 900,
    grace_s: Annotated[float, typer.Option(help="Seconds between SIGTERM and the kill of what then still runs.", min=0)] = 25.0,
    doctor: Annotated[bool, typer.Option("--doctor", help="Look for what would stop the run before it begins.")] = False,
    retry_code: Annotated[
        int, typer.Option(help="Exit code in place of 75, for those who read another so.", min=1, max=255)
    ] = EXIT_RETRY,
) -> None:
    """Train on this node under `accelerate launch`; SIGTERM goes to the ranks, and their own exit code is this command's."""
    from k8s.entrypoint import Node, run_pod
    from trainer.observe.logs import configure_logging

    configure_logging(rank=0)
    node = Node(node_rank, main_address, main_port, meeting_s)
    code = run_pod(run, overrides or (), accelerate, node, os.environ, grace_s=grace_s, doctor=doctor)
    raise typer.Exit(retry_code if code == EXIT_RETRY else code)
