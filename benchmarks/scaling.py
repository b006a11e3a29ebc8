"""How a run would scale from 8 to 4,096 GPUs, as the plan computes it: nothing here is measured.

    python -m benchmarks.scaling [--save]

Weak: every GPU has 64 clips of a step, so the batch grows with the GPUs. Strong: a step has 8,192 clips, so the GPUs share them. For each
number of GPUs the fastest setup that fits is taken, as `odonata plan` does. What stands below the plan, bytes on the wire and memory
of a rank, is checked against real runs of 1, 2 and 4 processes by `benchmarks.plan`.

JSON keys: rows (run, kind, gpus, clips, setup, micro_batch, recompute, memory_gb, step_s_best, step_s_worst, clips_per_s, efficiency:
clips/s a GPU over those of the fewest GPUs, mfu_ceiling, bottleneck), gpu.
"""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from benchmarks.report import Report, build_parser
from tests.runs import ROOT
from trainer.config.load import load_run_config
from trainer.config.run import RunConfig
from trainer.hardware import find_gpu
from trainer.plan.run import Row, plan_row
from trainer.plan.search import Question
from trainer.plan.tracing import TRACED_SHARDS, trace_model

RUNS = ("croco_video_large", "croco_video_giant")
GPUS = (8, 64, 512, 1024, 4096)
CLIPS_PER_GPU = 64
CLIPS = 8192


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--gpu", default="h200", help="kind of GPU, as in trainer/hardware.yaml")
    arguments = parser.parse_args()
    report = Report("scaling", arguments)
    rows = [row for run in RUNS for row in scale(run, arguments, report)]
    report.finish({"gpu": arguments.gpu, "rows": rows})


def scale(run: str, arguments: Namespace, report: Report) -> Iterator[dict[str, Any]]:
    """Both kinds, for every number of GPUs; the model is traced once, since its trace holds for any batch."""
    config = load_run_config(ROOT / "launch" / "runs" / f"{run}.yaml")
    question = Question(find_gpu(arguments.gpu))
    model = trace_model(config, shards=TRACED_SHARDS, precision=question.precision)
    for kind in ("weak", "strong"):
        planned = [plan_row(with_batch(config, kind, gpus), model, gpus, question) for gpus in GPUS]
        for row in planned:
            told = tell(run, kind, row, planned[0])
            report.say(
                f"{run} {kind:6} {row.gpus:5,} GPUs x {row.clips // row.gpus:4} clips: {told['setup']}, "
                f"{told['clips_per_s']:,.0f} clips/s, efficiency {told['efficiency']:.0%}, MFU below {told['mfu_ceiling']:.0%}, "
                f"first {row.bottleneck}"
            )
            yield told


def with_batch(config: RunConfig, kind: str, gpus: int) -> RunConfig:
    """The run with as many clips a step as this kind of scaling gives `gpus` GPUs."""
    return config.model_copy(update={"global_batch": CLIPS_PER_GPU * gpus if kind == "weak" else CLIPS})


def tell(run: str, kind: str, row: Row, fewest: Row) -> dict[str, Any]:
    """A row of the result, beside that of the fewest GPUs."""
    setup, duration = row.option.setup, row.option.duration
    return {
        "run": run,
        "kind": kind,
        "gpus": row.gpus,
        "clips": row.clips,
        "setup": setup.name,
        "micro_batch": setup.micro_batch,
        "recompute": setup.recompute,
        "memory_gb": row.option.memory.total / 1e9,
        "step_s_best": duration.best_s,
        "step_s_worst": duration.worst_s,
        "clips_per_s": row.clips_per_s,
        "efficiency": (row.clips_per_s / row.gpus) / (fewest.clips_per_s / fewest.gpus),
        "mfu_ceiling": row.mfu_ceiling,
        "bottleneck": row.bottleneck,
    }


if __name__ == "__main__":
    main()
