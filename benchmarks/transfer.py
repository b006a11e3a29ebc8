"""Does pre-training pay? Encoders of one shape, fresh and pre-trained in five ways, on downstream tasks of held-out scenes.

The protocol is docs/study.md. A cell is one pre-training, or one task on one encoder, with one seed; each is a run of the public
command in a folder of its own, which is trained once: a second call goes on where the first was stopped, and adds what is new.

    python -m benchmarks.transfer --folder runs/transfer --jobs 2             # the study: some hours on two cores
    python -m benchmarks.transfer --folder runs/look --seeds 2 --tasks depth  # a look: two seeds, one task
    python -m benchmarks.transfer --folder runs/transfer --report             # of the cells that have ended
    python -m benchmarks.transfer --folder runs/other --known benchmarks/results/transfer.json --save   # what that report lacks

JSON keys: cells (task, pretraining, mode, seed, metric, value: one object each), table (task -> metric -> "pretraining, mode" or
"trivial" -> mean, half_width of its 95 % interval, seeds), differences (each pre-training less scratch, paired by seed), claims (text,
holds, differences), protocol (the world, and how each task and pre-training was run: cells of another one are not taken from an
earlier report), minutes (of a core, by cell), cpu_minutes (their sum), seeds, missing (cells that have not ended).
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.report import RESULTS, Report, build_parser
from benchmarks.transfer_cells import Cell, Key, Known, list_cells, read_figures, read_known, read_trivial, run_cells, synthesize
from benchmarks.transfer_protocol import CLAIMS, PRETRAININGS, TASKS, write_protocol
from benchmarks.transfer_table import as_markdown, compare_with_scratch, judge, plot, tabulate


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where data and cells are kept")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each cell")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="tasks; all by default")
    parser.add_argument("--pretrainings", nargs="+", choices=PRETRAININGS, default=list(PRETRAININGS), help="all by default")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, one core each")
    parser.add_argument("--report", action="store_true", help="run nothing: report the cells that have ended")
    parser.add_argument(
        "--known", type=Path, help="an earlier report, saved on another machine maybe: its cells are not run again"
    )
    arguments = parser.parse_args()
    if arguments.known and not arguments.known.is_file():
        parser.error(f"--known {arguments.known} is not a file; an earlier report is benchmarks/results/transfer.json")
    known = read_known(arguments.known) if arguments.known else Known({}, {}, {})
    names, tasks = arguments.pretrainings, arguments.tasks
    seeds = [list_cells(arguments.folder, names, tasks, seed, known.values) for seed in range(arguments.seeds)]
    if not arguments.report:
        synthesize(arguments.folder / "city")
        run_cells([cells for pretrained, evaluated in seeds for cells in (pretrained, list(evaluated.values()))], arguments.jobs)
    pretrained = [cell for of_seed, _ in seeds for cell in of_seed]
    evaluated = {key: cell for _, of_seed in seeds for key, cell in of_seed.items()}
    tell(Report("transfer", arguments), arguments, known, pretrained, evaluated)


def tell(report: Report, arguments: Namespace, known: Known, pretrained: Sequence[Cell], evaluated: Mapping[Key, Cell]) -> None:
    """Table, verdicts and figure of the cells that have ended and of those that were known."""
    new = {key: read_figures(cell) for key, cell in evaluated.items() if cell.has_ended}
    values = {**known.values, **new}
    if not values:
        raise SystemExit(f"no cell has ended in {arguments.folder}; leave --report out to run them")
    one_of_task = {key[0]: evaluated[key] for key in new}
    trivial = {**known.trivial, **{task: read_trivial(cell) for task, cell in one_of_task.items()}}
    table, differences = tabulate(values, trivial), compare_with_scratch(values)
    claims = [judge(claim, values) for claim in CLAIMS]
    text = as_markdown(table, differences, claims)
    report.say(text)
    if report.save:
        (RESULTS / "transfer.md").write_text(text)
        plot(table, differences, RESULTS / "transfer.png")
    ended = [cell for cell in (*pretrained, *evaluated.values()) if cell.has_ended]
    minutes = {**known.minutes, **{cell.name: float(cell.cost.read_text()) for cell in ended}}
    report.finish(
        {
            "cells": [
                {"task": task, "pretraining": name, "mode": mode, "seed": seed, "metric": metric, "value": value}
                for (task, name, mode, seed), figures in values.items()
                for metric, value in figures.items()
            ],
            "table": table,
            "differences": differences,
            "claims": claims,
            "protocol": write_protocol(),
            "minutes": minutes,
            "cpu_minutes": sum(minutes.values()),
            "seeds": arguments.seeds,
            "missing": len(evaluated) - len(new),
        }
    )


if __name__ == "__main__":
    main()
