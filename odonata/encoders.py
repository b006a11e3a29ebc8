"""Commands around an encoder: evaluate it, take published weights in, give its own out, and write up what it is."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from odonata.app import AsJson, Overrides, Step, StoreSettings, Uri, Weights, app, open_place
from odonata.checkpoints import checkpoints
from odonata.printing import bar
from trainer.errors import ConfigError

log = logging.getLogger(__name__)

Evaluations = Annotated[
    list[str] | None, typer.Option(metavar="URI", help="The --out of an `odonata evaluate`; several may be given.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write over what --out names.")]


@app.command(
    epilog="Example: `odonata evaluate depth --encoder runs/base --data root=/data/nuscenes --frozen --seed 0 --seed 1 --seed 2`; "
    "beside it `odonata evaluate depth --encoder scratch --like runs/base --data root=/data/nuscenes --seed 0 --seed 1 --seed 2`"
)
def evaluate(
    task: Annotated[
        Literal["depth", "pose", "flow", "bev", "map", "detection"],
        typer.Argument(metavar="TASK", help="depth, pose, flow, bev, map or detection."),
    ],
    encoder: Annotated[str, typer.Option(metavar="RUN|URI|scratch", help="A run, one of its checkpoints, or a fresh encoder.")],
    overrides: Overrides = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Keys of the data section; root=/data/nuscenes is needed.")
    ] = None,
    frozen: Annotated[
        bool, typer.Option("--frozen/--finetune", help="Train the head alone, or the encoder along with it.")
    ] = True,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of head and order; several give an interval.", min=0)] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of training; 1000 to 4000 by default, as the task asks.", min=1)
    ] = None,
    clips: Annotated[int, typer.Option(help="Held-out clips to score, at most.", min=1)] = 1000,
    weights: Weights = None,
    like: Annotated[str | None, typer.Option(metavar="RUN", help="With scratch: the run whose encoder's shape to take.")] = None,
    size: Annotated[
        Literal["nano", "tiny", "small", "base", "large", "huge", "giant", "gigantic"] | None,
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
    chosen = planning.choose_encoder(encoder, settings, weights=weights, like=like, size=size, patch_px=patch_px)
    place = out or f"runs/evaluate/{task}-{chosen.name}-{mode}"
    configs = planning.plan_evaluation(
        task, chosen, mode, seeds=seed or [0], out=place, steps=steps, data=data or (), overrides=overrides or (), store=settings
    )
    launch = read_launch(os.environ, configs[0].parallel)
    done = train_and_score(task, chosen, mode, configs, launch, out=place, clips=clips, job=os.environ.get("ODONATA_JOB"))
    if done:
        print(json.dumps(done.as_json(), indent=2) if as_json else done.as_markdown(), end="")


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
    weights: Weights = None,
    frames: Annotated[
        int | None, typer.Option(help="For torch-export and onnx: frames of a clip, 1 for images; the run's by default.", min=1)
    ] = None,
    cameras: Annotated[
        int | None, typer.Option(help="For torch-export and onnx: cameras that attend to each other; one by default.", min=1)
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the encoder of a checkpoint to a file that loads without this package.

    timm and hf get it as an image encoder: one frame of one camera, with the features that ours gives for a still image.
    """
    from trainer import export
    from trainer.observe.logs import configure_logging

    configure_logging(rank=0)
    planned = export.plan_export(open_place(uri, store), layout=layout, step=step, weights=weights)
    path = out or Path(planned.default_name)
    with bar("exporting", planned.bytes) as advance:
        load = export.export_encoder(planned, path, advance, overwrite=overwrite, frames=frames, cameras=cameras)
    print(f"{path}: the encoder of step {planned.record.step}, its {'moving average' if planned.weights == 'ema' else 'weights'}")
    print(f"load it with {load}")
    if layout == "safetensors":
        print("run it with the forward in docs/export.md")


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
    """Take weights in for warm_start, evaluate and export: CroCo, timm, DINOv2, MAE, VideoMAE, transformers, or our own exports."""
    from trainer.config.load import load_run_config
    from trainer.importing import import_weights as take_in
    from trainer.observe.logs import configure_logging

    configure_logging(rank=0)
    config = load_run_config(run, [*(overrides or ()), f"run.uri={out}"])
    changes = take_in(file, config, parts=parts, pixels=pixels)
    print(f"{out}: {file.name}, as the {parts} of {run.name}", *changes, sep="\n  ")
    print(f"start from it with warm_start.uri={out} and the same encoder and clips")


