"""The encoder of a checkpoint, in files that load without this package: `odonata export`.

    safetensors   the bare encoder under our own names, as it is: video, cameras, any positions
    timm          one file with the names of timm's VisionTransformer
    hf            a folder that transformers' AutoModel opens

timm and hf know images: what they get is the encoder of one frame of one camera, the tubelet kernel summed over time and the
sin-cos table of the first frame and camera, which gives the features that our encoder gives for a still image. Ours has no class
token. timm can be told so; in transformers it is I-JEPA's ViT (Assran et al. 2023) that has none, so the folder is one of
these: ViTModel has a token more, to which all others would attend.

The run's `config.yaml` says which encoder it is; its names and shapes must be those of the checkpoint. Images are normalised as
ImageNet's are. Everything stays on the host.

Left to whom: which checkpoint it is, and whether it is whole, is said by `trainer.checkpoint.tools`; CroCo's own names are
`models.official_croco`'s.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save
from torch import Tensor

from models.config import EncoderConfig, Grid
from models.encoder import build_encoder
from models.images import IMAGENET_MEAN, IMAGENET_STD
from models.layers import NORM_EPS
from models.positions import sincos_table
from trainer.checkpoint.manager import read_tensors
from trainer.checkpoint.record import Record
from trainer.checkpoint.tools import CONFIG, Place, Progress, WatchedStore, choose_checkpoint, read_run_config, tensor_bytes
from trainer.errors import CheckpointError, ConfigError
from trainer.store.base import Store
from trainer.store.open import open_store

Layout = Literal["safetensors", "timm", "hf"]
Weights = Literal["model", "ema"]

_ENDINGS: dict[Layout, str] = {"safetensors": ".safetensors", "timm": "-timm.safetensors", "hf": "-hf"}
_PATCH_14 = ("huge", "giant", "gigantic")  # sizes that timm has under patch14 only; patch_size is given beside the name
_HF_RENAMES = (
    (r"blocks\.(\d+)\.norm1\.", r"encoder.layer.\1.layernorm_before."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"blocks\.(\d+)\.norm2\.", r"encoder.layer.\1.layernorm_after."),
    (r"blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
    (r"blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
    (r"norm\.", "layernorm."),
)
_HF_QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(.+)")
_NAMED = 5


@dataclass(frozen=True)
class Export:
    """What is to be exported: found, and known to fit, before a byte of it is read."""

    store: Store
    record: Record
    weights: Weights
    layout: Layout
    encoder: EncoderConfig
    grid: Grid

    @property
    def root(self) -> str:
        """What the names of the encoder's weights in the checkpoint begin with."""
        return f"{self.weights}.encoder."

    @property
    def bytes(self) -> int:
        """What will be read."""
        return sum(tensor_bytes(tensor) for name, tensor in self.record.tensors.items() if name.startswith(self.root))

    @property
    def default_name(self) -> str:
        """A name that tells where the weights come from."""
        run = self.store.uri.rstrip("/").rpartition("/")[2]
        return f"{run}-step-{self.record.step:08d}-{self.weights}{_ENDINGS[self.layout]}"


def plan_export(place: Place, *, layout: Layout, step: int | None = None, weights: Weights | None = None) -> Export:
    """The export of the newest checkpoint at `place`, or that of `step`; without `weights` the moving average if there is one.

    CheckpointError where there is no such checkpoint, no encoder in it, or another than its config says; ConfigError where
    `layout` cannot hold the encoder.
    """
    record = choose_checkpoint(place, step)
    taken = _choose_weights(place, record, weights)
    config = read_run_config(place.store)
    if config is None:
        raise CheckpointError(
            f"an encoder of {place.uri} was to be exported and there is no {CONFIG} in {place.store.uri}, "
            f"which says what encoder it is; put the {CONFIG} of its run there"
        )
    planned = Export(place.store, record, taken, layout, config.encoder, config.token_grid)
    _check_fits(planned)
    if layout != "safetensors" and config.encoder.positions != "sincos":
        raise ConfigError(
            f"{place.uri} was to be exported as {layout} and its encoder has {config.encoder.positions} positions; "
            f"the image ViT of {layout} adds a table to its tokens and cannot turn queries and keys: use --format safetensors"
        )
    return planned


