"""`python -m benchmarks` lists the benchmarks, each with the question that it answers and when it was last measured."""

import ast
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.report import RESULTS

_HERE = Path(__file__).parent


def main() -> None:
    """A row for each module that can be run."""
    table = Table("python -m benchmarks.", "question", "last measured on", box=None, header_style="bold")
    for path in sorted(_HERE.glob("[a-z]*.py")):
        source = path.read_text()
        if "build_parser(__doc__)" in source:
            table.add_row(path.stem, ask(source), find_measured(path.stem))
    Console().print(table)
    Console().print(
        "\nEach takes --json, --save and --help; `python -m benchmarks.performance` plots what was saved into docs/performance.md."
    )


def ask(source: str) -> str:
    """The first sentence of a module."""
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def find_measured(name: str) -> str:
    """Processor or GPU of the saved result."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return "not saved"
    environment = json.loads(path.read_text())["environment"]
    return environment["gpu"] or f"{environment['cores']} cores of {environment['cpu']}"


if __name__ == "__main__":
    main()
