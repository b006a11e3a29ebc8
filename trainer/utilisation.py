"""What part of the device's arithmetic a run uses: operations of a step, counted on its own model, over the peak of its devices.

    MFU = needed operations of the whole batch / (seconds of the step x ranks x peak)       HFU counts recomputation as well

Seconds are the whole step's, waiting for data included. The peak is the dense bf16 one of `trainer.hardware`; for what is not in
it (other GPUs, fp32, CPUs) it is the best of some large matrix products measured here, so the share is of what this
machine can do.

Left to whom: operations are `models.flops`, exporting is `trainer.observe.metrics`.
"""

import time

import torch
from torch import nn

from models.batch import Batch
from models.config import ObjectiveConfig
from models.flops import Flops, ShapedPeers, count_flops
from trainer.assembly import assemble_model
from trainer.config.run import RunConfig
from trainer.hardware import read_gpus
from trainer.observe.metrics import Work
from trainer.parallel.blocks import recompute_activations
from trainer.parallel.launch import Launch

_SIDE = {"cpu": 1024, "cuda": 8192}
_PRODUCTS = 16


def measure_work(config: RunConfig, launch: Launch, batch: Batch, *, micro_batch: int) -> Work:
    """Count on fake tensors with the shapes of `batch`; nothing is communicated."""
    micro_batches = config.global_batch // micro_batch
    peers = ShapedPeers(launch.world_size)

    def count(objective: ObjectiveConfig) -> Flops:
        def build() -> nn.Module:
            model = assemble_model(config.model_copy(update={"objectives": (objective,)}), peers=peers)
            recompute_activations(model, config.parallel.activation_checkpointing)
            return model

        of_one = count_flops(build, batch, samples=micro_batch)
        return Flops(micro_batches * of_one.needed, micro_batches * of_one.again)

    peak = find_peak_flops(launch.device, launch.precision) * launch.world_size
    return Work({objective.kind: count(objective) for objective in config.objectives}, peak)


def find_peak_flops(device: torch.device, precision: str) -> float:
    """Operations a second that one device can do."""
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        for gpu in read_gpus().values():
            if gpu.device_name in name:
                return gpu.bf16_flops
    return _measure_peak_flops(device, torch.bfloat16 if precision == "bf16" else torch.float32)


def _measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    side = _SIDE[device.type]
    factor = torch.ones(side, side, device=device, dtype=dtype)
    return 2 * side**3 / min(_time_product(factor) for _ in range(_PRODUCTS))


def _time_product(factor: torch.Tensor) -> float:
    started = time.perf_counter()
    (factor @ factor)[0, 0].item()  # waits for the device
    return time.perf_counter() - started
