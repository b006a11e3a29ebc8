"""CroCo's whole published model, in and out: names of naver/croco's checkpoints against names of ours.

The encoder alone, for runs of video or another grid, goes through `models.layouts`.

Shapes are the same but for the patch embedding, a 2D convolution there and a tubelet kernel of one frame here. The two
position buffers that cosine models carry are constants; they are checked, not stored.

A file holds {'model': weights} (v1), or 'croco_kwargs' beside it (v2), or 'args' whose `model` is a constructor call as a
string (one's own pre-training); the string is read with ast, never evaluated, and files are read with weights_only.
"""

import argparse
import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from models.config import CrocoConfig, Grid, TransformerShape
from models.decoders import CrossViewDecoder
from models.encoder import VideoEncoder
from models.objectives.croco import CrocoObjective
from models.positions import sincos_table
from models.pretraining import PretrainingModel

_RENAMES = (
    (r"patch_embed\.proj\.", "encoder.embed."),
    (r"enc_blocks\.", "encoder.blocks."),
    (r"enc_norm\.", "encoder.norm."),
    (r"decoder_embed\.", "objectives.croco.decoder.embed."),
    (r"mask_token$", "objectives.croco.decoder.mask_token"),
    (r"dec_blocks\.", "objectives.croco.decoder.blocks."),
    (r"dec_norm\.", "objectives.croco.decoder.norm."),
    (r"prediction_head\.", "objectives.croco.decoder.head."),
)
_PATCH_KERNEL = "encoder.embed.weight"
_TABLES = ("enc_pos_embed", "dec_pos_embed")

_DEFAULTS: dict[str, Any] = {
    "img_size": 224,
    "patch_size": 16,
    "enc_embed_dim": 768,
    "enc_depth": 12,
    "enc_num_heads": 12,
    "dec_embed_dim": 512,
    "dec_depth": 8,
    "dec_num_heads": 16,
    "mlp_ratio": 4,
    "pos_embed": "cosine",
}


