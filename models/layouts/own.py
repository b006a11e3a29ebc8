"""Our own encoder, as `odonata export --format safetensors` wrote it: names as they are, and a word of the file on what encoder it is.

Any encoder comes in again as it went out; for a run of other clips or of another tubelet it changes as any other does. What its positions
are no name tells, so the file must.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from models.config import EncoderConfig, Grid
from models.encoder import build_encoder
from models.layouts.plain import PlainVit
from models.positions import sincos_table


class Exported(NamedTuple):
    """What a file that `odonata export` has written says of itself."""

    encoder: EncoderConfig
    grid: Grid
    """Of the clips that it was trained on."""

    @property
    def image_grid(self) -> Grid:
        """Of one frame of one camera."""
        return Grid(1, 1, self.grid.h, self.grid.w)


def read_own(weights: Mapping[str, Tensor], exported: Exported | None) -> PlainVit:
    """The ViT in `weights`; ValueError where the file does not say what it is, or not the truth."""
    if exported is None:
        raise ValueError("it has our names and does not say which encoder it is; give the file as `odonata export` wrote it")
    with torch.device("meta"):
        expected = build_encoder(exported.encoder, exported.grid).state_dict()
    if differing := sorted(expected.keys() ^ weights.keys()):
        raise ValueError(f"{differing[0]} is missing, or too much, by what it says of its encoder; export it again")
    return PlainVit(
        blocks={name: tensor for name, tensor in weights.items() if name.startswith(("blocks.", "norm."))},
        kernel=weights["embed.weight"],
        bias=weights["embed.bias"],
        table=_table_of(weights, exported),
        registers=weights.get("registers"),
        turns_by_time=exported.encoder.positions == "rope" and exported.encoder.knows_time(exported.grid),
    )


def _table_of(weights: Mapping[str, Tensor], exported: Exported) -> Tensor | None:
    """As PlainVit has it: of fixed positions that are added, the table of an image, since that of a clip is computed."""
    match exported.encoder.positions:
        case "learned":
            return weights["table.weight"]
        case "sincos":
            grid = exported.image_grid
            return sincos_table(grid, exported.encoder.shape.width, torch.device("cpu")).unflatten(0, (1, grid.h, grid.w))
        case "rope":
            return None
