"""Where a token stands, told to a decoder that knows only how far apart tokens are.

Rotary positions turn queries and keys, so what cross-attention brings from the other image does not say where it came from; motion is
just that. The fixed sin-cos table through a linear layer, added to the tokens that are looked at, says so. The layer begins with zeros:
a decoder that was pre-trained begins as it was.
"""

from jaxtyping import Float
from torch import Tensor, nn

from models.config import Grid, TransformerShape
from models.positions import PositionTables


class PlaceSignal(nn.Module):
    """What is added to the tokens of an image."""

    def __init__(self, encoder: TransformerShape, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.tables = PositionTables("sincos", encoder, has_time=False)
        self.project = nn.Linear(encoder.width, encoder.width, bias=False)
        nn.init.zeros_(self.project.weight)

    def forward(self, tokens: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """The tokens with their places."""
        table = self.tables.added(self.grid, tokens.device)
        assert table is not None, "sin-cos positions are a table"
        return tokens + self.project(table)