def export_encoder(planned: Export, out: Path, progress: Progress, *, overwrite: bool = False) -> str:
    """Write the file, or for hf the folder, `out`; the answer is the Python that loads it.

    ConfigError where `out` is there and is not to be overwritten; an existing folder keeps its other files.
    """
    out = out.absolute()
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} was to be written and is there already; give another --out, or --overwrite")
    read = read_tensors(WatchedStore(planned.store, progress), planned.record, prefix=planned.root)
    weights = {name.removeprefix(planned.root): tensor for name, tensor in read.items()}
    if planned.layout == "hf":
        folder = open_store(out)
        folder.put("model.safetensors", save(hf_weights(weights, planned.grid), _metadata(planned)))
        folder.put("config.json", json.dumps(hf_config(planned.encoder, planned.grid), indent=2).encode() + b"\n")
    else:
        laid_out = timm_weights(weights, planned.grid) if planned.layout == "timm" else weights
        open_store(out.parent).put(out.name, save(laid_out, _metadata(planned)))
    return _how_to_load(planned, out)


def timm_weights(encoder: Mapping[str, Tensor], grid: Grid) -> dict[str, Tensor]:
    """Weights of a bare sin-cos encoder of clips with `grid` as timm names those of a ViT without class token."""
    return {
        "pos_embed": _image_positions(encoder, grid),
        "patch_embed.proj.weight": _still_kernel(encoder),
        "patch_embed.proj.bias": encoder["embed.bias"],
        **{name: tensor for name, tensor in encoder.items() if not name.startswith("embed.")},
    }


def hf_weights(encoder: Mapping[str, Tensor], grid: Grid) -> dict[str, Tensor]:
    """Weights of a bare sin-cos encoder of clips with `grid` as transformers stores those of its ViTs, without class token."""
    weights = {
        "embeddings.position_embeddings": _image_positions(encoder, grid),
        "embeddings.patch_embeddings.projection.weight": _still_kernel(encoder),
        "embeddings.patch_embeddings.projection.bias": encoder["embed.bias"],
    }
    for name, tensor in encoder.items():
        if fused := _HF_QKV.fullmatch(name):
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            weights |= {f"encoder.layer.{fused[1]}.attention.attention.{part}.{fused[2]}": piece for part, piece in parts}
        elif not name.startswith("embed."):
            weights[_hf_name(name)] = tensor
    return weights


def hf_config(encoder: EncoderConfig, grid: Grid) -> dict[str, object]:
    """config.json of the ViT without class token that `hf_weights` belong to."""
    shape, patch = encoder.shape, encoder.patch_px
    return {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.hidden,
        "hidden_act": "gelu",
        "layer_norm_eps": NORM_EPS,
        "image_size": [grid.h * patch, grid.w * patch],
        "patch_size": patch,
        "num_channels": 3,
        "qkv_bias": True,
    }


def _choose_weights(place: Place, record: Record, asked: Weights | None) -> Weights:
    there: list[Weights] = [
        kind for kind in ("ema", "model") if any(name.startswith(f"{kind}.encoder.") for name in record.tensors)
    ]
    if asked in there or (asked is None and there):
        return asked or there[0]
    kinds = " and ".join(there) or "no encoder at all"
    raise CheckpointError(
        f"the encoder{f' of --weights {asked}' if asked else ''} in {place.store.uri}/{record.prefix} was to be exported and the "
        f"checkpoint holds {kinds}; {f'use --weights {there[0]}' if there else 'give the checkpoint of a pre-training run'}"
    )


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


def _still_kernel(encoder: Mapping[str, Tensor]) -> Tensor:
    """The tubelet kernel of a frame that stands still (models.encoder)."""
    return encoder["embed.weight"].sum(dim=2)


def _image_positions(encoder: Mapping[str, Tensor], grid: Grid) -> Tensor:
    return sincos_table(Grid(1, 1, grid.h, grid.w), len(encoder["embed.bias"]), torch.device("cpu"))[None]


def _hf_name(name: str) -> str:
    for ours, theirs in _HF_RENAMES:
        if re.match(ours, name):
            return re.sub(f"^{ours}", theirs, name)
    raise AssertionError(f"{name} has no place in a ViT")


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
    if planned.layout == "hf":
        return f"transformers.AutoModel.from_pretrained({str(out)!r})"
    load = f"safetensors.torch.load_file({str(out)!r})"
    if planned.layout == "safetensors":
        return load
    encoder, grid = planned.encoder, planned.grid
    name = f"vit_{encoder.size}_patch{14 if encoder.size in _PATCH_14 else 16}_224"
    image = (grid.h * encoder.patch_px, grid.w * encoder.patch_px)
    return (
        f"model = timm.create_model({name!r}, pretrained=False, num_classes=0, class_token=False, global_pool='', "
        f"img_size={image}, patch_size={encoder.patch_px}); model.load_state_dict({load})"
    )
