"""The `odonata` command: the one public door, and the only reader of arguments and of the environment.

Each command is one call into a room below; imports wait until a command needs them, so that `odonata config` starts
without torch. An OdonataError is a sentence on stderr and an exit code that Kubernetes can act on (trainer/errors.py).
"""

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from k8s.ranks import telling_the_pod
from trainer.errors import EXIT_RETRY, ConfigError, OdonataError, PreemptedError

if TYPE_CHECKING:
    from trainer.checkpoint.tools import Checkpoint, Place
    from trainer.config.store import StoreConfig
    from trainer.data.shards.layout import Version
    from trainer.data.shards.recording import Recording
    from trainer.data.shards.verifying import Damage
    from trainer.store.base import Store

_PIPED_WIDTH = 10_000

app = typer.Typer(
    name="odonata",
    help="Pre-train surround-view video encoders for driving.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

checkpoints = typer.Typer(no_args_is_help=True)
app.add_typer(checkpoints, name="checkpoints")

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Run config; launch/runs/ has some.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the config, as optim.lr=3e-4.")]

Uri = Annotated[str, typer.Argument(metavar="URI", help="A run, or one folder in its checkpoints/; local or s3://bucket/prefix.")]
Step = Annotated[int | None, typer.Option(help="Which checkpoint of the run; the newest whole one by default.", min=0)]
StoreSettings = Annotated[
    list[str] | None,
    typer.Option("--store", metavar="KEY=VALUE", help="How s3:// is reached, as a run's store section says it: endpoint_url=..."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


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
        with _counting_bar("packing drives") as advance:
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
    with _bar("verifying", packed.bytes) as advance:
        return place, packed, verify(place, packed, advance)


@app.command(
    epilog="Example: `odonata evaluate depth --encoder runs/base --data root=/data/nuscenes --frozen --seed 0 --seed 1 --seed 2`; "
    "beside it `odonata evaluate depth --encoder scratch --like runs/base --data root=/data/nuscenes --finetune`"
)
def evaluate(
    task: Annotated[
        Literal["depth", "pose", "flow", "bev", "map", "detection"],
        typer.Argument(metavar="TASK", help="depth, pose, flow, bev, map or detection."),
    ],
    encoder: Annotated[str, typer.Option(metavar="RUN|URI|scratch", help="A run, one of its checkpoints, or a fresh encoder.")],
    overrides: Overrides = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Keys of the data section, as root=/data/nuscenes.")
    ] = None,
    frozen: Annotated[
        bool, typer.Option("--frozen/--finetune", help="Train the head alone, or the encoder along with it.")
    ] = True,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of head and order; several give an interval.", min=0)] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of training; the protocol's by default.", min=1)] = None,
    clips: Annotated[int, typer.Option(help="Held-out clips to score, at most.", min=1)] = 1000,
    like: Annotated[str | None, typer.Option(metavar="RUN", help="With scratch: the run whose encoder's shape to take.")] = None,
    size: Annotated[
        Literal["tiny", "small", "base", "large", "huge", "giant", "gigantic"] | None,
        typer.Option(help="With scratch: the size of the encoder."),
    ] = None,
    patch_px: Annotated[int | None, typer.Option(help="With scratch: the side of its patches.", min=4)] = None,
    out: Annotated[
        str | None, typer.Option(metavar="URI", help="Where runs and result go; named after task and encoder by default.")
    ] = None,
    store: StoreSettings = None,
    as_json: AsJson = False,
) -> None:
    """Say what an encoder is worth: train a head on it, score held-out scenes. Works alone and under `accelerate launch`."""
    from trainer.config.load import parse_store_config
    from trainer.evaluation import planning
    from trainer.evaluation.evaluate import evaluate as train_and_score
    from trainer.observe.logs import configure_logging
    from trainer.parallel.launch import read_launch

    configure_logging(int(os.environ.get("RANK", "0")))
    settings = parse_store_config(store or [])
    mode: Literal["frozen", "finetuned"] = "frozen" if frozen else "finetuned"
    chosen = planning.choose_encoder(encoder, settings, like=like, size=size, patch_px=patch_px)
    place = out or f"runs/evaluate/{task}-{chosen.name}-{mode}"
    configs = [
        planning.plan_run(
            task, chosen, mode, seed=one, out=place, steps=steps, data=data or (), overrides=overrides or (), store=settings
        )
        for one in dict.fromkeys(seed or [0])
    ]
    launch = read_launch(os.environ, configs[0].parallel)
    done = train_and_score(task, chosen, mode, configs, launch, out=place, clips=clips, job=os.environ.get("ODONATA_JOB"))
    if done:
        print(json.dumps(done.as_json(), indent=2) if as_json else done.as_markdown(), end="")


