"""Floating-point operations that a CroCo step needs: what the algorithm asks for, not what a kernel happens to do.

Per sequence of n tokens, width C, hidden width M: a block multiplies n by 4 C^2 + 2 C M weights, and attention costs
4 C n^2 (scores and sum, both directions, none halved); a multiply-add is two operations. Training is three times the forward,
but for the patch embedding, which needs no gradient of its input: two times. Masked tokens that are dropped do not count,
and neither does recomputation.
"""

from models.config import DECODER_SHAPES, CrocoConfig, EncoderConfig, Grid, TransformerShape
from models.masking import count_visible


def train_flops(encoder: EncoderConfig, objective: CrocoConfig, grid: Grid) -> int:
    """Operations of forward and backward for one pair of clips with `grid`."""
    visible, tokens = count_visible(grid, objective.mask), grid.tokens
    shape, decoder = encoder.shape, DECODER_SHAPES[objective.decoder]
    pixels = 3 * encoder.tubelet_frames * encoder.patch_px**2
    embedding = 2 * shape.width * pixels * (visible + tokens)
    encoding = sum(shape.depth * _block(shape, encoder.registers + n) for n in (visible, tokens))
    bridging = 2 * shape.width * decoder.width * (visible + tokens)
    decoding = decoder.depth * (_block(decoder, tokens) + _cross_attention(decoder, tokens))
    predicting = 2 * decoder.width * pixels * tokens
    return 2 * embedding + 3 * (encoding + bridging + decoding + predicting)


def _block(shape: TransformerShape, n: int) -> int:
    """Forward of self-attention and MLP."""
    weights = 4 * shape.width**2 + 2 * shape.width * shape.hidden
    return 2 * weights * n + 4 * shape.width * n**2


def _cross_attention(shape: TransformerShape, n: int) -> int:
    """Forward of four projections, half of them of the other view's n tokens, and of attention to it."""
    return 2 * 4 * shape.width**2 * n + 4 * shape.width * n**2
