"""The command that follows a run and probes its checkpoints."""

import os
from typing import Annotated

import typer

from odonata.app import Overrides, StoreSettings, app


@app.command(
    epilog="Example: `odonata probe s3://bucket/runs/base --task depth --task pose --every 5000 --data root=/data/nuscenes`",
)
def probe(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run that trains, or has; a folder or s3://bucket/prefix.")],
    task: Annotated[
        list[str],
        typer.Option(help="What to probe: depth, pose, flow, bev, map or detection; several may be given."),
    ],
    every: Annotated[
        int, typer.Option(metavar="STEPS", help="Checkpoints at multiples of so many steps are probed, and the last.", min=1)
    ],
    overrides: Overrides = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Keys of the data section, as root=/data/nuscenes.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps that a head is trained.", min=1)] = 200,
    clips: Annotated[int, typer.Option(help="Held-out clips to score, at most.", min=1)] = 200,
    once: Annotated[bool, typer.Option("--once", help="Probe what is there, and do not wait for more.")] = False,
    metrics_port: Annotated[
        int, typer.Option(help="Where /metrics is served, or the next free port; 0 is any.", min=0, max=65535)
    ] = 9500,
    metrics_host: Annotated[str, typer.Option(help="Address that /metrics listens on.")] = "0.0.0.0",
    store: StoreSettings = None,
) -> None:
    """Follow a run and say what its encoder is worth as it learns: a frozen head for each task and checkpoint, beside the training."""
    from trainer.config.load import parse_store_config
    from trainer.evaluation import probing
    from trainer.observe.logs import configure_logging
    from trainer.parallel.launch import read_launch

    configure_logging(rank=0)
    settings = parse_store_config(store or [])
    with probing.planned_probes(
        run, task, every_steps=every, clips=clips, steps=steps, data=data or (), overrides=overrides or (), store=settings
    ) as probes:
        launch = read_launch(os.environ, next(iter(probes.heads.values())).parallel)
        probing.serve(probes, metrics_host, metrics_port)
        probing.follow_run(probes, launch, once=once)