def build_official(kwargs: Mapping[str, Any]) -> PretrainingModel:
    """Our model with the architecture that the official constructor's keyword arguments describe."""
    settings = {**_DEFAULTS, **kwargs}
    if settings["pos_embed"] not in ("cosine", "RoPE100"):
        raise ValueError(f"pos_embed is {settings['pos_embed']}; cosine and RoPE100 are what CroCo published")
    positions: Literal["sincos", "rope"] = "sincos" if settings["pos_embed"] == "cosine" else "rope"
    patch = settings["patch_size"]
    height, width = _pair(settings["img_size"])
    grid = Grid(1, 1, height // patch, width // patch)
    encoder = VideoEncoder(_shape(settings, "enc"), patch_px=patch, tubelet_frames=1, positions=positions, has_time=False)
    decoder = CrossViewDecoder(
        _shape(settings, "dec"),
        encoder_width=encoder.shape.width,
        values=3 * patch**2,
        positions=positions,
        has_time=False,
    )
    return PretrainingModel(encoder, [CrocoObjective(CrocoConfig(), decoder, grid)], {"croco": 1.0})


def load_official(path: Path) -> PretrainingModel:
    """The model in a published checkpoint, or in one that the official pre-training wrote."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or "model" not in content:
        raise ValueError(f"{path} holds no 'model'; official CroCo checkpoints do")
    model = build_official(_read_kwargs(content))
    load_official_weights(model, content["model"])
    return model


def load_official_weights(model: PretrainingModel, weights: Mapping[str, Tensor]) -> None:
    """Fill `model` with weights under official names; ValueError lists names and shapes that do not fit."""
    _check_tables(model, weights)
    ours = {name: _to_ours(name, tensor) for name, tensor in weights.items() if name not in _TABLES}
    renamed = {rename_from_official(name): tensor for name, tensor in ours.items()}
    live = model.state_dict()
    wrong = [
        f"{name} {tuple(renamed[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in live.items()
        if name in renamed and renamed[name].shape != tensor.shape
    ]
    problems = [
        *(f"missing {name}" for name in sorted(live.keys() - renamed.keys())[:5]),
        *(f"unexpected {name}" for name in sorted(renamed.keys() - live.keys())[:5]),
        *wrong[:5],
    ]
    if problems:
        raise ValueError(f"these weights are not of this CroCo model: {'; '.join(problems)}")
    model.load_state_dict(renamed)


def export_official(model: PretrainingModel, grid: Grid) -> dict[str, Tensor]:
    """The weights of `model` under official names, with the position tables where it is a cosine model."""
    weights = {rename_to_official(name): tensor for name, tensor in model.state_dict().items()}
    kernel = weights["patch_embed.proj.weight"]
    if kernel.shape[2] != 1:
        raise ValueError(f"a kernel over {kernel.shape[2]} frames has no place in CroCo; export a model with tubelet_frames 1")
    weights["patch_embed.proj.weight"] = kernel[:, :, 0]
    if model.encoder.positions == "sincos":
        weights |= _tables(model, grid)
    return weights


def describe_official(model: PretrainingModel, grid: Grid) -> dict[str, Any]:
    """Keyword arguments of the official constructor for `model`, whose encoder is one of images with `grid`."""
    encoder, decoder = model.encoder, _objective_of(model).decoder
    patch = encoder.embed.patch_px
    parts = {"enc": encoder.shape, "dec": decoder.shape}
    assert all(shape.hidden == 4 * shape.width for shape in parts.values()), "CroCo has one ratio for both"
    sizes = {f"{part}_{name}": value for part, shape in parts.items() for name, value in _sizes(shape).items()}
    positions = "cosine" if encoder.positions == "sincos" else "RoPE100"
    return {"img_size": (grid.h * patch, grid.w * patch), "patch_size": patch, "mlp_ratio": 4, "pos_embed": positions, **sizes}


def rename_from_official(name: str) -> str:
    """Our name for an official one; unknown names stay, and are refused as unexpected."""
    for theirs, ours in _RENAMES:
        if re.match(theirs, name):
            return re.sub(rf"^{theirs}", ours, name)
    return name


def rename_to_official(name: str) -> str:
    """The official name for one of ours."""
    for theirs, ours in _RENAMES:
        if name.startswith(ours):
            return name.replace(ours, theirs.replace("\\", "").removesuffix("$"), 1)
    raise ValueError(f"{name} has no place in CroCo")


def _to_ours(name: str, tensor: Tensor) -> Tensor:
    return tensor[:, :, None] if rename_from_official(name) == _PATCH_KERNEL and tensor.ndim == 4 else tensor


def _read_kwargs(content: Mapping[str, Any]) -> dict[str, Any]:
    if "croco_kwargs" in content:
        return dict(content["croco_kwargs"])
    if "args" in content:
        return dict(_read_call(content["args"].model))
    return {}


def _read_call(text: str) -> Iterator[tuple[str, Any]]:
    """Keyword arguments of CroCo's constructor, called in `text`."""
    problem = ValueError(f"args.model is {text!r}, not CroCoNet(...) with keyword arguments that are literals")
    try:
        call = ast.parse(text, mode="eval").body
    except SyntaxError:
        raise problem from None
    if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name) or call.func.id != "CroCoNet":
        raise problem
    for keyword in call.keywords:
        # norm_layer=partial(...) is no literal, and always LayerNorm with eps 1e-6
        if keyword.arg == "norm_layer":
            continue
        try:
            value = ast.literal_eval(keyword.value)
        except ValueError:
            raise problem from None
        if keyword.arg is None:  # **something
            raise problem
        yield keyword.arg, value


def _shape(settings: Mapping[str, Any], part: str) -> TransformerShape:
    width = settings[f"{part}_embed_dim"]
    hidden = int(width * settings["mlp_ratio"])
    return TransformerShape(width, settings[f"{part}_depth"], settings[f"{part}_num_heads"], hidden)


def _sizes(shape: TransformerShape) -> dict[str, int]:
    return {"embed_dim": shape.width, "depth": shape.depth, "num_heads": shape.heads}


def _pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _tables(model: PretrainingModel, grid: Grid) -> dict[str, Tensor]:
    """The position tables of a cosine model, under their official names."""
    widths = (model.encoder.shape.width, _objective_of(model).decoder.shape.width)
    return {name: sincos_table(grid, width, torch.device("cpu")) for name, width in zip(_TABLES, widths, strict=True)}


def _check_tables(model: PretrainingModel, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that were trained with positions of another kind or another grid than the model's."""
    grid = _objective_of(model).grid
    found = sorted(weights.keys() & set(_TABLES))
    if model.encoder.positions == "rope":
        if found:
            raise ValueError(f"these weights carry {', '.join(found)}, so sin-cos positions, and the model has rotary ones")
        return
    for name, table in _tables(model, grid).items():
        if name not in weights:
            raise ValueError(f"these weights carry no {name}, so rotary positions, and the model has sin-cos ones")
        if weights[name].shape != table.shape or not torch.allclose(weights[name].cpu().float(), table, atol=1e-5):
            raise ValueError(
                f"{name} is not the sin-cos table of a grid of {grid.h} x {grid.w} patches; give the model that grid"
            )


def _objective_of(model: PretrainingModel) -> CrocoObjective:
    objective = model.objectives["croco"]
    assert isinstance(objective, CrocoObjective)
    return objective
