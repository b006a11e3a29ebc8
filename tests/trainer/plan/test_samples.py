"""Blank samples: whatever a run learns, its own preparation takes them."""

import pytest

from tests.trainer.plan.short import run_config
from trainer.plan.samples import build_blank_batch

MIM4D = {"kind": "mim4d", "volume": "tiny", "mask_cell_px": 8, "rays": 8}


@pytest.mark.parametrize(
    "objective",
    [
        {"kind": "croco", "decoder": "tiny"},
        {"kind": "mae", "decoder": "tiny"},
        {"kind": "simipu", "points": "tiny"},
        MIM4D,
        {"kind": "depth"},
        {"kind": "pose"},
        {"kind": "flow"},
        {"kind": "bev"},
        {"kind": "map"},
        {"kind": "detection"},
    ],
    ids=lambda objective: objective["kind"],
)
def test_every_objective_prepares_a_blank_sample(objective: dict[str, object]) -> None:
    frames = 4 if objective["kind"] in ("croco", "mae", "simipu", "mim4d") else 1
    data = {"kind": "synthetic", "root": "/data", "clip": {"frames": frames, "height_px": 16, "width_px": 24}}
    batch = build_blank_batch(run_config(objectives=[objective], data=data))
    assert len(batch) == 1
    tensors = [*batch.shared.values(), *batch.prepared[str(objective["kind"])].values()]
    assert tensors and all(len(tensor) == 1 for tensor in tensors)
