"""The command line as one object, and the arguments that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from trainer.checkpoint.tools import Place

app = typer.Typer(
    name="odonata",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Run config; launch/runs/ has some.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the config, as optim.lr=3e-4.")]

Uri = Annotated[str, typer.Argument(metavar="URI", help="A run, or one folder in its checkpoints/; local or s3://bucket/prefix.")]
Step = Annotated[int | None, typer.Option(help="Which checkpoint of the run; the newest whole one by default.", min=0)]
StoreSettings = Annotated[
    list[str] | None,
    typer.Option("--store", metavar="KEY=VALUE", help="How s3:// is reached, as a run's store section says it: endpoint_url=..."),
]
Weights = Annotated[
    Literal["model", "ema"] | None, typer.Option(help="Weights or their moving average; by default ema where there is one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _print_version(asked: bool) -> None:
    from importlib.metadata import version

    if asked:
        print(f"odonata {version('odonata')}")
        raise typer.Exit


@app.callback()
def describe(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Pre-train surround-view video encoders for driving."""


def open_place(uri: str, settings: list[str] | None) -> "Place":
    """The run, or checkpoint, at `uri`; `settings` are those of --store."""
    from trainer.checkpoint import tools
    from trainer.config.load import parse_store_config

    return tools.open_place(uri, parse_store_config(settings or []))
