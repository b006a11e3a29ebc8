"""`odonata plan`: what a run will need before anything is asked for."""

import itertools
import json
from typing import Annotated

import typer

from odonata.app import AsJson, Overrides, RunFile, app
from odonata.printing import counting_bar, print_table
from trainer.errors import ConfigError


@app.command(
    epilog="Example: `odonata plan launch/runs/croco_video_base.yaml --data --gpus 8,64,512 --step-s 0.5 --clips-per-gpu 4 "
    "data.kind=shards 'data.datasets=[{uri: s3://bucket/fleet}]'`"
)
def plan(
    run: RunFile,
    overrides: Overrides = None,
    data: Annotated[bool, typer.Option("--data", help="Plan what the data asks of store, network and cores.")] = False,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs, with commas between them.")] = "8,64,512",
    step_s: Annotated[float, typer.Option(help="Seconds of a step.", min=1e-3)] = 1.0,
    clips_per_gpu: Annotated[int, typer.Option(help="Samples of a GPU in a step.", min=1)] = 8,
    read_clips: Annotated[int, typer.Option(help="Clips to read and decode here, to measure CPU seconds.", min=1)] = 16,
    as_json: AsJson = False,
) -> None:
    """Say what a run will need before GPUs are asked for; today, with --data, of its packed data."""
    if not data:
        raise ConfigError("odonata plan was not told what to plan; give --data")
    from dataclasses import asdict

    from trainer.config.load import load_run_config
    from trainer.observe.logs import configure_logging
    from trainer.plan.data import plan_data

    config, counts = load_run_config(run, overrides or ()), _parse_gpus(gpus)
    configure_logging(rank=0)
    with counting_bar("reading clips") as show:
        done = itertools.count(1)
        needs, plans = plan_data(
            config,
            counts,
            step_s=step_s,
            clips_per_gpu=clips_per_gpu,
            read_clips=read_clips,
            advance=lambda: show(next(done), read_clips + 1),
        )
    if as_json:
        print(json.dumps({"sample": asdict(needs), "plans": [asdict(one) for one in plans]}, indent=2))
        return
    print(f"a sample: {needs.images:.0f} images in {needs.gets:.1f} GET, {needs.bytes / 1e6:.2f} MB fetched, ", end="")
    print(f"{needs.bytes / needs.useful_bytes:.3f} times what it uses, {1e3 * needs.cpu_s:.1f} CPU ms on this machine")
    print(f"{clips_per_gpu} samples a GPU in a step of {step_s} s, data set of {plans[0].dataset_gb:,.1f} GB:")
    names = (
        "GPUs",
        "batch",
        "clips/s",
        "GET/s",
        "GB/s",
        "GB/s a node",
        "S3 partitions",
        "cores a GPU",
        "cached",
        "hours an epoch",
    )
    print_table(
        names,
        (
            (
                f"{one.gpus:,}",
                f"{one.gpus * clips_per_gpu:,}",
                f"{one.clips_per_s:,.0f}",
                f"{one.gets_per_s:,.0f}",
                f"{one.gb_per_s:,.2f}",
                f"{one.gb_per_s_per_node:,.2f}",
                str(one.prefixes),
                f"{one.cores_per_gpu:.2f}",
                f"{one.cached_share:.0%}",
                f"{one.epoch_hours:,.3g}",
            )
            for one in plans
        ),
        right=names,
    )


def _parse_gpus(text: str) -> list[int]:
    counts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in counts):
        raise ConfigError(f"--gpus {text} is no list of numbers from 1 on; write them as 8,64,512")
    return [int(part) for part in counts]
