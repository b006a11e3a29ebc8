"""Write docs/performance.md and its picture from what the other benchmarks have saved.

    python -m benchmarks.performance

Each row says what was measured, what was predicted or asked for, and which command repeats it. A number that nobody has saved shows
as such; nothing is measured here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.report import RESULTS, write_table

_DOCS = Path(__file__).parents[1] / "docs"
_BAD, _GOOD = "#c0504d", "#3a7d44"
_COLUMNS = ("what", "measured", "asked for", "why", "command")
_SCALING_COLUMNS = (
    "run",
    "scaling",
    "GPUs",
    "clips a GPU",
    "setup",
    "memory GB",
    "step s",
    "clips/s",
    "efficiency",
    "MFU ceiling",
    "bottleneck",
)


@dataclass(frozen=True)
class Row:
    """One ratio of a saved result."""

    benchmark: str
    keys: str
    """Path to the number, with dots."""
    what: str
    target: float
    better: Literal["lower", "higher"]
    why: str
    """What was predicted, and the reason for a gap."""

    @property
    def value(self) -> float | None:
        """The number, if it was saved."""
        path = RESULTS / f"{self.benchmark}.json"
        found: Any = json.loads(path.read_text()) if path.is_file() else None
        for key in self.keys.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return found

    @property
    def is_met(self) -> bool:
        """Whether the number is as good as it should be."""
        value = self.value
        return value is not None and (value <= self.target if self.better == "lower" else value >= self.target)


SECTIONS: dict[str, tuple[Row, ...]] = {
    "A training step": (
        Row(
            "step",
            "over_naive_fp32",
            "CroCo step over a naive one, float32",
            0.97,
            "lower",
            "predicted 0.9: matrix products are most of both",
        ),
        Row(
            "step",
            "over_naive_bf16",
            "the same, ours in bf16",
            0.5,
            "lower",
            "predicted 0.5, on a processor that multiplies bf16; attention over few tokens stays in float32, where torch is faster",
        ),
        Row(
            "step",
            "packed_over_padded",
            "unequal clips, packed over padded",
            1.0,
            "lower",
            "predicted 0.6: the share of tokens that are not padding",
        ),
        Row(
            "step",
            "loader_over_resident",
            "step with the loader over clips in memory",
            1.05,
            "lower",
            "predicted 1.02: decoding beside arithmetic",
        ),
        Row(
            "step",
            "checkpoint_over_off",
            "checkpoint every 50 steps over none",
            1.02,
            "lower",
            "predicted 1.00: a copy, a checksum and a write",
        ),
        Row(
            "step",
            "exporter_cpu_share",
            "metrics and watchdog, share of CPU seconds",
            0.002,
            "lower",
            "threads that sleep but for a scrape",
        ),
    ),
    "Data": (
        Row(
            "data",
            "shards_over_pil",
            "clips a core, shards over devkit and PIL",
            3.0,
            "higher",
            "a JPEG is decoded at half its size where that is enough, and nothing else is done with it",
        ),
        Row("data", "shards_over_opencv", "shards over OpenCV", 1.3, "higher", "the same"),
        Row(
            "data",
            "shards_over_streaming",
            "shards over MosaicML streaming",
            1.0,
            "higher",
            "the same, and no copy between processes",
        ),
        Row(
            "data",
            "over_decode_ceiling",
            "shards over bare decoding",
            0.85,
            "higher",
            "predicted 0.86: reading, checksums and the hand-over take the rest",
        ),
        Row(
            "data",
            "s3_over_local",
            "S3 over local shards",
            0.9,
            "higher",
            "predicted 0.97: HTTP costs 1 ms a clip; threads of a worker take turns, so that waiting is hidden",
        ),
        Row("data", "bytes_over_useful", "bytes fetched over bytes used", 1.1, "lower", "headers of a tar"),
    ),
    "Checkpoints": (
        Row(
            "checkpoint", "stall_p50_over_copy", "stall of training over a plain copy of the state", 1.2, "lower", "it is a copy"
        ),
        Row(
            "checkpoint",
            "upload_over_raw",
            "upload over the best raw one",
            0.9,
            "higher",
            "parts go up while later ones are made",
        ),
    ),
    "The plan": (
        Row("plan", "memory_error_max", "memory of a rank, plan against measurement", 0.10, "lower", "see plan.md"),
        Row("plan", "wire_error_max", "payload of collectives, plan against counted", 0.05, "lower", "see plan.md"),
        Row("plan", "seconds_1024", "seconds to plan 1,024 GPUs, ViT-g", 180, "lower", "see plan.md"),
    ),
}


def main() -> None:
    """Write both."""
    draw(_DOCS / "pictures" / "performance.png")
    (_DOCS / "performance.md").write_text(write_page())
    print(_DOCS / "performance.md")


def write_page() -> str:
    """The page, all of it."""
    lines = [
        "# Performance",
        "",
        "Written by `python -m benchmarks.performance` from `benchmarks/results/`; `python -m benchmarks` lists what can be measured.",
        "All figures are ratios from one run, medians over pairs that take turns, so that a shared machine hits both sides. What did not",
        "work is in `log.md`.",
        "",
        f"Measured on {describe_machines()}. No GPU was at hand: MFU, overlap under NCCL, xFormers, bf16 and fp8 on tensor cores",
        "are not measured here; `plan.md` says what the plan computes for them.",
        "",
        "![Each figure over its target](pictures/performance.png)",
    ]
    for title, rows in SECTIONS.items():
        lines += ["", f"## {title}", "", *write_table(_COLUMNS, [write_row(row) for row in rows])]
    lines += ["", "## Scaling", "", *write_scaling(), "", "## Attention", "", *write_attention()]
    return "\n".join(lines) + "\n"


def write_row(row: Row) -> tuple[str, ...]:
    """One line of a table."""
    value = row.value
    shown = "not measured" if value is None else f"{value:.3g}" + ("" if row.is_met else " (missed)")
    sign = "at most" if row.better == "lower" else "at least"
    return row.what, shown, f"{sign} {row.target:g}", row.why, f"`python -m benchmarks.{row.benchmark}`"


def write_scaling() -> list[str]:
    """What the plan computes for more and more GPUs."""
    path = RESULTS / "scaling.json"
    if not path.is_file():
        return ["Not computed."]
    result = json.loads(path.read_text())
    lines = [
        f"Computed by the plan for nodes of eight {result['gpu'].upper()}, not measured; what it rests on, bytes on the wire and memory of",
        "a rank, was measured on 1, 2 and 4 processes, in the table above. Efficiency is clips/s a GPU over those of the fewest GPUs.",
        "",
    ]
    rows = [
        (
            row["run"],
            row["kind"],
            f"{row['gpus']:,}",
            f"{row['clips'] // row['gpus']:,}",
            f"{row['setup']}, micro-batch {row['micro_batch']}, recompute {row['recompute']}",
            f"{row['memory_gb']:.0f}",
            f"{row['step_s_best']:.2f} to {row['step_s_worst']:.2f}",
            f"{row['clips_per_s']:,.0f}",
            f"{row['efficiency']:.0%}",
            f"{row['mfu_ceiling']:.0%}",
            row["bottleneck"],
        )
        for row in result["rows"]
    ]
    return [*lines, *write_table(_SCALING_COLUMNS, rows), "", "Command: `python -m benchmarks.scaling`."]


def write_attention() -> list[str]:
    """Milliseconds of each kind on each shape."""
    path = RESULTS / "attention.json"
    if not path.is_file():
        return ["Not measured."]
    result = json.loads(path.read_text())
    kinds = sorted({kind for shape in result["shapes"].values() for kind in shape["seconds"]}, reverse=True)
    rows = [
        (name, *(f"{1e3 * shape['seconds'][kind]:.1f}" if kind in shape["seconds"] else "" for kind in kinds), shape["chosen"])
        for name, shape in result["shapes"].items()
    ]
    lines = write_table(("forward and backward, ms", *kinds, "auto takes"), rows)
    lines += ["", "Not run here:", *(f"- {kind}: {reason.partition('. ')[0]}" for kind, reason in result["left_out"].items())]
    return [*lines, "", "Command: `python -m benchmarks.attention`."]


def describe_machines() -> str:
    """Of all results that are shown."""
    names = {row.benchmark for rows in SECTIONS.values() for row in rows}
    found = [
        json.loads(path.read_text())["environment"] for name in sorted(names) if (path := RESULTS / f"{name}.json").is_file()
    ]
    return " and ".join(
        sorted({f"{each['cores']} cores of {each['gpu'] or each['cpu']}, torch {each['torch']}" for each in found})
    )


def draw(path: Path) -> None:
    """Every figure over its target, on a logarithmic axis, with the good side to the left."""
    rows = [row for of_one in SECTIONS.values() for row in of_one if row.value]
    figure, axes = plt.subplots(figsize=(9, 0.36 * len(rows) + 1.2), layout="constrained")
    shares = [row.value / row.target if row.better == "lower" else row.target / row.value for row in rows]  # type: ignore[operator]
    axes.barh([row.what for row in rows], shares, color=[_GOOD if row.is_met else _BAD for row in rows])
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="over what was asked for: left of the line is better than asked for")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
