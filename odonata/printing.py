"""Tables and progress bars of the commands."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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


def say_age(moment_s: float) -> str:
    """How long ago a moment was, in seconds since 1970: 40 s, 12 min, 3 h, 5 d."""
    age_s = max(0.0, time.time() - moment_s)
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if age_s >= 2 * seconds:
            return f"{age_s / seconds:.0f} {unit}"
    return f"{age_s:.0f} s"


def say_ranks(ranks: Sequence[int]) -> str:
    """Ascending ranks, those in a row as one: 0-7, 12."""
    rows: list[list[int]] = []
    for rank in ranks:
        if rows and rows[-1][-1] == rank - 1:
            rows[-1].append(rank)
        else:
            rows.append([rank])
    return ", ".join(str(row[0]) if len(row) == 1 else f"{row[0]}-{row[-1]}" for row in rows)


def clear_screen() -> None:
    """Begin at the top of the terminal, where there is one."""
    if sys.stdout.isatty():
        print("\033[2J\033[H", end="")


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
