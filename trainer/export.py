"""The encoder of a checkpoint, in files that load without this package: `odonata export`.

    safetensors    the bare encoder under our own names, as it is: video, cameras, any positions; docs/export.md has its forward
    torch-export   a program for clips of one shape, that torch alone runs
    onnx           the same for ONNX
    timm           one file with the names of timm's VisionTransformer
    hf             a folder that transformers' AutoModel opens
    croco          encoder and decoder as naver/croco reads them

The first three have beside them a JSON of the same name that says all that the file does not: sizes, positions, normalisation, from which
checkpoint. timm and hf know images: what they get is the encoder of one frame of one camera, the tubelet kernel summed over
time and the table of positions of a still image, which gives the features that our encoder gives for one.

The run's `config.yaml` says which encoder it is; its names and shapes must be those of the checkpoint. Images are normalised as
ImageNet's are. Everything stays on the host. CroCo's readers take pickles alone; ours holds tensors and plain values.

Left to whom: which checkpoint it is, and whether it is whole, is said by `trainer.checkpoint.tools`; names are
`models.layouts`' and, for the whole of CroCo, `models.official_croco`'s; graphs are `tracing`'s.
"""

import io
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from models.config import EncoderConfig, Grid
from models.encoder import build_encoder
from models.images import IMAGENET_MEAN, IMAGENET_STD
from models.layers import NORM_EPS
from models.layouts.timm import write_timm
from models.layouts.transformers import describe_transformers, write_transformers
from models.official_croco import describe_official, export_official
from models.positions import ROPE_BASE, rotary_parts
from models.pretraining import build_model
from trainer.checkpoint.catalog import choose_weights
from trainer.checkpoint.manager import read_tensors
from trainer.checkpoint.record import Record
from trainer.checkpoint.tools import CONFIG, Place, Progress, WatchedStore, choose_checkpoint, read_run_config, tensor_bytes
from trainer.config.run import RunConfig
from trainer.config.training import Weights
from trainer.errors import CheckpointError, ConfigError
from trainer.store.base import Store
from trainer.store.open import open_store
from trainer.tracing import ClipShape, write_onnx, write_torch_export

Layout = Literal["safetensors", "torch-export", "onnx", "timm", "hf", "croco"]

_ENDINGS: dict[Layout, str] = {
    "safetensors": ".safetensors",
    "torch-export": ".pt2",
    "onnx": ".onnx",
    "timm": "-timm.safetensors",
    "hf": "-hf",
    "croco": "-croco.pth",
}
_PROGRAMS: tuple[Layout, ...] = ("torch-export", "onnx")
_DESCRIBED: tuple[Layout, ...] = ("safetensors", *_PROGRAMS)
_CROCO_ROOT = "model.objectives.croco."  # averages are kept of the encoder alone
_PATCH_14 = ("huge", "giant", "gigantic")  # sizes that timm has under patch14 only; patch_size is given beside the name
_NAMED = 5


@dataclass(frozen=True)
class Export:
    """What is to be exported: found, and known to fit, before a byte of it is read."""

    store: Store
    record: Record
    weights: Weights
    layout: Layout
    config: RunConfig

    @property
    def run_name(self) -> str:
        return Place(self.store).run_name

    @property
    def encoder(self) -> EncoderConfig:
        return self.config.encoder

    @property
    def grid(self) -> Grid:
        return self.config.token_grid

    @property
    def root(self) -> str:
        """What the names of the encoder's weights in the checkpoint begin with."""
        return f"{self.weights}.encoder."

    @property
    def roots(self) -> tuple[str, ...]:
        """The same of all that is read."""
        return (self.root, _CROCO_ROOT) if self.layout == "croco" else (self.root,)

    @property
    def bytes(self) -> int:
        """What will be read."""
        return sum(tensor_bytes(tensor) for name, tensor in self.record.tensors.items() if name.startswith(self.roots))

    @property
    def default_name(self) -> str:
        """A name that tells where the weights come from."""
        return f"{self.run_name}-step-{self.record.step:08d}-{self.weights}{_ENDINGS[self.layout]}"


