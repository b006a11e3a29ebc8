"""A model of known weights and memory, as if it had been traced, and a small run."""

from typing import Any

import numpy as np

from models.flops import Flops
from trainer.config.load import parse_run_config
from trainer.config.run import RunConfig
from trainer.config.training import Recompute
from trainer.plan.trace import CATEGORIES, Timeline
from trainer.plan.tracing import Model, Traced
from trainer.plan.weights import Unit, Weight, Weights

BLOCKS = 10
BLOCK_ROWS, BLOCK_COLUMNS = 1024, 2048
BLOCK = BLOCK_ROWS * BLOCK_COLUMNS
"""Elements."""
ROOT = 512 * 16
ELEMENTS = BLOCKS * BLOCK + ROOT
SAMPLE_BYTES = 1000.0
"""Activations of a sample in a block."""
SHARDS = 8


def run_config(**changes: Any) -> RunConfig:
    content = {
        "schema_version": 1,
        "steps": 3600,
        "global_batch": 64,
        "run": {"uri": "/runs/planned"},
        "data": {"kind": "synthetic", "root": "/data", "clip": {"frames": 2, "height_px": 16, "width_px": 24}},
        "encoder": {"size": "tiny", "patch_px": 8, "tubelet_frames": 2},
        "objectives": [{"kind": "croco", "decoder": "tiny", "mask": {"ratio": 0.5}}],
        "parallel": {"prefetch_blocks": 0},
    }
    return parse_run_config(content | changes, origin="a test")


def weights() -> Weights:
    block = Unit((Weight(BLOCK_ROWS, BLOCK_COLUMNS, True, True),), is_block=True, is_float32=False)
    root = Unit((Weight(512, 16, True, False),), is_block=False, is_float32=False)
    return Weights((*[block] * BLOCKS, root))


def model(sample_bytes: float = SAMPLE_BYTES) -> Model:
    """Of which two blocks were traced; recomputation keeps a half of the activations for nothing, or a tenth for a forward more."""
    kinds: dict[Recompute, tuple[int, float]] = {"none": (0, 1.0), "selective": (0, 0.5), "full": (1, 0.1)}
    traced = {
        what: Traced(
            SHARDS,
            (timeline(2, keep * sample_bytes), timeline(3, keep * sample_bytes)),
            (Flops(int(2e9), again * int(1e9)), Flops(int(3e9), again * int(1e9))),
            missing=(BLOCKS - 2,),
        )
        for what, (again, keep) in kinds.items()
    }
    return Model(weights(), width=64, tokens_per_sample=100, traced=traced)


def timeline(blocks: int, sample_bytes: float) -> Timeline:
    """Activations come block by block; while they go, gradients of the shards come; each block is gathered for itself."""
    gathered, gradient = 2.0 * BLOCK, 4.0 * BLOCK / SHARDS
    forward = [("gathered", gathered, 0.0), ("activations", 0.0, sample_bytes), ("gathered", -gathered, 0.0)] * blocks
    backward = [("activations", 0.0, -sample_bytes), ("gradients", gradient, 0.0)] * blocks
    events = [*forward, *backward]
    return Timeline(
        category=np.array([CATEGORIES.index(name) for name, _, _ in events]),
        fixed_bytes=np.array([fixed for _, fixed, _ in events]),
        sample_bytes=np.array([of_sample for _, _, of_sample in events]),
        fixed_traffic=0.0,
        sample_traffic=blocks * 1e6,
        peer_bytes=0.0,
        peer_gradient_bytes=0.0,
    )
