"""The plan against measurement: memory of a rank and payload of collectives, of real runs on 1, 2 and 4 gloo ranks.

    python -m benchmarks.plan [--save]

Each run goes through accelerate launch and the real engine, with a small CroCo on video. Memory is what torch's allocator gave out
in a step (events of its profiler, not RSS), payloads are counted where tensors enter a process group. DeepSpeed's buckets are made
small, so that they do not hide everything else. Then the plan of a ViT-g on 1,024 GPUs is timed, from the command to its output.

    memory_error_max    largest relative difference of the peak
    wire_error_max      largest relative difference of the payload of any kind of collective
    seconds_1024        of `odonata plan launch/runs/croco_video_giant.yaml --gpus 1024`
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import Report, build_parser
from tests.runs import ACCELERATE, ROOT, free_port
from trainer.config.load import load_run_config
from trainer.hardware import find_gpu
from trainer.plan.search import weigh
from trainer.plan.setup import EngineChoice, Setup, ZeroOptions
from trainer.plan.tracing import Model, trace_model

GIANT = ROOT / "launch" / "runs" / "croco_video_giant.yaml"
RUN = """\
schema_version: 1
steps: 8
global_batch: 16
run: {uri: unset}
data: {kind: synthetic, root: unset, clip: {frames: 4, spacing_s: 0.25, height_px: 80, width_px: 144}}
encoder: {size: tiny, tubelet_frames: 2}
objectives: [{kind: croco, decoder: small, mask: {kind: random, ratio: 0.75}}]
optim: {clip_grad_norm: 1.0}
"""
ZERO = {
    "overlap_comm": True,
    "contiguous_gradients": True,
    "reduce_bucket_size": 2_000_000,
    "allgather_bucket_size": 2_000_000,
}
NEGLIGIBLE = 0.001
"""Of all payload: a norm, a loss."""


class Case(NamedTuple):
    """A launch."""

    engine: EngineChoice
    ranks: int
    micro_batch: int = 4


CASES = (
    *(Case("fsdp2", ranks) for ranks in (1, 2, 4)),
    Case("fsdp2", 2, micro_batch=2),
    Case("hsdp", 4),
    *(Case(engine, ranks) for engine in ("zero1", "zero2", "zero3") for ranks in (1, 2, 4)),
)


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--only", help="engine to compare alone")
    arguments = parser.parse_args()
    report = Report("plan", arguments)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "run.yaml").write_text(RUN)
        cases = [case for case in CASES if arguments.only in (None, case.engine)]
        compared = [compare(case, Path(folder), report) for case in cases]
    seconds = time_plan()
    report.say(f"ViT-g on 1,024 GPUs: planned in {seconds:.0f} s")
    report.finish(
        {
            "memory_error_max": max(one["memory_error"] for one in compared),
            "wire_error_max": max(one["wire_error"] for one in compared),
            "seconds_1024": seconds,
            "cases": compared,
        }
    )


def compare(case: Case, folder: Path, report: Report) -> dict[str, Any]:
    """What was planned and what was measured, side by side."""
    measured = measure(case, folder)
    planned = plan(case, folder)
    payload = sum(measured["payload_bytes"].values())
    errors = [
        abs(planned["payload_bytes"][kind] / measured["payload_bytes"].get(kind, 1) - 1)
        for kind in planned["payload_bytes"]
        if max(planned["payload_bytes"][kind], measured["payload_bytes"].get(kind, 0)) > NEGLIGIBLE * payload
    ]
    one = {
        "engine": case.engine,
        "ranks": case.ranks,
        "micro_batch": case.micro_batch,
        "planned": planned,
        "measured": measured,
        "memory_error": abs(planned["peak_bytes"] / measured["peak_bytes"] - 1),
        "wire_error": max(errors, default=0.0),
    }
    report.say(
        f"{case.engine:6} x{case.ranks} micro-batch {case.micro_batch}: memory {planned['peak_bytes'] / 1e6:7.1f} MB planned, "
        f"{measured['peak_bytes'] / 1e6:7.1f} measured ({one['memory_error']:.1%}); wire MB: {_show(planned)} planned, "
        f"{_show(measured)} measured ({one['wire_error']:.1%})"
    )
    return one


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Launch the case and take what the rank saw that held most."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE / f"{case.engine}.yaml")]
    command += ["--num_processes", str(case.ranks), "--main_process_port", str(free_port())]
    if case.engine.startswith("zero"):
        zero = folder / "zero.json"
        zero.write_text(json.dumps({"zero_optimization": ZERO | {"stage": int(case.engine[-1])}}))
        command += ["--deepspeed_config_file", str(zero)]
    run = folder / "case.yaml"
    run.write_text(RUN + f"parallel: {{micro_batch: {case.micro_batch}}}\n")
    command += ["-m", "benchmarks.plan_rank", str(run), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(case.ranks)]
    return max(ranks, key=lambda rank: rank["peak_bytes"])


def plan(case: Case, folder: Path) -> dict[str, Any]:
    """What the plan says of the case."""
    config = load_run_config(folder / "case.yaml")
    engine: EngineChoice = "single" if case.engine == "fsdp2" and case.ranks == 1 else case.engine
    shards = {"hsdp": 2, "single": 1}.get(engine, case.ranks)
    micro_steps = config.global_batch // (case.ranks * case.micro_batch)
    zero = ZeroOptions.read(ZERO)
    setup = Setup(engine, case.ranks, shards, case.micro_batch, micro_steps, "none", "fp32", zero=zero)
    option = weigh(config, _trace(folder, shards), setup, find_gpu("h200"))
    return {"peak_bytes": option.memory.total, "payload_bytes": option.wire.payload_bytes(), "by_category": vars(option.memory)}


_traced: dict[int, Model] = {}


def _trace(folder: Path, shards: int) -> Model:
    if shards not in _traced:
        _traced[shards] = trace_model(load_run_config(folder / "case.yaml"), shards=shards, precision="fp32")
    return _traced[shards]


def time_plan() -> float:
    """Seconds from the command to its output."""
    began = time.monotonic()
    command = [sys.executable, "-m", "odonata", "plan", str(GIANT), "--gpus", "1024", "--json"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def _show(figures: dict[str, Any]) -> str:
    return " ".join(f"{kind} {size / 1e6:.2f}" for kind, size in figures["payload_bytes"].items() if size > 1e4) or "nothing"


if __name__ == "__main__":
    main()
