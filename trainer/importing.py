"""Published weights as a run that others start from: `odonata import`.

    FILE -> tensors -> which layout? -> the encoder of RUN.yaml -> checkpoints/ (step 0), config.yaml, import.json at --out

What comes out is a run that has taken no step, so `warm_start.uri`, `odonata evaluate`, `odonata export` and `odonata checkpoints` know it
already. import.json says where the weights come from (name, size and SHA-256 of the file) and what was done to them.

Safetensors are preferred. Pickles (.pth, .pt, .bin) are read by torch's weights_only, which builds tensors and plain values and calls
nothing; one that needs more is refused. Features of still images stay those of the published model but for the resampling of positions,
which is named. One thing more may change them: CroCo's rotary positions in an encoder that knows time, where a part of every
head then turns by time; how far features move is measured, on noise, and said.

Left to whom: names and shapes are `models.layouts`', CroCo's whole model `models.official_croco`'s.
"""

import argparse
import hashlib
import json
import logging
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.config import EncoderConfig, Grid
from models.encoder import ClipGroup, build_encoder
from models.layouts.own import Exported
from models.layouts.plain import FittedEncoder, Pixels, fit_encoder
from models.layouts.published import Published, read_published, recognise
from models.official_croco import load_official_weights
from models.pretraining import build_model
from trainer.checkpoint.manager import save_weights
from trainer.checkpoint.tools import CONFIG, holds_run
from trainer.config.load import dump_run_config
from trainer.config.run import RunConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.store.open import open_store

log = logging.getLogger(__name__)

IMPORT = "import.json"
Parts = Literal["encoder", "model"]

_WRAPPERS = ("model", "state_dict", "module")
_LAYOUTS = "CroCo, timm, DINOv2, MAE, VideoMAE, a ViT of transformers, or an encoder of `odonata export`"
_HASHED_BYTES = 16 * 2**20


@dataclass(frozen=True)
class WeightsFile:
    """What a file holds."""

    path: Path
    tensors: Mapping[str, Tensor]
    exported: Exported | None
    """What it says of itself, if `odonata export` has written it."""


def import_weights(path: Path, config: RunConfig, *, parts: Parts = "encoder", pixels: Pixels = "imagenet") -> list[str]:
    """Write the weights in `path` as a checkpoint of step 0 at the `run.uri` of `config`; the answer is what was done to them.

    `model` takes CroCo's decoder along, `pixels` says how images were normalised. CheckpointError where the file cannot be used, or is
    not of the encoder in `config`; ConfigError where a run lies at its `run.uri` already.
    """
    store = open_store(config.run.uri, config.store)
    if holds_run(store):
        raise ConfigError(f"{path} was to be imported into {store.uri} and a run lies there; give another --out")
    file = read_weights(path)
    layout = recognise(set(file.tensors))
    if layout is None:
        raise CheckpointError(
            f"{path} was to be imported and none of its {len(file.tensors)} names ({', '.join(sorted(file.tensors)[:3])}, ...) says "
            f"that it is a ViT that is known here; give weights of {_LAYOUTS}"
        )
    try:
        if parts == "model":
            state, changes = _take_model(file, layout, config)
        else:
            vit = read_published(file.tensors, layout, config.token_grid, exported=file.exported, pixels=pixels)
            fitted = fit_encoder(vit, config.encoder, config.token_grid)
            state, changes = _take_encoder(fitted, config.encoder, config.token_grid)
    except ValueError as error:
        raise CheckpointError(f"{path} was to be imported, by its names {layout}, and cannot be: {error}") from error
    _save(config, state, {"layout": layout, "pixels": pixels, "parts": parts, "changes": changes, **_describe(path)})
    return changes


def read_weights(path: Path) -> WeightsFile:
    """The tensors of a safetensors file or of a pickle that holds nothing else of note; CheckpointError where it is neither."""
    if not path.is_file():
        inside = next(path.glob("*.safetensors"), "one of weights, .safetensors or .pth")
        raise CheckpointError(f"{path} was to be imported and is not a file; give {inside}")
    if _is_safetensors(path):
        return _read_safetensors(path)
    try:
        # The configuration that CroCo's own pre-training saves beside its weights; it holds plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, OSError, LookupError, struct.error) as error:
        raise CheckpointError(
            f"{path} was to be imported and cannot be read as tensors and plain values alone ({_why_unreadable(error)}); "
            "give weights as safetensors or as torch.save writes them; what you trust you can save as safetensors"
        ) from error
    return WeightsFile(path, _find_tensors(path, content), None)