def plan_export(place: Place, *, layout: Layout, step: int | None = None, weights: Weights | None = None) -> Export:
    """The export of the newest checkpoint at `place`, or that of `step`; without `weights` the moving average if there is one.

    CheckpointError where there is no such checkpoint, no encoder in it, or another than its config says; ConfigError where
    `layout` cannot hold the encoder.
    """
    record = choose_checkpoint(place, step)
    taken = choose_weights(place.store, record, weights)
    config = read_run_config(place.store)
    if config is None:
        raise CheckpointError(
            f"an encoder of {place.uri} was to be exported and there is no {CONFIG} in {place.store.uri}, "
            f"which says what encoder it is; put the {CONFIG} of its run there"
        )
    planned = Export(place.store, record, taken, layout, config)
    _check_fits(planned)
    for misfit in _find_misfits(planned):
        raise ConfigError(f"{place.uri} was to be exported as {layout} and {misfit}: use --format safetensors")
    return planned


def export_encoder(
    planned: Export,
    out: Path,
    progress: Progress,
    *,
    overwrite: bool = False,
    frames: int | None = None,
    cameras: int | None = None,
) -> str:
    """Write the file, or for hf the folder, `out`; the answer is the Python that loads it.

    `frames` and `cameras` are those of the clips that torch-export and onnx take: the run's frames and one camera by default. ConfigError
    where `out` has another ending, or is there and is not to be overwritten, or clips make no tubelets; an existing folder keeps its
    other files.
    """
    out = out.absolute()
    described = out.with_suffix(".json")
    _check_place(planned.layout, out, described, overwrite=overwrite)
    clip = _choose_clip(planned, frames, cameras)
    source = WatchedStore(planned.store, progress)
    tensors = {
        name: tensor for root in planned.roots for name, tensor in read_tensors(source, planned.record, prefix=root).items()
    }
    contents = _WRITERS[planned.layout](_Material(planned, tensors, clip, out.name))
    if planned.layout in _DESCRIBED:
        contents[described.name] = json.dumps(describe_export(planned, clip), indent=2).encode() + b"\n"
    folder = open_store(out.parent)
    for name, content in contents.items():
        folder.put(name, content)
    return _how_to_load(planned, out)


def _check_place(layout: Layout, out: Path, described: Path, *, overwrite: bool) -> None:
    ending = _ENDINGS[layout]
    if layout in _DESCRIBED and out.suffix != ending:
        raise ConfigError(f"--out {out} was given and a file of {layout} ends in {ending}; give {out.with_suffix(ending)}")
    for path in (out, described) if layout in _DESCRIBED else (out,):
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} was to be written and is there already; give another --out, or --overwrite")


