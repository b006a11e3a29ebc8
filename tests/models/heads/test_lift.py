"""The lift that tasks around the car share: where its cells lie, which camera they come from, and that all of it learns."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from models.config import LiftConfig
from models.geometry import voxel_centres
from models.heads.lift import BevLift, HeightHead, build_bev_grid, build_bev_lift
from models.volumes import DepthBins

CONFIG = LiftConfig(range_m=16, cell_m=1, far_m=17, depth_bins=8, channels=8, width=16)
PATCH_PX, H, W, C = 8, 4, 8, 12


def pix_from_ego(*yaws: float) -> torch.Tensor:
    """1 V 3 4 of cameras a metre above the ground, 90 degrees wide, that look where they are turned to."""
    focal = W * PATCH_PX / 2
    pix_from_cam = torch.tensor([[focal, 0, W * PATCH_PX / 2], [0, focal, H * PATCH_PX / 2], [0, 0, 1]])
    matrices = []
    for yaw in yaws:
        right, down, ahead = (math.sin(yaw), -math.cos(yaw), 0.0), (0.0, 0.0, -1.0), (math.cos(yaw), math.sin(yaw), 0.0)
        rotation = torch.tensor([right, down, ahead])
        matrices.append(pix_from_cam @ torch.cat([rotation, -rotation @ torch.tensor([[0.0], [0.0], [1.0]])], dim=1))
    return torch.stack(matrices)[None]


def fresh() -> BevLift:
    torch.manual_seed(0)
    return build_bev_lift(CONFIG, encoder_width=C, patch_px=PATCH_PX)


def present(*cameras: bool) -> torch.Tensor:
    return torch.tensor([cameras])


def test_columns_run_ahead_and_rows_to_the_left() -> None:
    x, y, z = voxel_centres(build_bev_grid(50.0, 0.5), torch.device("cpu"))[0, 3, 7].tolist()
    assert (x, y, z) == (-50 + 7.5 * 0.5, -50 + 3.5 * 0.5, 1.0)
    assert build_bev_grid(50.0, 0.5).zyx == (1, 200, 200)


@pytest.mark.parametrize("yaw", [0.0, math.pi / 2, -2.0])
def test_a_camera_is_lifted_into_the_cone_that_it_sees_and_nowhere_else(yaw: float) -> None:
    lift = fresh()
    folded: list[torch.Tensor] = []
    with lift.fold.register_forward_hook(lambda _module, _inputs, output: folded.append(output)):
        lift(torch.randn(1, 1, H, W, C), pix_from_ego(yaw), present(True))
    lies_in = folded[0][0].abs().sum(0) > 0
    x, y, _ = voxel_centres(lift.grid, torch.device("cpu"))[0].unbind(-1)
    ahead, left = x * math.cos(yaw) + y * math.sin(yaw), y * math.cos(yaw) - x * math.sin(yaw)
    assert (left.abs()[lies_in] <= ahead[lies_in]).all()  # 90 degrees wide
    seen = (left.abs() < ahead) & (ahead > 4) & (ahead < 16)
    assert lies_in[seen].all() and seen.sum() > 50


def test_an_absent_camera_changes_nothing_whatever_it_holds() -> None:
    lift, matrices = fresh(), pix_from_ego(0, math.pi)
    tokens = torch.randn(1, 2, H, W, C)
    changed = tokens.clone()
    changed[:, 1] = torch.randn(H, W, C)
    torch.testing.assert_close(lift(tokens, matrices, present(True, False)), lift(changed, matrices, present(True, False)))
    assert not torch.allclose(lift(tokens, matrices, present(True, True)), lift(changed, matrices, present(True, True)))


def test_a_patch_that_is_on_the_ground_is_lifted_to_where_its_line_of_sight_meets_it() -> None:
    bins = DepthBins(1.0, 17.0, 64)
    head = HeightHead(C, bins)
    nn.init.zeros_(head.out.weight)
    nn.init.zeros_(head.out.bias)
    head.out.bias.data[round(2.0 / 0.5)] = 50.0  # heights begin 2 m below the ground, half a metre apart
    yaws = (0.0, 2.5)
    logits = head(torch.randn(1, len(yaws), H, W, C), pix_from_ego(*yaws), (H * PATCH_PX, W * PATCH_PX))
    depth_m = (logits.softmax(-1) * (bins.near_m + bins.size_m * (torch.arange(bins.count) + 0.5))).sum(-1)
    # The camera is a metre up; a patch whose centre is `below` under the horizon, in focal lengths, sees the ground 1 / below ahead.
    below = ((torch.arange(H) + 0.5) * PATCH_PX - H * PATCH_PX / 2) / (W * PATCH_PX / 2)
    for row in range(H):
        if below[row] > 0:
            torch.testing.assert_close(depth_m[0, :, row], (1 / below[row]).expand(len(yaws), W), rtol=0.02, atol=bins.size_m / 2)
        else:
            torch.testing.assert_close(depth_m[0, :, row].max(), depth_m[0, :, row].min())


def test_every_parameter_learns_and_features_are_of_the_size_asked_for() -> None:
    lift = fresh()
    features = lift(torch.randn(2, 2, H, W, C), pix_from_ego(0, math.pi).expand(2, -1, -1, -1), present(True, True).expand(2, -1))
    assert features.shape == (2, CONFIG.width, 32, 32)
    features.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in lift.parameters())


def test_a_cell_that_does_not_divide_the_range_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"cell_m 0\.7 does not divide the 100\.0 m from side to side"):
        LiftConfig(cell_m=0.7)
