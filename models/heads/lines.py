"""From features seen from above to lines of a map: a small MapTR (Liao et al. 2023).

Learnt queries attend to each other and to the cells of the map; each answers a class and all points of one line at once. MapTR has a
query a point and looks at few places by deformable attention; one query a line and full attention to cells of 2 x 2 averaged are
lighter, and are VectorMapNet's and DETR's (Carion et al. 2020). No losses at earlier blocks.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.attention import Segments, choose_backend, compute_dtype
from models.config import AttentionBackend, TransformerShape
from models.layers import DecoderBlock, Mlp, Norm, Pack, build_linear

_POOL = 2
"""Cells to a side of one that is attended to."""


class LineHead(nn.Module):
    """As many lines as there are queries: logits of classes, then points from -1 to 1 along both axes of the map."""

    def __init__(
        self,
        shape: TransformerShape,
        *,
        inputs: int,
        cells: tuple[int, int],
        queries: int,
        classes: int,
        points: int,
        attention: AttentionBackend = "auto",
    ) -> None:
        super().__init__()
        self.shape = shape
        self.attention = attention
        rows, columns = (-(-count // _POOL) for count in cells)
        self.embed = build_linear(inputs, shape.width)
        self.places = nn.Parameter(torch.empty(rows * columns, shape.width))
        self.queries = nn.Parameter(torch.empty(queries, shape.width))
        self.blocks = nn.ModuleList(DecoderBlock(shape) for _ in range(shape.depth))
        self.norm = Norm(shape.width)
        self.classes = build_linear(shape.width, classes)
        self.mlp = Mlp(shape.width, shape.width)
        self.points = build_linear(shape.width, 2 * points)
        nn.init.normal_(self.places, std=0.02)
        nn.init.normal_(self.queries)
        nn.init.constant_(self.classes.bias, -4.0)  # most queries find no line: as focal loss has it (Lin et al. 2017)

    def forward(self, features: Float[Tensor, "B E Y X"]) -> tuple[Float[Tensor, "B Q classes"], Float[Tensor, "B Q points 2"]]:
        """Float32."""
        B, Q = len(features), len(self.queries)
        cells = rearrange(F.avg_pool2d(features, _POOL, ceil_mode=True), "B E Y X -> B (Y X) E")
        memory = (self.embed(cells).float() + self.places.float()).flatten(0, 1)  # (B Y X, C)
        x = self.queries.float().expand(B, -1, -1).flatten(0, 1)  # (B Q, C)
        head_width = self.shape.width // self.shape.heads
        backend = choose_backend(self.attention, x.device, dtype=compute_dtype(x), head_width=head_width)
        own = Pack(Segments.of([(B, Q, Q)]), backend)
        across = Pack(Segments.of([(B, Q, cells.shape[1])]), backend)
        for block in self.blocks:
            x = block(x, memory, own, across)
        x = self.norm(x)
        points = torch.tanh(self.points(F.gelu(self.mlp(x))).float())
        return self.classes(x).float().unflatten(0, (B, Q)), rearrange(points, "(B Q) (p d) -> B Q p d", B=B, d=2)
