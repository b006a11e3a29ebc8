"""The FLOP formula against torch's own counter."""

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.config import CrocoConfig, EncoderConfig, Grid, MaskConfig
from models.flops import train_flops
from models.pretraining import build_model
from tests.models.samples import PATCH_PX, random_batch


@pytest.mark.parametrize("positions", ["rope", "sincos"])
@pytest.mark.parametrize(("tubelet_frames", "grid"), [(1, Grid(1, 1, 4, 5)), (2, Grid(2, 1, 2, 3))], ids=["image", "video"])
def test_a_step_takes_the_operations_that_torch_counts(positions: str, tubelet_frames: int, grid: Grid) -> None:
    encoder = EncoderConfig(size="tiny", patch_px=PATCH_PX, tubelet_frames=tubelet_frames, positions=positions)
    croco = CrocoConfig(decoder="tiny", mask=MaskConfig(ratio=0.75))
    batch = random_batch(encoder, grid, croco=croco)
    # plain matrix products, since the counter does not know the fused kernel of the CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        build_model(encoder, [croco], grid)(batch, "train").total.backward()
    assert counter.get_total_flops() == len(batch) * train_flops(encoder, croco, grid)


def test_croco_base_takes_the_published_operations() -> None:
    # 53.3 GFLOP is a forward; training is three of them, less the patch embedding's input gradient, under 1 %
    needed = train_flops(EncoderConfig(size="base"), CrocoConfig(decoder="small"), Grid(1, 1, 14, 14))
    assert needed / 3 == pytest.approx(53.3e9, rel=0.01)