def _is_safetensors(path: Path) -> bool:
    """By its name, or by the JSON that begins after the eight bytes of its length."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _why_unreadable(error: Exception) -> str:
    """In our words where torch's are about itself: they advise to trust the file."""
    if found := re.search(r"GLOBAL (\S+) was not", str(error)):
        return f"it needs {found[1]}"
    if isinstance(error, RuntimeError | OSError | EOFError):  # of the reader of archives
        return "it is cut short, or a program and no weights"
    return "it holds something else"


def _read_safetensors(path: Path) -> WeightsFile:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} was to be imported and is no whole safetensors file ({error}); fetch it again") from error
    return WeightsFile(path, tensors, _read_exported(path, metadata) if "odonata_version" in metadata else None)


def _read_exported(path: Path, metadata: Mapping[str, str]) -> Exported:
    try:
        return Exported(EncoderConfig.model_validate_json(metadata["encoder"]), Grid(**json.loads(metadata["grid"])))
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} was to be imported, says that odonata {metadata['odonata_version']} wrote it, and of its encoder what is not known "
            f"here ({str(error).partition(chr(10))[0]}); import it with that version, or export it again"
        ) from error


def _find_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """The weights in `content`, bare or under one of the usual names."""
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if isinstance(content, Mapping) and content and all(isinstance(tensor, Tensor) for tensor in content.values()):
        return dict(content)
    found = (
        f"the keys {', '.join(sorted(map(str, content))[:5])}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    )
    raise CheckpointError(
        f"{path} was to be imported and holds {found}, not weights by name; they may lie bare or under {', '.join(_WRAPPERS)}"
    )


def _take_encoder(fitted: FittedEncoder, config: EncoderConfig, grid: Grid) -> tuple[dict[str, Tensor], list[str]]:
    """The encoder's weights under their names in a run; ValueError where shapes are not those of `config`."""
    changes = list(fitted.changes)
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in build_encoder(config, grid).state_dict().items()}
    wrong = sorted(name for name, tensor in fitted.weights.items() if expected.get(name) != tensor.shape)
    if wrong or len(expected) != len(fitted.weights):
        raise ValueError(f"shapes are not those of the run's encoder: {', '.join(wrong[:5])}")
    if config.positions == "rope" and config.knows_time(grid) != fitted.turned_by_time:
        part = "no part of a head" if fitted.turned_by_time else "a part of every head"
        change = _measure_change(fitted, config, grid)
        changes.append(f"{part} turns by time: features of a still image move by {change:.0%} of their deviation")
    return {f"encoder.{name}": tensor for name, tensor in fitted.weights.items()}, changes


def _take_model(file: WeightsFile, layout: Published, config: RunConfig) -> tuple[dict[str, Tensor], list[str]]:
    """CroCo's whole model, which must be that of the run to the last shape."""
    if [objective.kind for objective in config.objectives] != ["croco"]:
        raise ValueError("the run has other objectives than CroCo alone; take --parts encoder")
    if config.encoder.knows_time(config.token_grid) or config.encoder.registers or config.encoder.positions == "learned":
        raise ValueError(
            "CroCo's model is of images, without registers and learned positions, the run's is not; take --parts encoder"
        )
    if layout != "croco":
        raise ValueError("it holds no decoder of CroCo; take --parts encoder")
    model = build_model(config.encoder, config.objectives, config.token_grid)
    load_official_weights(model, file.tensors)
    return model.state_dict(), []


@torch.no_grad()
def _measure_change(fitted: FittedEncoder, config: EncoderConfig, grid: Grid) -> float:
    """How far features of noise move, of their deviation, because positions know time, or no longer do: root mean squares."""
    image = torch.randn(
        1, 1, 1, 3, grid.h * config.patch_px, grid.w * config.patch_px, generator=torch.Generator().manual_seed(0)
    )
    features = []
    for has_time in (fitted.turned_by_time, config.knows_time(grid)):
        encoder = build_encoder(config.model_copy(update={"has_time": has_time}), grid).eval()
        encoder.load_state_dict(fitted.weights)
        features.append(encoder([ClipGroup(image)])[0])
    before, after = features
    return float((after - before).square().mean().sqrt() / before.std())


def _save(config: RunConfig, weights: Mapping[str, Tensor], origin: Mapping[str, Any]) -> None:
    store = open_store(config.run.uri, config.store)
    save_weights(store, weights, config.checkpoint, step=0, engine="import")
    store.put(IMPORT, json.dumps(origin, indent=2).encode() + b"\n")
    store.put(CONFIG, dump_run_config(config).encode())


def _describe(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_HASHED_BYTES):
            digest.update(piece)
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": digest.hexdigest(),
        "odonata_version": version("odonata"),
    }