@app.command(
    "card",
    epilog="Example: `odonata card runs/base --license cc-by-nc-4.0 --evaluation runs/evaluate/depth-base-step-10000-frozen -o README.md`",
)
def write_card(
    uri: Uri,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; printed by default.")] = None,
    step: Step = None,
    licence: Annotated[str | None, typer.Option("--license", help="Licence of the weights, by its name on Hugging Face.")] = None,
    evaluation: Evaluations = None,
    store: StoreSettings = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a model card from the run's own record: what it is, what it learnt from, on what, for how long, and how good it is."""
    from trainer import card
    from trainer.observe.logs import configure_logging

    configure_logging(rank=0)
    place = open_place(uri, store)
    results = _read_evaluations(evaluation or (), store, place.run_name)
    text = card.write_card(place, step=step, licence=licence, evaluations=results)
    if out is None:
        print(text, end="")
        return
    _write_new(out, text, overwrite=overwrite)


@app.command(
    "view",
    epilog="Example: `odonata view s3://bucket/runs/base --evaluation runs/evaluate/depth-base-step-10000-frozen -o base.html`; of "
    "one clip `odonata view runs/base --clip 'scene-0061 1532402927612460'`, "
    "or without a run `odonata view --clip 12 --data root=/data/nuscenes`",
)
def write_page(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run, finished or not; a folder or s3://bucket/prefix.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(metavar="NAME|NUMBER", help="Show this clip in place of the run, as logs and incidents name it.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="With --clip: keys of the data section, as root=/data/nuscenes, over those of a run."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; named after run or clip by default.")] = None,
    evaluation: Evaluations = None,
    store: StoreSettings = None,
    overwrite: Overwrite = False,
) -> None:
    """Write one page of HTML on a run, or on one clip of its data, that opens offline.

    Of a run: curves, pictures, speed, incidents, checkpoints, probes and evaluations. Of a clip: cameras, LiDAR, boxes, calibration.
    """
    from trainer.observe.logs import configure_logging

    configure_logging(rank=0)
    if not (run or data) or (data and clip is None):
        raise ConfigError(
            "odonata view shows a run or a clip; give RUN, RUN --clip NAME, or --clip NAME --data root=/data/nuscenes, "
            "which goes with RUN too where its data lies elsewhere now"
        )
    place = open_place(run, store) if run else None
    if clip is not None:
        from trainer.view.clip import write_clip_page

        text = write_clip_page(clip, run=place.store if place else None, data=data or ())
        name = f"{place.run_name if place else 'clip'}-{clip.replace(' ', '-')}"
    elif place:
        from trainer.view import page

        results = _read_evaluations(evaluation or (), store, place.run_name)
        text, name = page.write_page(place, evaluations=results), place.run_name
    _write_new(out or Path(f"{name}.html"), text, overwrite=overwrite)


def _read_evaluations(uris: Sequence[str], store: list[str] | None, run_name: str) -> list[dict[str, Any]]:
    """Results of evaluations, each from its folder or its file; that one is not of this run is said, here and where it stands."""
    from trainer.run_history import EVALUATION, is_of_run, read_evaluation

    results = [read_evaluation(open_place(uri.removesuffix(EVALUATION) or ".", store).store) for uri in uris]
    for uri, result in zip(uris, results, strict=True):
        if not is_of_run(result, run_name):
            log.warning("the evaluation in %s is of %s, not of the run %s; its heading says so", uri, result["encoder"], run_name)
    return results


def _write_new(path: Path, text: str, *, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} was to be written and is there already; give another --out, or --overwrite")
    from trainer.store.open import open_store

    open_store(path.absolute().parent).put(path.name, text.encode())
    print(path)
