"""One rank of `benchmarks.plan`: a few steps through the real engine, with what torch's allocator and process groups saw of the last.

accelerate launch ... -m benchmarks.plan_rank RUN.yaml OUT      writes OUT/rank0.json, OUT/rank1.json, ...
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Work
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.batch import Batch
from trainer.config.load import load_run_config
from trainer.parallel.launch import micro_steps, process_group, read_launch
from trainer.plan.samples import build_blank_batch
from trainer.start import build_trained_engine

_STEPS = 4
"""Of which the last is measured: ZeRO-3 learns the order of modules in the first two."""
_MEASURED = "measured step"
_KINDS = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
}


_LET_GO_S = 0.002


class Meter(TorchDispatchMode):
    """Adds up the payload of every collective by kind: its largest argument.

    It waits for each, and until gloo's thread has let go of its tensors: what that thread frees the profiler does not see.
    """

    def __init__(self) -> None:
        super().__init__()
        self.payload_bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented
        name = func._overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and name in _KINDS:
            sizes = (sum(leaf.nbytes for leaf in tree_leaves(each) if isinstance(leaf, Tensor)) for each in args)
            self.payload_bytes[_KINDS[name]] += max(sizes)
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            for work in (leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.ScriptObject)):
                Work.unbox(work).wait()
            time.sleep(_LET_GO_S)
        return out


def measure_rank(config_path: Path) -> dict[str, Any]:
    """Bytes at the peak of the last step, and those of its collectives."""
    config = load_run_config(config_path)
    launch = read_launch(os.environ, config.parallel)
    micro_batch, micro = micro_steps(launch, config.parallel, config.global_batch)
    with (
        process_group(launch, timeout_s=120),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        Meter() as meter,
    ):
        engine = build_trained_engine(config, launch)
        engine.state()  # brings the moments into being, as a run's checkpoints do before the first step
        batch = repeat(build_blank_batch(config), micro_batch)

        def step() -> None:
            for micro_step in range(micro):
                engine.train_micro_step(batch, share=1 / micro, last=micro_step + 1 == micro)
            engine.update(config.optim.lr, loss=torch.tensor(1.0))

        for _ in range(_STEPS - 1):
            step()
        meter.payload_bytes.clear()
        with record_function(_MEASURED):
            step()
    return {"peak_bytes": find_peak(profiler), "payload_bytes": dict(meter.payload_bytes)}


def repeat(batch: Batch, samples: int) -> Batch:
    """`samples` times the one sample of `batch`."""
    return Batch(
        {name: one.repeat(samples, *[1] * (one.ndim - 1)) for name, one in batch.shared.items()},
        {
            objective: {name: one.repeat(samples, *[1] * (one.ndim - 1)) for name, one in tensors.items()}
            for objective, tensors in batch.prepared.items()
        },
        batch.clips * samples,
    )


def find_peak(profiler: profile) -> int:
    """Most bytes that the allocator had given out during the measured step."""
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    began = next(event.start_ns() for event in events if event.name() == _MEASURED)
    held = peak = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            if event.start_ns() >= began:
                peak = max(peak, held)
    return peak


if __name__ == "__main__":
    figures = measure_rank(Path(sys.argv[1]))
    (Path(sys.argv[2]) / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(figures))
