"""The encoder as a graph of plain operators, for programs that know neither this package nor Python: torch.export and ONNX.

The batch may have any size; frames, cameras and pixels are fixed, and with them positions, which become constants. Attention goes through
torch's SDPA, which both formats know, whatever kernel trained it. Weights and activations are float32.
"""

import logging
import warnings
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.encoder import ClipGroup, VideoEncoder
from trainer.errors import ConfigError

INPUT, OUTPUT = "images", "tokens"
ClipShape = tuple[int, int, int, int, int]
"""Frames, cameras, 3, height and width."""
_INLINE_BYTES = 2**31 - 2**24  # protobuf's largest message, less the graph


class ClipEncoder(nn.Module):
    """Whole clips of one shape in, their tokens out."""

    def __init__(self, encoder: VideoEncoder) -> None:
        super().__init__()
        encoder.attention = "sdpa"
        self.encoder = encoder.eval()

    def forward(self, images: Float[Tensor, "B T V 3 H W"]) -> Float[Tensor, "B N C"]:
        """Tokens in the order (t, v, y, x), normalised."""
        return self.encoder([ClipGroup(images)])[0]


@torch.no_grad()
def write_torch_export(encoder: VideoEncoder, clip: ClipShape, path: Path) -> None:
    """A .pt2 file of the program of `encoder` for clips of this shape."""
    model, example = _prepare(encoder, clip)
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}}), path)


@torch.no_grad()
def write_onnx(encoder: VideoEncoder, clip: ClipShape, path: Path) -> None:
    """An ONNX file of `encoder` for clips of this shape, with its weights in it; ConfigError where ONNX's packages are missing.

    A model of 2 GB and more has its weights in a file of the same name with .data at its end, as ONNX wants it.
    """
    try:
        import onnxscript  # noqa: F401 (what torch.onnx builds with)
    except ImportError as error:
        raise ConfigError(f"an ONNX file was asked for and {error}; install this package with its extra onnx") from error
    model, example = _prepare(encoder, clip)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter about itself
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
        )
    assert program is not None, "dynamo=True gives a program"
    parameters_bytes = sum(tensor.nbytes for tensor in encoder.state_dict().values())
    program.save(path, external_data=parameters_bytes >= _INLINE_BYTES)


def _prepare(encoder: VideoEncoder, clip: ClipShape) -> tuple[ClipEncoder, Float[Tensor, "B T V 3 H W"]]:
    """What is traced, and on what: two clips, since a batch of one would be taken for a constant."""
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    model, example = ClipEncoder(encoder), torch.zeros(2, *clip)
    model(example)  # tables of positions are made outside of the trace, so that it takes them for constants
    return model, example
