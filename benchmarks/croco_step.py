"""What a CroCo training step costs on this machine's CPU: seconds, tokens a second, and the share of the matmul peak.

One 224 x 224 pair a sample, nine tenths masked, forward + backward + AdamW. FLOPs are those that the algorithm needs (no
recompute, no padding), from models/flops.py. The peak is the best large float32 matmul of this same process, measured
between the models, because shared machines drift.

    python -m benchmarks.croco_step                          # tiny, small, base
    python -m benchmarks.croco_step --sizes tiny --batch 4 --threads 2

JSON keys: sizes -> {step_seconds, tokens_per_second, predicted_gflop, achieved_gflops, share_of_peak}, peak_gflops.
"""

import statistics
import time

import numpy as np
import torch

from benchmarks.report import Report, build_parser
from models.batch import Batch
from models.config import CrocoConfig, EncoderConfig, Grid
from models.flops import train_flops
from models.pretraining import build_model, build_preparations
from trainer.config.training import OptimConfig
from trainer.optim import build_optimizer

GRID = Grid(1, 1, 14, 14)
DECODERS = {"tiny": "tiny", "small": "small", "base": "small"}


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small", "base"], choices=sorted(DECODERS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="timed steps after one that warms up; medians are reported")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = Report("croco_step", arguments)
    sizes, peaks = {}, []
    for size in arguments.sizes:
        peaks.append(measure_matmul_peak())
        sizes[size] = measure_step(size, arguments.batch, arguments.steps)
    peak = statistics.median(peaks)
    for size, figures in sizes.items():
        figures["share_of_peak"] = figures["achieved_gflops"] / peak
        report.say(
            f"{size:5}  {figures['step_seconds']:.3f} s a step of {arguments.batch} pairs, "
            f"{figures['tokens_per_second']:.0f} tokens/s, {figures['predicted_gflop']:.0f} GFLOP predicted, "
            f"{figures['achieved_gflops']:.0f} GFLOP/s = {figures['share_of_peak']:.0%} of the matmul peak {peak:.0f}"
        )
    report.finish({"sizes": sizes, "peak_gflops": peak, "batch": arguments.batch})


def measure_step(size: str, batch_size: int, steps: int) -> dict[str, float]:
    """Median wall time of a whole training step, and what it amounts to."""
    encoder, objectives = EncoderConfig(size=size), (CrocoConfig(decoder=DECODERS[size]),)
    torch.manual_seed(0)
    model = build_model(encoder, objectives, GRID).train()
    optimizer = build_optimizer(model, OptimConfig(), depth=encoder.shape.depth)
    batch = make_batch(encoder, objectives, batch_size)
    seconds = [take_step(model, optimizer, batch) for _ in range(steps + 1)][1:]
    step_seconds = statistics.median(seconds)
    flop = train_flops(encoder, objectives[0], GRID) * batch_size
    return {
        "step_seconds": step_seconds,
        "tokens_per_second": model.tokens_per_sample * batch_size / step_seconds,
        "predicted_gflop": flop / 1e9,
        "achieved_gflops": flop / 1e9 / step_seconds,
    }


def take_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    """Seconds of one step."""
    started = time.perf_counter()
    model(batch, "train").total.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started


def make_batch(encoder: EncoderConfig, objectives: tuple[CrocoConfig, ...], batch_size: int) -> Batch:
    """Random pixels with real masks."""
    rng = np.random.default_rng(0)
    side = GRID.h * encoder.patch_px
    images = {
        name: torch.from_numpy(rng.integers(0, 256, (batch_size, 1, 1, 3, side, side), dtype=np.uint8))
        for name in ("target_images", "reference_images")
    }
    preparations = build_preparations(objectives, GRID, encoder)
    prepared = {name: [preparation.prepare({}, rng) for _ in range(batch_size)] for name, preparation in preparations.items()}
    stacked = {
        name: {field: torch.from_numpy(np.stack([row[field] for row in rows])) for field in rows[0]}
        for name, rows in prepared.items()
    }
    clips = tuple(f"random {place}" for place in range(batch_size))
    colours = {name: torch.ones(batch_size, 3) for name in ("target_colours", "reference_colours")}
    return Batch(shared=images | colours | {"scene": torch.arange(batch_size)}, prepared=stacked, clips=clips)


def measure_matmul_peak(side: int = 2048, repeats: int = 5) -> float:
    """GFLOP/s of the best of a few float32 matrix products."""
    left, right = torch.randn(side, side), torch.randn(side, side)
    best = min(time_matmul(left, right) for _ in range(repeats + 1))
    return 2 * side**3 / best / 1e9


def time_matmul(left: torch.Tensor, right: torch.Tensor) -> float:
    """Seconds of one product."""
    started = time.perf_counter()
    left @ right
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
