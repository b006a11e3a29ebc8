"""From the tokens of a pair to its pose there and back: mean over tokens, a small MLP, three metres and six numbers of a rotation.

The MLP is given what the means of both ways have in common, and how they differ, each normalised. Their sum says what is seen; their
difference alone knows who moved where, and of a young decoder's tokens it is so small a part that a head which reads means as they are
does not find it for hundreds of steps (docs/log.md).

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
    """Two rigid motions from the tokens of a pair."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = Mlp(2 * width, 2 * width)
        self.out = nn.Linear(2 * width, 9)
        nn.init.normal_(self.out.weight, std=0.02)
        with torch.no_grad():
            self.out.bias.copy_(torch.tensor((0.0, 0.0, 0.0, *_NO_TURN)))

    def forward(self, there: Float[Tensor, "B N C"], back: Float[Tensor, "B N C"]) -> Float[Tensor, "B 2 4 4"]:
        """The transform there and the one back in metres, float32, from the tokens of each image beside the other."""
        mean_there, mean_back = there.mean(dim=1), back.mean(dim=1)
        common, differing = self.norm(mean_there + mean_back), self.norm(mean_there - mean_back)  # (B, C)
        ways = torch.cat([torch.cat([common, differing], dim=1), torch.cat([common, -differing], dim=1)])  # (2 B, 2 C)
        numbers = self.out(F.gelu(self.mlp(ways))).float()  # (2 B, 9)
        return torch.stack(build_transform(numbers[:, :3], numbers[:, 3:]).chunk(2), dim=1)


def build_transform(translation_m: Float[Tensor, "B 3"], columns: Float[Tensor, "B 6"]) -> Float[Tensor, "B 4 4"]:
    """The rigid motion whose rotation is the Gram-Schmidt of two columns."""
    first = F.normalize(columns[:, :3], dim=-1)
    second = F.normalize(columns[:, 3:] - (first * columns[:, 3:]).sum(-1, keepdim=True) * first, dim=-1)
    moved = torch.stack([first, second, torch.linalg.cross(first, second), translation_m], dim=-1)  # (B, 3, 4)
    last = torch.zeros_like(moved[:, :1])
    last[..., 3] = 1
    return torch.cat([moved, last], dim=1)
