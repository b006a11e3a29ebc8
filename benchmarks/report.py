"""What every benchmark prints: lines for people, and one JSON object as the last line for machines.

With `--json` only the object is printed. Figures are ratios or medians of one run; the environment stands beside them.
"""

import argparse
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that knows what all benchmarks know: --json and --save."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--save", action="store_true", help="also keep the object under benchmarks/results/")
    return parser


class Report:
    """Lines now, the object at the end."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name = name
        self.json_only: bool = arguments.json
        self.save: bool = arguments.save

    def say(self, line: str) -> None:
        """A line for people."""
        if not self.json_only:
            print(line, flush=True)

    def finish(self, figures: Mapping[str, Any]) -> None:
        """Print the object, and keep it if asked."""
        line = json.dumps({"benchmark": self.name, **figures, "environment": describe_environment()})
        if self.save:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{self.name}.json").write_text(json.dumps(json.loads(line), indent=2) + "\n")
        print(line)


def write_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def describe_environment() -> dict[str, Any]:
    """What a figure depends on: processor, threads, versions, accelerator."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
