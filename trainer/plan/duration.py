"""How long a step takes: a roofline of four parts, as a range.

    compute    operations, those of recomputation included, at PRODUCT_SHARE of the peak: what large products sustain under the power limit
    memory     what all other operations read and write over the bandwidth of HBM, unfused as PyTorch runs them, and the optimiser's
               28 bytes an element: it reads four numbers of an element and writes three
    nvlink     bytes and hops inside nodes
    network    bytes and hops between nodes

Kernels run one after the other, so compute and memory add up; together they are `busy`. Collectives run beside them:

    best       max(busy, nvlink, network)         all of the wire is hidden
    worst      busy + nvlink + network            none of it is

Narrow models have more elementwise traffic for each operation, so the ceiling falls with the width. Left out: time to launch
kernels, stragglers, waiting for data and checkpoints; `odonata goodput` measures those of a run.
"""

from dataclasses import dataclass

from trainer.hardware import Gpu
from trainer.plan.setup import Setup
from trainer.plan.tracing import Model
from trainer.plan.wire import Wire

PRODUCT_SHARE = 0.7
"""Of the peak that large matrix products sustain: 65 to 75 % on H100 at 700 W."""
_UPDATE_BYTES = 28
_FP32_SLOWDOWN = 16.0
"""Of float32 products without tensor cores: 62 against 989 TFLOP/s on H100."""


@dataclass(frozen=True)
class Duration:
    """Seconds of a step."""

    compute_s: float
    memory_s: float
    nvlink_s: float
    network_s: float

    @property
    def busy_s(self) -> float:
        """What kernels of the model take."""
        return self.compute_s + self.memory_s

    @property
    def best_s(self) -> float:
        return max(self.busy_s, self.nvlink_s, self.network_s)

    @property
    def worst_s(self) -> float:
        return self.busy_s + self.nvlink_s + self.network_s

    @property
    def typical_s(self) -> float:
        """Half-way: what setups are compared by, and what a whole run is reckoned with."""
        return (self.best_s + self.worst_s) / 2

    @property
    def bottleneck(self) -> str:
        """The part that takes longest."""
        parts = {
            "matrix products": self.compute_s,
            "HBM traffic": self.memory_s,
            "NVLink": self.nvlink_s,
            "network": self.network_s,
        }
        return max(parts, key=lambda name: parts[name])


def plan_duration(model: Model, setup: Setup, wire: Wire, gpu: Gpu) -> Duration:
    """Of a step under `setup`."""
    traced = model.traced[setup.recompute]
    flops = setup.micro_batch * setup.micro_steps * (traced.needed_flops + traced.repeated_flops)
    traffic = setup.micro_steps * traced.traffic_bytes(setup.micro_batch)
    traffic += _UPDATE_BYTES * model.weights.learning / (setup.gpus if setup.is_zero else setup.shards)
    return Duration(
        compute_s=flops / (PRODUCT_SHARE * peak_flops(gpu, setup)),
        memory_s=traffic / gpu.memory_bytes_per_s,
        nvlink_s=wire.nvlink_s(gpu),
        network_s=wire.network_s(gpu),
    )


def peak_flops(gpu: Gpu, setup: Setup) -> float:
    """Operations a second at the precision of `setup`."""
    return gpu.bf16_flops / (1.0 if setup.precision == "bf16" else _FP32_SLOWDOWN)
