"""The `odonata` command: the one public door, and the only reader of arguments and of the environment.

Each command is one call into a room below; imports wait until a command needs them, so that `odonata config` starts
without torch. An OdonataError is a sentence on stderr and an exit code that Kubernetes can act on (trainer/errors.py).
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from trainer.errors import EXIT_RETRY, ConfigError, OdonataError

app = typer.Typer(
    name="odonata",
    help="Pre-train surround-view video encoders for driving.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Run config; launch/runs/ has some.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the config, as optim.lr=3e-4.")]


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
    start(config, launch, resume=resume == "auto")


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


@app.command(epilog="Example: `odonata synthesize --out /tmp/city --scenes 8 --seed 0`")
def synthesize(
    out: Annotated[Path, typer.Option(help="Folder to write the dataroot into; finished scenes in it are kept.")],
    scenes: Annotated[int, typer.Option(help="Scenes to drive; every fourth is held out.", min=1, max=9999)] = 8,
    seed: Annotated[int, typer.Option(help="Another seed is another city.", min=0, max=2**32 - 1)] = 0,
    duration_s: Annotated[float, typer.Option(help="Seconds in a scene.", min=1, max=60)] = 20.0,
    scale: Annotated[float, typer.Option(help="Share of the cameras' 1600 x 900 pixels.", min=0.02, max=1)] = 0.25,
    workers: Annotated[int | None, typer.Option(help="Processes; one a core by default.", min=1)] = None,
    ground_truth: Annotated[bool, typer.Option(help="Also write dense depth, flow and instances of every image.")] = True,
) -> None:
    """Write a synthetic driving data set in nuScenes format, with dense ground truth beside it."""
    from trainer.observe.logs import configure_logging
    from trainer.synthesis.config import SynthesisConfig
    from trainer.synthesis.dataroot import synthesize as write_dataroot

    configure_logging(rank=0)
    settings = SynthesisConfig(scenes=scenes, seed=seed, duration_s=duration_s, scale=scale, ground_truth=ground_truth)
    print(write_dataroot(out, settings, workers=workers))


def main() -> None:
    """Run the command line; the only place where an exception becomes an exit code."""
    try:
        check_imports_are_ours()
        app()
    except OdonataError as error:
        print(f"odonata: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if _is_peer_loss(error):
            print(f"odonata: another rank is gone; start the same job again and it resumes ({error})", file=sys.stderr)
            sys.exit(EXIT_RETRY)
        raise


def check_imports_are_ours() -> None:
    """Our packages have short names: end with a sentence when another project's `models` shadows ours."""
    from importlib.util import find_spec

    home = Path(__file__).resolve().parent
    for name in ("trainer", "models", "monitoring"):
        spec = find_spec(name)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found is None or found.parent.parent != home:
            raise ConfigError(
                f"the package {name} should come from {home / name} and comes from {found}; "
                "start from another folder or take the intruder off PYTHONPATH"
            )


def _is_peer_loss(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return False
    from trainer.parallel.launch import is_peer_loss

    return is_peer_loss(error)


if __name__ == "__main__":
    main()
