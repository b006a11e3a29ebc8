"""`odonata checkpoints`: look at the checkpoints of a run, check and copy them."""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from odonata.app import AsJson, Step, StoreSettings, Uri, app, open_place
from odonata.printing import bar, print_table
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.checkpoint.tools import Checkpoint

checkpoints = typer.Typer(no_args_is_help=True)
app.add_typer(checkpoints, name="checkpoints")


@checkpoints.callback()
def look_after_checkpoints() -> None:
    """Look at the checkpoints of a run, check, copy and export them."""
    from trainer.observe.logs import configure_logging

    configure_logging(rank=0)


@checkpoints.command("list", epilog="Example: `odonata checkpoints list runs/croco_video_tiny`")
def list_checkpoints(uri: Uri, store: StoreSettings = None, as_json: AsJson = False) -> None:
    """List every save of a run, with the reason where one is not whole. Sizes are compared, bytes are not: see verify."""
    from trainer.checkpoint import tools

    _show_checkpoints(tools.list_checkpoints(open_place(uri, store)), checked="sizes", as_json=as_json)


@checkpoints.command("show", epilog="Example: `odonata checkpoints show s3://bucket/runs/base --step 4000`")
def show_checkpoint(uri: Uri, step: Step = None, store: StoreSettings = None, as_json: AsJson = False) -> None:
    """Show one checkpoint: who wrote it, how far the run was, and every tensor in it."""
    from trainer.checkpoint import tools

    record = tools.choose_checkpoint(open_place(uri, store), step)
    described = tools.describe_record(record)
    if as_json:
        print(json.dumps(described, indent=2))
        return
    for name in ("prefix", "step", "created", "engine", "world_size", "writer"):
        print(f"{name:<12}{described[name]}")
    print(f"{'progress':<12}{', '.join(f'{name} {count}' for name, count in record.progress.items())}")
    print_table(
        ("tensor", "shape", "type", "bytes"),
        (
            (name, " x ".join(map(str, tensor.shape)) or "scalar", tensor.dtype, f"{tools.tensor_bytes(tensor):,}")
            for name, tensor in sorted(record.tensors.items())
        ),
        right=("bytes",),
    )
    print_table(
        ("kind", "tensors", "elements", "bytes"),
        (
            (kind, f"{total.tensors:,}", f"{total.elements:,}", f"{total.bytes:,}")
            for kind, total in tools.totals_by_kind(record).items()
        ),
        right=("tensors", "elements", "bytes"),
    )


@checkpoints.command("verify", epilog="Example: `odonata checkpoints verify runs/croco_video_tiny`")
def verify_checkpoints(
    uri: Uri,
    step: Annotated[int | None, typer.Option(help="Only the checkpoint of this step; all by default.", min=0)] = None,
    store: StoreSettings = None,
    as_json: AsJson = False,
) -> None:
    """Read every byte again and compare it with its checksum; exit 2 where something is damaged."""
    from trainer.checkpoint import tools

    place = open_place(uri, store)
    found = list(tools.list_checkpoints(place, step))
    with bar("verifying", sum(checkpoint.record.bytes for checkpoint in found if checkpoint.record)) as advance:
        verified = [tools.verify_checkpoint(place.store, checkpoint, advance) for checkpoint in found]
    _show_checkpoints(verified, checked="every byte", as_json=as_json)
    tools.raise_if_damaged(place, verified)


@checkpoints.command("copy", epilog="Example: `odonata checkpoints copy runs/base s3://bucket/runs/base --step 4000`")
def copy_checkpoint(
    uri: Uri,
    destination: Annotated[str, typer.Argument(metavar="RUN", help="Run to copy it into; it need not exist yet.")],
    step: Step = None,
    store: StoreSettings = None,
    target_store: Annotated[
        list[str] | None,
        typer.Option("--target-store", metavar="KEY=VALUE", help="The same for RUN, where it is reached in another way."),
    ] = None,
) -> None:
    """Copy one checkpoint into another run, comparing checksums on the way; nothing is ever written over."""
    from trainer.checkpoint import tools

    place, target = open_place(uri, store), open_place(destination, target_store or store)
    if target.prefix:
        raise ConfigError(f"{destination} was given to copy into and is one checkpoint; give the run, {target.store.uri}")
    record = tools.choose_checkpoint(place, step)
    with bar("copying", record.bytes) as advance:
        print(tools.copy_checkpoint(place.store, record, target.store, advance))


def _show_checkpoints(found: "Iterable[Checkpoint]", *, checked: str, as_json: bool) -> None:
    from rich.filesize import decimal

    from trainer.checkpoint.tools import describe_checkpoint

    if as_json:
        print(json.dumps([describe_checkpoint(checkpoint) for checkpoint in found], indent=2))
        return
    print_table(
        ("step", "written", "size", "engine", "ranks", "folder", "whole?"),
        (
            (
                str(checkpoint.save.step),
                checkpoint.created or "",
                decimal(checkpoint.bytes),
                checkpoint.record.engine if checkpoint.record else "",
                str(checkpoint.record.world_size) if checkpoint.record else "",
                checkpoint.save.prefix,
                f"{checkpoint.state}: {checkpoint.reason}" if checkpoint.reason else f"yes ({checked})",
            )
            for checkpoint in found
        ),
        right=("step", "size", "ranks"),
    )
