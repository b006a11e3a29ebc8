"""The FLOP formula and the count on fake tensors against torch's own counter of the real model."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.batch import Batch
from models.config import CrocoConfig, EncoderConfig, Grid, MaeConfig, MaskConfig, ObjectiveConfig
from models.flops import Flops, ShapedPeers, count_flops, train_flops
from models.pretraining import build_model, build_preparations
from tests.models.samples import (
    CROCO,
    MIM4D,
    PATCH_PX,
    SIMIPU,
    SURROUND_CAMERAS,
    VIDEO_ENCODER,
    VIDEO_GRID,
    random_batch,
    surround_batch,
    surround_sample,
)
from trainer.parallel.blocks import recompute_activations

MAE = MaeConfig(decoder="tiny")
WIDE_GRID = Grid(t=2, v=1, h=2, w=4)


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


def surround(objective: ObjectiveConfig) -> Batch:
    preparations = build_preparations([objective], WIDE_GRID, VIDEO_ENCODER, cameras=SURROUND_CAMERAS)
    return surround_batch(preparations, [surround_sample(WIDE_GRID, seed=seed) for seed in range(2)])


def count(objective: ObjectiveConfig, batch: Batch, *, grid: Grid = WIDE_GRID, samples: int = 2, ranks: int = 1) -> Flops:
    peers = ShapedPeers(ranks)
    return count_flops(
        lambda: build_model(VIDEO_ENCODER, [objective], grid, cameras=SURROUND_CAMERAS, peers=peers), batch, samples=samples
    )


@pytest.mark.parametrize("objective", [CROCO, MAE], ids=lambda objective: objective.kind)
def test_the_count_on_fake_tensors_is_the_formula(objective: CrocoConfig | MaeConfig) -> None:
    batch = random_batch()
    prepared = {"mae": batch.prepared["croco"], **batch.prepared}
    counted = count(objective, Batch(batch.shared, prepared, batch.clips), grid=VIDEO_GRID, samples=5)
    if objective is MAE:  # whose share of visible tokens is the same
        assert MAE.mask.ratio == CROCO.mask.ratio
    assert counted == Flops(needed=5 * train_flops(VIDEO_ENCODER, objective, VIDEO_GRID), again=0)


@pytest.mark.parametrize("objective", [SIMIPU, MIM4D], ids=lambda objective: objective.kind)
def test_the_count_on_fake_tensors_is_that_of_the_real_model(objective: ObjectiveConfig) -> None:
    batch = surround(objective)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        build_model(VIDEO_ENCODER, [objective], WIDE_GRID, cameras=SURROUND_CAMERAS)(batch, "train").total.backward()
    counted = count(objective, batch)
    assert counted.needed + counted.again == counter.get_total_flops()
    assert (counted.again > 0) == (objective is MIM4D), "the renderer is recomputed, and nothing else"


def test_negatives_of_other_ranks_cost_their_logits() -> None:
    batch = surround(SIMIPU)
    alone, of_four = (count(SIMIPU, batch, ranks=ranks).needed for ranks in (1, 4))
    pairs = 2 * SIMIPU.shape.centres  # of two samples
    logits = 2 * pairs * (3 * pairs) * SIMIPU.embedding  # of one contrast with the pairs of three more ranks
    # Forward and twice backward between images and points; between the views once backward, for the second one has no gradients.
    assert of_four - alone == (3 + 2) * logits


def test_activation_checkpointing_is_told_apart_as_blocks_made_again() -> None:
    def build() -> torch.nn.Module:
        model = build_model(VIDEO_ENCODER, [CROCO], VIDEO_GRID)
        recompute_activations(model, "full")
        return model

    counted = count_flops(build, random_batch(), samples=1)
    assert counted.needed == train_flops(VIDEO_ENCODER, CROCO, VIDEO_GRID)
    assert 0.2 < counted.again / counted.needed < 1 / 3  # a forward is a third, and embedding and head are not made again
