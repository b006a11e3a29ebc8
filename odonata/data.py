"""Commands that make data: synthesize and pack."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from odonata.app import StoreSettings, app
from odonata.printing import bar, counting_bar
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.config.store import StoreConfig
    from trainer.data.shards.layout import Version
    from trainer.data.shards.recording import Recording
    from trainer.data.shards.verifying import Damage
    from trainer.store.base import Store


@app.command(epilog="Example: `odonata synthesize --out /tmp/city --scenes 8 --seed 0`")
def synthesize(
    out: Annotated[Path, typer.Option(help="Folder to write the dataroot into; finished scenes in it are kept.")],
    scenes: Annotated[int, typer.Option(help="Scenes to drive; every fourth is held out.", min=1, max=9999)] = 8,
    seed: Annotated[int, typer.Option(help="Another seed is another city.", min=0, max=2**32 - 1)] = 0,
    rig: Annotated[
        Literal["nuscenes", "five", "seven"],
        typer.Option(help="Sensors of the car: those of nuScenes; five cameras without LiDAR; seven and a LiDAR."),
    ] = "nuscenes",
    duration_s: Annotated[float, typer.Option(help="Seconds in a scene.", min=1, max=60)] = 20.0,
    scale: Annotated[float, typer.Option(help="Share of the cameras' full size.", min=0.02, max=1)] = 0.25,
    workers: Annotated[int | None, typer.Option(help="Processes; one a core by default.", min=1)] = None,
    ground_truth: Annotated[bool, typer.Option(help="Also write dense depth, flow and instances of every image.")] = True,
) -> None:
    """Write a synthetic driving data set in nuScenes format, with dense ground truth beside it."""
    from trainer.observe.logs import configure_logging
    from trainer.synthesis.config import SynthesisConfig
    from trainer.synthesis.dataroot import synthesize as write_dataroot

    configure_logging(rank=0)
    settings = SynthesisConfig(scenes=scenes, seed=seed, rig=rig, duration_s=duration_s, scale=scale, ground_truth=ground_truth)
    print(write_dataroot(out, settings, workers=workers))


@app.command(
    epilog="Example: `odonata pack /data/nuscenes s3://bucket/nuscenes --store endpoint_url=http://127.0.0.1:8333` packs or adds; "
    "`odonata pack --verify s3://bucket/nuscenes` reads every byte again, `odonata pack --repair SOURCE DEST` mends what is damaged"
)
def pack(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Dataroot in nuScenes format; what to check with --verify.")],
    destination: Annotated[
        str | None, typer.Argument(metavar="DEST", help="Folder or s3://bucket/prefix; one that holds packed data is extended.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read what is packed and compare every byte; exit 2 if damaged.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Write the damaged shards of DEST anew from SOURCE, and add nothing.")
    ] = False,
    version: Annotated[
        str | None, typer.Option(help="Version folder of the dataroot, or number of the packed version to verify.")
    ] = None,
    prefix: Annotated[str, typer.Option(help="Put before the names of scenes, to tell them from another data set's.")] = "",
    drives_per_shard: Annotated[int, typer.Option(help="Scenes that share shards; 8 of nuScenes make 0.3 to 2 GB.", min=1)] = 8,
    workers: Annotated[int | None, typer.Option(help="Processes; one a core by default.", min=1)] = None,
    store: StoreSettings = None,
) -> None:
    """Pack a data set into tar shards with a Parquet index, for training from S3; started again after a kill, it goes on."""
    from trainer.config.load import parse_store_config
    from trainer.data import build
    from trainer.data.shards.packing import pack as write_shards
    from trainer.observe.logs import configure_logging

    configure_logging(rank=0)
    settings = parse_store_config(store or [])
    if destination is None and (repair or not verify):
        raise ConfigError(f"odonata pack {source} has no place to pack it into; give a folder or s3://bucket/prefix as DEST")
    if destination is not None:
        recording = build.open_recording(Path(source), version, prefix=prefix)
        if repair:
            _repair_packed(recording, destination, settings)
            return
        with counting_bar("packing drives") as advance:
            print(
                write_shards(
                    recording, destination, settings, drives_per_shard=drives_per_shard, workers=workers, advance=advance
                )
            )
    if verify:
        _verify_packed(destination or source, settings, version if destination is None else None)


def _verify_packed(uri: str, settings: "StoreConfig", version: str | None) -> None:
    from trainer.data.shards.verifying import raise_if_damaged

    if version is not None and not version.isdigit():
        raise ConfigError(f"--version {version} was given of packed data, whose versions are numbers; give one, or leave it out")
    place, packed, damaged = _find_damage(uri, settings, int(version) if version else None)
    raise_if_damaged(place, packed, damaged)
    print(f"{place.uri} version {packed.version}: every one of {packed.bytes:,} bytes is as it was written")


def _repair_packed(recording: "Recording", uri: str, settings: "StoreConfig") -> None:
    from trainer.data.shards.mending import mend
    from trainer.data.shards.verifying import raise_if_damaged

    place, packed, damaged = _find_damage(uri, settings, None)
    left = mend(recording, place, packed, damaged)
    raise_if_damaged(place, packed, left)
    print(f"{place.uri} version {packed.version}: {len(damaged)} of its shards were damaged and are written anew")


def _find_damage(uri: str, settings: "StoreConfig", version: int | None) -> tuple["Store", "Version", list["Damage"]]:
    from trainer.data.shards.layout import read_version
    from trainer.data.shards.verifying import verify
    from trainer.store.open import open_store

    place = open_store(uri, settings)
    packed = read_version(place, version)
    with bar("verifying", packed.bytes) as advance:
        return place, packed, verify(place, packed, advance)
