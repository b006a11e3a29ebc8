"""What a person sees: lines where there is no terminal, a bar that log lines do not tear where there is one."""

import io
import logging
import math
import re
from collections.abc import Iterator

import pytest
from rich.console import Console

from tests.trainer.observe_fakes import Saved, report
from trainer.observe.logs import configure_logging
from trainer.observe.progress import Milestones, ProgressBar, ProgressLines, build_progress
from trainer.store.base import StoreError

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    names = ("trainer", "models", "monitoring", "k8s", "odonata")
    handlers, levels = list(root.handlers), {name: logging.getLogger(name).level for name in ("root", *names)}
    root_level = root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(root_level)
    for name in names:
        logging.getLogger(name).setLevel(levels[name])


def terminal(width: int = 100) -> Console:
    return Console(force_terminal=True, file=io.StringIO(), width=width)


def pipe() -> Console:
    return Console(force_terminal=False, file=io.StringIO())


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_console_decides_between_bar_and_lines() -> None:
    assert isinstance(build_progress(terminal(), every_steps=10), ProgressBar)
    assert isinstance(build_progress(pipe(), every_steps=10), ProgressLines)


def test_without_a_terminal_there_is_a_line_for_the_first_step_every_so_many_and_the_last() -> None:
    console = pipe()
    configure_logging(0, console)
    lines = ProgressLines(every_steps=4)
    for step in range(2, 12):
        lines.step(report(step, steps=11))
    assert re.findall(r"step (\d+)/11", text_of(console)) == ["2", "4", "8", "11"]
    assert "\x1b" not in text_of(console)


def test_a_line_says_loss_rate_pace_waiting_and_the_time_left() -> None:
    console = pipe()
    configure_logging(0, console)
    lines = ProgressLines(every_steps=1)
    lines.step(report(1, steps=7201, step_seconds=0.5, data_seconds=0.125, clips=8))
    # 7200 steps of half a second are an hour; 8 clips in half a second are 16 a second; an eighth of a half is a quarter
    assert "step 1/7201  loss 0.5000  lr 1.0e-03  grad 2  16 clips/s  data 25%  left 1:00:00" in text_of(console)


def test_the_pace_is_a_mean_over_steps_and_not_that_of_the_last() -> None:
    console = pipe()
    configure_logging(0, console)
    lines = ProgressLines(every_steps=2)
    lines.step(report(1, step_seconds=3.0, data_seconds=0.0))
    lines.step(report(2, step_seconds=1.0, data_seconds=1.0))
    assert "4 clips/s  data 25%  left 0:00:04" in text_of(console)  # 16 clips in 4 s; 2 steps of 2 s are left


def test_skipped_steps_are_shown_once_there_are_some() -> None:
    console = pipe()
    configure_logging(0, console)
    lines = ProgressLines(every_steps=1)
    lines.step(report(1))
    assert "skipped" not in text_of(console)
    lines.step(report(2, loss=math.nan, skipped=True, skipped_steps=1))
    assert "loss nan" in text_of(console)
    assert "skipped 1" in text_of(console)


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_the_bar_shows_the_step_whole_and_log_lines_stand_above_it(width: int) -> None:
    console = terminal(width)
    configure_logging(0, console)
    bar = ProgressBar(console)
    bar.step(report(100_001, steps=200_000))
    logging.getLogger("trainer.loop").info("something happened")
    bar.step(report(100_002, steps=200_000))
    bar.close()
    lines = [ESCAPE.sub("", line).split("\r")[-1].rstrip() for line in text_of(console).splitlines()]
    [said] = [line for line in lines if "something happened" in line]
    assert "loss" not in said, "the line shares its row with the bar"
    assert lines.index(said) < len(lines) - 1
    final = next(line for line in reversed(lines) if line)
    assert final.startswith("100002/200000 ")
    assert "loss 0.5000  lr 1.0e-03  16 clips/s  data 25%  left 13:53:19" in final  # 99,998 steps of half a second


def test_rare_events_have_a_line_each() -> None:
    console = pipe()
    configure_logging(0, console)
    milestones = Milestones()
    milestones.checkpoint(Saved(step=3, seconds=0.5, bytes=2_000_000))
    milestones.evaluation(3, {"true": 0.25, "wrong": 0.5}, seconds=0.5)
    milestones.checkpoint(Saved(step=4, error=StoreError("the store is full")))
    assert "checkpoint of step 3: 2.0 MB in 0.5 s, of which training waited 0.12 s" in text_of(console)
    assert "checkpoint of step 4 failed, training goes on: the store is full" in text_of(console)
    assert "held-out clips after step 3: true 0.25  wrong 0.5" in text_of(console)


def test_other_ranks_say_only_what_is_wrong_and_who_they_are() -> None:
    console = pipe()
    configure_logging(3, console)
    logging.getLogger("trainer.loop").info("all is well")
    logging.getLogger("trainer.loop").warning("a clip is broken")
    assert "all is well" not in text_of(console)
    assert "rank 3: a clip is broken" in text_of(console)


def test_configuring_twice_does_not_say_everything_twice() -> None:
    first, second = pipe(), pipe()
    configure_logging(0, first)
    configure_logging(0, second)
    logging.getLogger("trainer.loop").info("once")
    assert (text_of(first).count("once"), text_of(second).count("once")) == (0, 1)


def test_chatty_libraries_are_not_heard() -> None:
    console = pipe()
    configure_logging(0, console)
    logging.getLogger("some.library").info("connection pool of size 10")
    assert text_of(console) == ""
