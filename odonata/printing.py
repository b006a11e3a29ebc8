"""Tables and progress bars of the commands."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

_PIPED_WIDTH = 10_000


def print_table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]], *, right: tuple[str, ...]) -> None:
    """A table as wide as the terminal, or, where there is none, one line a row whatever its width."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, markup=False, emoji=False, highlight=False).print(table)


@contextmanager
def bar(doing: str, total_bytes: int) -> Iterator[Callable[[int], object]]:
    """A bar on stderr while there is a terminal; what it gives is told of bytes."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from trainer.observe.logs import CONSOLE

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=CONSOLE, transient=True, disable=not CONSOLE.is_terminal) as bar:
        task = bar.add_task(doing, total=total_bytes)
        yield lambda count: bar.advance(task, count)


@contextmanager
def counting_bar(doing: str) -> Iterator[Callable[[int, int], object]]:
    """A bar on stderr while there is a terminal; what it gives is told how many are done, and of how many."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from trainer.observe.logs import CONSOLE

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=CONSOLE, transient=True, disable=not CONSOLE.is_terminal) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