@app.command(
    epilog="Example: `odonata render launch/runs/all_video_base_s3.yaml --cluster k8s/clusters/spot_four_nodes.yaml -o manifests "
    "run.uri=s3://bucket/runs/mine && kubectl apply -k manifests`"
)
def render(
    run: RunFile,
    cluster: Annotated[Path, typer.Option("--cluster", metavar="CLUSTER.yaml", help="Cluster config; k8s/clusters/ has some.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write the manifests into, one object a file.")
    ],
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name of the objects; the last part of run.uri by default.")] = None,
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
    retry_code: Annotated[
        int, typer.Option(help="Exit code in place of 75, for those who read another so.", min=1, max=255)
    ] = EXIT_RETRY,
) -> None:
    """Train on this node under `accelerate launch`; SIGTERM goes to the ranks, and their own exit code is this command's."""
    from k8s.entrypoint import Node, run_pod
    from trainer.observe.logs import configure_logging

    configure_logging(rank=0)
    node = Node(node_rank, main_address, main_port, meeting_s)
    code = run_pod(run, overrides or (), accelerate, node, os.environ, grace_s=grace_s)
    raise typer.Exit(retry_code if code == EXIT_RETRY else code)


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
    with _counting_bar("reading clips") as show:
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
    _print_table(
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
    _print_table(("bucket", "seconds", "share"), rows, right=("seconds", "share"))


def _parse_gpus(text: str) -> list[int]:
    counts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in counts):
        raise ConfigError(f"--gpus {text} is no list of numbers from 1 on; write them as 8,64,512")
    return [int(part) for part in counts]


@checkpoints.callback()
def look_after_checkpoints() -> None:
    """Look at the checkpoints of a run, check, copy and export them."""
    from trainer.observe.logs import configure_logging

    configure_logging(rank=0)


@checkpoints.command("list", epilog="Example: `odonata checkpoints list runs/croco_video_tiny`")
def list_checkpoints(uri: Uri, store: StoreSettings = None, as_json: AsJson = False) -> None:
    """List every save of a run, with the reason where one is not whole. Sizes are compared, bytes are not: see verify."""
    from trainer.checkpoint import tools

    _show_checkpoints(tools.list_checkpoints(_open_place(uri, store)), checked="sizes", as_json=as_json)


