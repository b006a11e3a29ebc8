"""Commands around a run: check its config, train, say where its time went."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from odonata.app import AsJson, Overrides, RunFile, StoreSettings, app
from odonata.printing import print_table, say_ranks
from trainer.errors import ConfigError


@app.command(
    epilog="Example: `accelerate launch --config_file launch/accelerate/fsdp2.yaml -m odonata train "
    "launch/runs/croco_video_tiny.yaml data.root=/data/nuscenes optim.lr=3e-4`"
)
def train(
    run: RunFile,
    overrides: Overrides = None,
    resume: Annotated[
        str, typer.Option(help="auto goes on from the newest whole checkpoint; never refuses a run that has one.")
    ] = "auto",
) -> None:
    """Train. Works alone, under `accelerate launch` (FSDP2 or DDP) and under torchrun; started again, it resumes."""
    if resume not in ("auto", "never"):
        raise ConfigError(f"--resume {resume} is neither auto nor never; auto is the default")
    from trainer.config.load import load_run_config

    config = load_run_config(run, overrides or ())
    from trainer.observe.logs import configure_logging
    from trainer.parallel.launch import read_launch
    from trainer.start import start

    launch = read_launch(os.environ, config.parallel)
    configure_logging(launch.rank)
    start(config, launch, resume=resume == "auto", job=os.environ.get("ODONATA_JOB"))


@app.command(
    epilog="Example: `accelerate launch --config_file launch/accelerate/fsdp2.yaml -m odonata doctor launch/runs/croco_video_tiny.yaml "
    "data.root=city`"
)
def doctor(run: RunFile, overrides: Overrides = None) -> None:
    """Look for what would stop a run, on all its ranks: collectives, store, clocks, disk, shared memory, versions."""
    from trainer.config.load import load_run_config

    config = load_run_config(run, overrides or ())
    from trainer.doctor.examine import choose_exit_code, examine
    from trainer.observe.logs import configure_logging
    from trainer.parallel.launch import read_launch

    launch = read_launch(os.environ, config.parallel)
    configure_logging(launch.rank)
    diagnoses = examine(config, launch)
    if launch.is_main:
        print_table(
            ("", "check", "ranks", "found", "what to change"),
            (
                (
                    "x" if each.finding.cure else "",
                    each.finding.name,
                    say_ranks(each.ranks),
                    each.finding.value,
                    each.finding.cure,
                )
                for each in diagnoses
            ),
            right=(),
        )
    raise typer.Exit(choose_exit_code(diagnoses))


@app.command(epilog="Example: `odonata config launch/runs/croco_video_tiny.yaml optim.lr=3e-4`")
def config(
    run: Annotated[Path | None, typer.Argument(metavar="RUN.yaml", help="Run config to check.")] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of run configs instead.")] = False,
) -> None:
    """Check a run config and print it with every default written out; needs no torch and no GPU."""
    from trainer.config.load import dump_run_config, load_run_config, run_config_schema

    if schema:
        print(run_config_schema())
    elif run is None:
        raise ConfigError("odonata config needs a run config to check, as launch/runs/croco_video_tiny.yaml, or --schema")
    else:
        print(dump_run_config(load_run_config(run, overrides or ())), end="")


@app.command(epilog="Example: `odonata goodput s3://bucket/runs/base`")
def goodput(
    uri: Annotated[str, typer.Argument(metavar="RUN", help="Folder of the run, or s3://bucket/prefix.")],
    store: StoreSettings = None,
    as_json: AsJson = False,
) -> None:
    """Say where the wall time of a run went, over all its starts."""
    from dataclasses import asdict

    from trainer.config.load import parse_store_config
    from trainer.observe.history import read_goodput
    from trainer.store.open import open_store

    found = read_goodput(open_store(uri, parse_store_config(store or [])))
    if as_json:
        print(json.dumps(asdict(found) | {"wall_s": found.wall_s, "ratio": found.ratio}, indent=2))
        return
    print(f"goodput {found.ratio:.1%} of {found.wall_s:,.0f} s; {found.starts} starts, ", end="")
    print(f"{found.preemptions} preemptions, {found.lost_steps} steps lost to kills and made again")
    rows = ((bucket, f"{seconds:,.1f}", f"{seconds / found.wall_s:.1%}") for bucket, seconds in found.seconds.items())
    print_table(("bucket", "seconds", "share"), rows, right=("seconds", "share"))
