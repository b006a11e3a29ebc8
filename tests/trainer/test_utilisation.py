"""Utilisation: the operations of the whole batch over all ranks, and a peak that a device can reach."""

from typing import Any

import pytest
import torch

from models.config import Grid
from models.flops import train_flops
from tests.models.samples import CROCO, PATCH_PX, VIDEO_ENCODER, random_batch
from trainer.config.load import parse_run_config
from trainer.config.run import RunConfig
from trainer.parallel.launch import Launch, Mesh
from trainer.utilisation import find_peak_flops, measure_work

GRID = Grid(t=2, v=1, h=4, w=5)


def config_of(**parallel: Any) -> RunConfig:
    content = {
        "schema_version": 1,
        "steps": 4,
        "global_batch": 12,
        "run": {"uri": "/runs/first"},
        "data": {
            "kind": "synthetic",
            "root": "/data",
            "clip": {"frames": 4, "height_px": GRID.h * PATCH_PX, "width_px": GRID.w * PATCH_PX},
        },
        "encoder": {"size": "tiny", "patch_px": PATCH_PX, "tubelet_frames": 2},
        "objectives": [CROCO.model_dump()],
        "parallel": parallel,
    }
    return parse_run_config(content, origin="the test")


def launch_of(ranks: int) -> Launch:
    return Launch(0, 0, ranks, ranks, "fsdp2", "fp32", Mesh(1, ranks), reshard_after_forward=True)


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 12), (4, 3)])
def test_the_work_of_a_step_is_that_of_the_global_batch_however_it_is_spread(ranks: int, micro_batch: int) -> None:
    config = config_of()
    work = measure_work(config, launch_of(ranks), random_batch(VIDEO_ENCODER, GRID), micro_batch=micro_batch)
    assert work.flops["croco"].needed == 12 * train_flops(config.encoder, CROCO, config.token_grid)
    assert work.flops["croco"].again == 0


def test_recomputation_is_told_apart() -> None:
    work = measure_work(
        config_of(activation_checkpointing="full"), launch_of(2), random_batch(VIDEO_ENCODER, GRID), micro_batch=3
    )
    assert work.flops["croco"].needed == 12 * train_flops(config_of().encoder, CROCO, config_of().token_grid)
    assert work.flops["croco"].again > 0


def test_the_measured_peak_is_not_beaten_by_a_smaller_product() -> None:
    peak = find_peak_flops(torch.device("cpu"), "fp32")
    assert 1e8 < peak < 1e14


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_known_gpus_have_their_data_sheets_peak() -> None:
    if any(name in torch.cuda.get_device_name() for name in ("H100", "H200")):
        assert find_peak_flops(torch.device("cuda"), "bf16") == 989.4e12
    assert find_peak_flops(torch.device("cuda"), "fp32") > 1e12
