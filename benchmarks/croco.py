"""Does CroCo look across views? Train `croco_video_tiny`, then compare references on held-out clips.

The pretext loss on held-out scenes is measured three times at each evaluation: with the true reference, with that of
another scene, and with a blank one. A model that completes across views needs the true one.

    python -m benchmarks.croco                       # the whole run: an hour or so on two cores
    python -m benchmarks.croco --steps 200           # a look
    python -m benchmarks.croco --folder runs/mine    # keep data and run here; a second call resumes

JSON keys: true, wrong, blank (held-out loss at the end), steps, wrong_over_true, blank_over_true.
"""

import json
import tempfile
from pathlib import Path

from benchmarks.report import RESULTS, Report, build_parser
from benchmarks.training import odonata
from trainer.config.load import load_run_config

RUN = Path(__file__).parents[1] / "launch" / "runs" / "croco_video_tiny.yaml"
CURVES = {"true": "croco/loss", "wrong": "croco/loss_wrong_reference", "blank": "croco/loss_blank_reference"}


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--steps", type=int, default=None, help="steps to train; the run config's by default")
    parser.add_argument("--scenes", type=int, default=16, help="synthetic scenes; every fourth is held out")
    parser.add_argument("--folder", type=Path, default=None, help="where data and run are kept; a temporary one by default")
    arguments = parser.parse_args()
    report = Report("croco", arguments)
    if arguments.folder:
        measure(report, arguments.folder, arguments.steps, arguments.scenes)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(report, Path(folder), arguments.steps, arguments.scenes)


def measure(report: Report, folder: Path, steps: int | None, scenes: int) -> None:
    """Synthesise, train through the public command, read the evaluations, plot, report."""
    steps = steps or load_run_config(RUN).steps
    city, run = folder / "city", folder / "run"
    odonata("synthesize", "--out", city, "--scenes", scenes, "--duration-s", 6, "--scale", 0.125)
    odonata("train", RUN, f"data.root={city}", f"run.uri={run}", f"steps={steps}", "observe.metrics_port=null")
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    last = {name: evaluations[-1][key] for name, key in CURVES.items()}
    for name, loss in last.items():
        report.say(f"held-out loss with the {name} reference after {steps} steps: {loss:.4f}")
    if report.save:
        plot(evaluations, RESULTS / "croco.png")
    ratios = {f"{name}_over_true": last[name] / last["true"] for name in ("wrong", "blank")}
    report.finish({**last, **ratios, "steps": steps, "curves": evaluations})


def plot(evaluations: list[dict[str, float]], path: Path) -> None:
    """The three held-out curves over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    steps = [evaluation["step"] for evaluation in evaluations]
    for name, key in CURVES.items():
        axes.plot(steps, [evaluation[key] for evaluation in evaluations], marker="o", markersize=3, label=f"{name} reference")
    axes.set(xlabel="step", ylabel="held-out completion loss", title="CroCo on synthetic driving video: which reference?")
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