def describe_export(planned: Export, clip: ClipShape | None = None) -> dict[str, Any]:
    """What a reader must know that the file of weights or the program does not say, as plain data."""
    encoder, grid, shape = planned.encoder, planned.grid, planned.encoder.shape
    has_time = encoder.knows_time(grid)
    described = {
        "odonata_version": version("odonata"),
        "run": planned.run_name,
        "step": planned.record.step,
        "weights": planned.weights,
        "encoder": encoder.model_dump(mode="json"),
        "grid": grid._asdict(),
        **shape._asdict(),
        "norm_eps": NORM_EPS,
        "has_time": has_time,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "input": "images: float32 (batch, frames, cameras, 3, height, width), RGB in [0, 1] less image_mean, divided by image_std",
        "output": "tokens: float32 (batch, frames / tubelet_frames x cameras x rows x columns, width), in this order",
    }
    if encoder.positions == "rope":
        parts = rotary_parts(shape.width // shape.heads, has_time=has_time)
        described |= {"rotary_base": ROPE_BASE, "rotary_parts": parts}
    return described | ({"clip": clip} if clip else {})


def _choose_clip(planned: Export, frames: int | None, cameras: int | None) -> ClipShape | None:
    """The clips that a program is for; none of a file of weights."""
    encoder, grid = planned.encoder, planned.grid
    if planned.layout not in _PROGRAMS:
        if frames or cameras:
            raise ConfigError(
                f"--frames and --cameras say what clips a program is for, and {planned.layout} is none; "
                f"leave them out, or use --format {' or '.join(_PROGRAMS)}"
            )
        return None
    T = frames or planned.config.data.clip.frames
    if T > 1 and T % encoder.tubelet_frames:
        raise ConfigError(
            f"an encoder of clips of {T} frames was asked for and a token spans {encoder.tubelet_frames}; "
            f"give --frames a multiple of it, or 1 for images"
        )
    return T, cameras or 1, 3, grid.h * encoder.patch_px, grid.w * encoder.patch_px


@dataclass(frozen=True)
class _Material:
    """What a file is written from."""

    planned: Export
    tensors: Mapping[str, Tensor]
    """By their names in the checkpoint."""
    clip: ClipShape | None
    """Of a program."""
    name: str
    """Of the file or folder."""

    @property
    def encoder(self) -> dict[str, Tensor]:
        """The weights of the bare encoder."""
        root = self.planned.root
        return {name.removeprefix(root): tensor for name, tensor in self.tensors.items() if name.startswith(root)}


def _write_bare(material: _Material) -> dict[str, bytes]:
    return {material.name: save(material.encoder, _metadata(material.planned))}


def _write_timm(material: _Material) -> dict[str, bytes]:
    planned = material.planned
    return {material.name: save(write_timm(material.encoder, planned.grid), _metadata(planned))}


def _write_hf(material: _Material) -> dict[str, bytes]:
    planned = material.planned
    config = json.dumps(describe_transformers(planned.encoder, planned.grid), indent=2)
    return {
        f"{material.name}/model.safetensors": save(write_transformers(material.encoder, planned.grid), _metadata(planned)),
        f"{material.name}/config.json": config.encode() + b"\n",
    }


def _write_croco(material: _Material) -> dict[str, bytes]:
    planned, content = material.planned, io.BytesIO()
    model = build_model(planned.encoder, [one for one in planned.config.objectives if one.kind == "croco"], planned.grid)
    decoder = {name.removeprefix("model."): tensor for name, tensor in material.tensors.items() if name.startswith(_CROCO_ROOT)}
    model.load_state_dict({f"encoder.{name}": tensor for name, tensor in material.encoder.items()} | decoder)
    torch.save({"model": export_official(model, planned.grid), "croco_kwargs": describe_official(model, planned.grid)}, content)
    return {material.name: content.getvalue()}


def _write_graph(material: _Material) -> dict[str, bytes]:
    """The program, and for ONNX of a large encoder the file that it names for its weights."""
    assert material.clip, "a program is one for clips"
    encoder = build_encoder(material.planned.encoder, material.planned.grid)
    encoder.load_state_dict(material.encoder)
    write = write_onnx if material.planned.layout == "onnx" else write_torch_export
    with tempfile.TemporaryDirectory() as folder:
        write(encoder, material.clip, Path(folder) / material.name)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


_WRITERS: dict[Layout, Callable[[_Material], dict[str, bytes]]] = {
    "safetensors": _write_bare,
    "torch-export": _write_graph,
    "onnx": _write_graph,
    "timm": _write_timm,
    "hf": _write_hf,
    "croco": _write_croco,
}


def _find_misfits(planned: Export) -> Iterator[str]:
    """Sentences on what `layout` cannot hold of the encoder."""
    encoder, layout = planned.encoder, planned.layout
    if layout in ("timm", "hf") and encoder.positions == "rope":
        yield (
            f"its encoder has rope positions; the image ViT of {layout} adds a table to its tokens and cannot turn queries and keys"
        )
    if layout == "hf" and encoder.registers > 1:
        yield f"its encoder has {encoder.registers} registers, of which the ViT of transformers knows one, its class token"
    if layout == "croco":
        yield from _why_no_croco(planned)


def _why_no_croco(planned: Export) -> Iterator[str]:
    encoder = planned.encoder
    if "croco" not in [objective.kind for objective in planned.config.objectives]:
        yield "its run has no CroCo, so no decoder"
    if encoder.tubelet_frames > 1 or encoder.knows_time(planned.grid):
        yield "its encoder is one of video, CroCo's is of images"
    if encoder.registers or encoder.positions == "learned":
        yield "its encoder has registers or learned positions, CroCo's has neither"
    if encoder.shape.hidden != 4 * encoder.shape.width:
        yield f"the MLP of size {encoder.size} is not four times as wide as its tokens, as CroCo's constructor has it"


def _check_fits(planned: Export) -> None:
    """CheckpointError where the weights are not those of the encoder in the config."""
    with torch.device("meta"):
        bare = build_encoder(planned.encoder, planned.grid).state_dict()
    expected = {planned.root + name: tuple(tensor.shape) for name, tensor in bare.items()}
    stored = {name: tensor.shape for name, tensor in planned.record.tensors.items() if name.startswith(planned.root)}
    differing = sorted(name for name in expected.keys() | stored.keys() if expected.get(name) != stored.get(name))
    if differing:
        named = ", ".join(
            f"{name} ({stored.get(name, 'none')}, by the config {expected.get(name, 'none')})" for name in differing[:_NAMED]
        )
        raise CheckpointError(
            f"the encoder in {planned.store.uri}/{planned.record.prefix} was to be exported and is not the one in {CONFIG} beside "
            f"it: {len(differing)} weights differ, as {named}; put the {CONFIG} of the run that wrote it there"
        )


def _metadata(planned: Export) -> dict[str, str]:
    return {
        "format": "pt",  # transformers refuses a file that does not say so
        "layout": planned.layout,
        "odonata_version": version("odonata"),
        "step": str(planned.record.step),
        "weights": planned.weights,
        "encoder": planned.encoder.model_dump_json(),
        "grid": json.dumps(planned.grid._asdict()),
        "image_mean": json.dumps(IMAGENET_MEAN),
        "image_std": json.dumps(IMAGENET_STD),
    }


def _how_to_load(planned: Export, out: Path) -> str:
    file, load = repr(str(out)), f"safetensors.torch.load_file({str(out)!r})"
    match planned.layout:
        case "hf":
            no_pooler = ", add_pooling_layer=False" if planned.encoder.registers else ""
            return f"transformers.AutoModel.from_pretrained({file}{no_pooler})"
        case "croco":
            return f"croco.CroCoNet(**torch.load({file})['croco_kwargs']) and its ['model']"
        case "torch-export":
            return f"torch.export.load({file}).module()"
        case "onnx":
            return f"onnxruntime.InferenceSession({file})"
        case "safetensors":
            return load
        case "timm":
            return _how_to_load_timm(planned.encoder, planned.grid, load)


def _how_to_load_timm(encoder: EncoderConfig, grid: Grid, load: str) -> str:
    size = encoder.size if encoder.size != "nano" else "tiny"  # timm has no nano: another size with its numbers
    shape = encoder.shape
    numbers = "" if size == encoder.size else f"embed_dim={shape.width}, depth={shape.depth}, num_heads={shape.heads}, "
    name = f"vit_{size}_patch{14 if size in _PATCH_14 else 16}_224"
    image = (grid.h * encoder.patch_px, grid.w * encoder.patch_px)
    registers = f", reg_tokens={encoder.registers - 1}" if encoder.registers > 1 else ""
    tokens = f"class_token=True{registers}, no_embed_class=True" if encoder.registers else "class_token=False"
    return (
        f"model = timm.create_model({name!r}, pretrained=False, num_classes=0, {numbers}{tokens}, global_pool='', "
        f"img_size={image}, patch_size={encoder.patch_px}); model.load_state_dict({load})"
    )
