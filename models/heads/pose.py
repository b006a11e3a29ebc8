"""From the tokens of a pair to a relative pose: mean over tokens, a small MLP, three metres and six numbers of a rotation.

The six numbers are the first two columns of a rotation before they are made orthonormal (Zhou et al. 2019, "On the Continuity of Rotation
Representations in Neural Networks"): unlike quaternions and angles they have no jump for a network to learn. A
fresh head answers a motion near none.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.layers import Mlp

_NO_TURN = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


class PoseHead(nn.Module):
    """A rigid motion from the tokens of a pair."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = Mlp(width, width)
        self.out = nn.Linear(width, 9)
        nn.init.normal_(self.out.weight, std=0.02)
        with torch.no_grad():
            self.out.bias.copy_(torch.tensor((0.0, 0.0, 0.0, *_NO_TURN)))

    def forward(self, tokens: Float[Tensor, "B N C"]) -> Float[Tensor, "B 4 4"]:
        """A transform in metres, float32."""
        numbers = self.out(F.gelu(self.mlp(tokens.mean(dim=1)))).float()  # (B, 9)
        return build_transform(numbers[:, :3], numbers[:, 3:])


def build_transform(translation_m: Float[Tensor, "B 3"], columns: Float[Tensor, "B 6"]) -> Float[Tensor, "B 4 4"]:
    """The rigid motion whose rotation is the Gram-Schmidt of two columns."""
    first = F.normalize(columns[:, :3], dim=-1)
    second = F.normalize(columns[:, 3:] - (first * columns[:, 3:]).sum(-1, keepdim=True) * first, dim=-1)
    moved = torch.stack([first, second, torch.linalg.cross(first, second), translation_m], dim=-1)  # (B, 3, 4)
    last = torch.zeros_like(moved[:, :1])
    last[..., 3] = 1
    return torch.cat([moved, last], dim=1)
