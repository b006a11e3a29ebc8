"""What of a report is a curve elsewhere: TensorBoard and Weights & Biases show the same figures under the same names.

Left to whom: each of the two is a file of its own beside this one.
"""

from trainer.observe.report import StepReport


def list_figures(report: StepReport) -> dict[str, float]:
    """Figures of a step by name `group/figure`."""
    figures = {
        "train/loss": report.loss,
        "train/grad_norm": report.grad_norm,
        "train/learning_rate": report.learning_rate,
        "train/skipped_steps": float(report.skipped_steps),
        "speed/step_seconds": report.step_seconds,
        "speed/data_share": report.data_share,
        "speed/skew_seconds": report.skew_seconds,
        "speed/memory_bytes": float(report.memory_bytes),
        "data/replaced_clips": float(report.replaced_clips),
    }
    if report.step_seconds:
        figures["speed/clips_per_second"] = report.clips / report.step_seconds
    return figures | {f"train/{name}": value for name, value in report.parts.items()}