@checkpoints.command("show", epilog="Example: `odonata checkpoints show s3://bucket/runs/base --step 4000`")
def show_checkpoint(uri: Uri, step: Step = None, store: StoreSettings = None, as_json: AsJson = False) -> None:
    """Show one checkpoint: who wrote it, how far the run was, and every tensor in it."""
    from trainer.checkpoint import tools

    record = tools.choose_checkpoint(_open_place(uri, store), step)
    described = tools.describe_record(record)
    if as_json:
        print(json.dumps(described, indent=2))
        return
    for name in ("prefix", "step", "created", "engine", "world_size", "writer"):
        print(f"{name:<12}{described[name]}")
    print(f"{'progress':<12}{', '.join(f'{name} {count}' for name, count in record.progress.items())}")
    _print_table(
        ("tensor", "shape", "type", "bytes"),
        (
            (name, " x ".join(map(str, tensor.shape)) or "scalar", tensor.dtype, f"{tools.tensor_bytes(tensor):,}")
            for name, tensor in sorted(record.tensors.items())
        ),
        right=("bytes",),
    )
    _print_table(
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

    place = _open_place(uri, store)
    found = list(tools.list_checkpoints(place, step))
    with _bar("verifying", sum(checkpoint.record.bytes for checkpoint in found if checkpoint.record)) as advance:
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

    place, target = _open_place(uri, store), _open_place(destination, target_store or store)
    if target.prefix:
        raise ConfigError(f"{destination} was given to copy into and is one checkpoint; give the run, {target.store.uri}")
    record = tools.choose_checkpoint(place, step)
    with _bar("copying", record.bytes) as advance:
        print(tools.copy_checkpoint(place.store, record, target.store, advance))


@checkpoints.command("export", epilog="Example: `odonata checkpoints export runs/base --format timm --out base.safetensors`")
@app.command("export", epilog="Example: `odonata export runs/base --format timm --out base.safetensors`")
def export_encoder(
    uri: Uri,
    layout: Annotated[
        Literal["safetensors", "torch-export", "onnx", "timm", "hf", "croco"],
        typer.Option(
            "--format",
            help="Our own names; a program for torch, or for ONNX; timm's VisionTransformer; a folder for transformers' AutoModel; "
            "CroCo's encoder and decoder.",
        ),
    ] = "safetensors",
    out: Annotated[Path | None, typer.Option(help="File, or folder for hf, to write; named after the run by default.")] = None,
    step: Step = None,
    store: StoreSettings = None,
    weights: Annotated[
        Literal["model", "ema"] | None, typer.Option(help="Weights or their moving average; by default ema where there is one.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="For torch-export and onnx: frames of a clip, 1 for images; the run's by default.", min=1)
    ] = None,
    cameras: Annotated[int, typer.Option(help="For torch-export and onnx: cameras that attend to each other.", min=1)] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over what --out names.")] = False,
) -> None:
    """Write the encoder of a checkpoint to a file that loads without this package.

    timm and hf get it as an image encoder: one frame of one camera, with the features that ours gives for a still image.
    """
    from trainer import export
    from trainer.observe.logs import configure_logging

    configure_logging(rank=0)
    planned = export.plan_export(_open_place(uri, store), layout=layout, step=step, weights=weights)
    path = out or Path(planned.default_name)
    with _bar("exporting", planned.bytes) as advance:
        load = export.export_encoder(planned, path, advance, overwrite=overwrite, frames=frames, cameras=cameras)
    print(f"{path}: the encoder of step {planned.record.step}, its {'moving average' if planned.weights == 'ema' else 'weights'}")
    print(f"load it with {load}")


@app.command(
    "import",
    epilog="Example: `odonata import dinov2_vitb14_reg4_pretrain.pth launch/runs/croco_video_base.yaml encoder.patch_px=14 "
    "encoder.positions=learned encoder.registers=5 data.clip.height_px=224 data.clip.width_px=392 data.root=/data/nuscenes "
    "--out runs/dinov2`, then train with the same keys and `warm_start.uri=runs/dinov2`",
)
def import_weights(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Published weights: .safetensors, or .pth with tensors alone.")],
    run: Annotated[
        Path, typer.Argument(metavar="RUN.yaml", help="Run config that says which encoder of which clips they become.")
    ],
    out: Annotated[str, typer.Option(metavar="URI", help="Folder or s3://bucket/prefix of the run that holds them.")],
    overrides: Overrides = None,
    parts: Annotated[Literal["encoder", "model"], typer.Option(help="The encoder, or of CroCo the decoder as well.")] = "encoder",
    pixels: Annotated[
        Literal["imagenet", "half"],
        typer.Option(
            help="How images were normalised: ImageNet's mean and deviation, or 0.5 and 0.5 (timm's augreg, Google's ViT)."
        ),
    ] = "imagenet",
) -> None:
    """Take published weights in: CroCo, timm, DINOv2, MAE, VideoMAE, ViTs of transformers; for warm_start, evaluate and export."""
    from trainer.config.load import load_run_config
    from trainer.importing import import_weights as take_in
    from trainer.observe.logs import configure_logging

    configure_logging(rank=0)
    config = load_run_config(run, [*(overrides or ()), f"run.uri={out}"])
    changes = take_in(file, config, parts=parts, pixels=pixels)
    print(f"{out}: {file.name}, as the {parts} of {run.name}", *changes, sep="\n  ")
    print(f"start from it with warm_start.uri={out} and the same encoder and clips")


@app.command(
    "card", epilog="Example: `odonata card runs/base --license cc-by-nc-4.0 --evaluation runs/evaluate/depth -o README.md`"
)
def write_card(
    uri: Uri,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; printed by default.")] = None,
    step: Step = None,
    licence: Annotated[str | None, typer.Option("--license", help="Licence of the weights, by its name on Hugging Face.")] = None,
    evaluation: Annotated[
        list[str] | None, typer.Option(metavar="URI", help="The --out of an `odonata evaluate`; several may be given.")
    ] = None,
    store: StoreSettings = None,
) -> None:
    """Write a model card from the run's own record: what it is, what it learnt from, on what, for how long, and how good it is."""
    from trainer import card
    from trainer.observe.logs import configure_logging

    configure_logging(rank=0)
    results = [card.read_evaluation(_open_place(one, store).store) for one in evaluation or ()]
    text = card.write_card(_open_place(uri, store), step=step, licence=licence, evaluations=results)
    if out is None:
        print(text, end="")
        return
    _write_new(out, text)


@app.command("view", epilog="Example: `odonata view s3://bucket/runs/base --evaluation runs/evaluate/depth -o base.html`")
def write_page(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, finished or not; a folder or s3://bucket/prefix.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; named after the run by default.")] = None,
    evaluation: Annotated[
        list[str] | None, typer.Option(metavar="URI", help="The --out of an `odonata evaluate`; several may be given.")
    ] = None,
    store: StoreSettings = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over what --out names.")] = False,
) -> None:
    """Write one page of HTML on a run that opens offline: curves, pictures, speed, incidents, checkpoints and evaluations."""
    from trainer.card import read_evaluation
    from trainer.observe.logs import configure_logging
    from trainer.view import page

    configure_logging(rank=0)
    place = _open_place(run, store)
    results = [read_evaluation(_open_place(one, store).store) for one in evaluation or ()]
    text = page.write_page(place.store, evaluations=results)
    _write_new(out or Path(f"{place.store.uri.rstrip('/').rpartition('/')[2]}.html"), text, overwrite=overwrite)


def _write_new(path: Path, text: str, *, overwrite: bool = False) -> None:
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} was to be written and is there already; give another -o, or remove it")
    from trainer.store.open import open_store

    open_store(path.absolute().parent).put(path.name, text.encode())
    print(path)


def main() -> None:
    """Run the command line, as one rank of a pod or alone."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end_at_once)  # until a training run has begun, which ends with its step
    with telling_the_pod(os.environ):
        _run_command()


def _run_command() -> None:
    """The only place where an exception becomes an exit code."""
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


def _end_at_once(number: int, frame: FrameType | None) -> None:
    del frame
    name = signal.Signals(number).name
    raise PreemptedError(f"stopped by {name}; start the same command again: what was finished is kept")


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


def _open_place(uri: str, settings: list[str] | None) -> "Place":
    from trainer.checkpoint.tools import open_place
    from trainer.config.load import parse_store_config

    return open_place(uri, parse_store_config(settings or []))


def _show_checkpoints(found: "Iterable[Checkpoint]", *, checked: str, as_json: bool) -> None:
    from rich.filesize import decimal

    from trainer.checkpoint.tools import describe_checkpoint

    if as_json:
        print(json.dumps([describe_checkpoint(checkpoint) for checkpoint in found], indent=2))
        return
    _print_table(
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


def _print_table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]], *, right: tuple[str, ...]) -> None:
    """A table as wide as the terminal, or, where there is none, one line a row whatever its width."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, markup=False, emoji=False, highlight=False).print(table)


@contextmanager
def _bar(doing: str, total_bytes: int) -> Iterator[Callable[[int], object]]:
    """A bar on stderr while there is a terminal; what it gives is told of bytes."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from trainer.observe.logs import CONSOLE

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=CONSOLE, transient=True, disable=not CONSOLE.is_terminal) as bar:
        task = bar.add_task(doing, total=total_bytes)
        yield lambda count: bar.advance(task, count)


@contextmanager
def _counting_bar(doing: str) -> Iterator[Callable[[int, int], object]]:
    """A bar on stderr while there is a terminal; what it gives is told how many are done, and of how many."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from trainer.observe.logs import CONSOLE

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=CONSOLE, transient=True, disable=not CONSOLE.is_terminal) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    main()
