"""A monitoring failure never stops training; a failing record does."""

import logging

import pytest

from tests.trainer.observe_fakes import FailingObserver, NotingObserver, report
from trainer.observe.build import build_monitors
from trainer.observe.observers import Observers
from trainer.observe.report import Observer


def test_a_failing_monitor_is_logged_once_and_dropped_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    failing, before, after, record = FailingObserver(), NotingObserver(), NotingObserver(), NotingObserver()
    observers = Observers(record, [before, failing, after])
    with caplog.at_level(logging.ERROR):
        for step in (1, 2, 3):
            observers.step(report(step))
    assert failing.calls == 1
    assert before.steps == after.steps == record.steps == [1, 2, 3]
    assert [entry.message for entry in caplog.records] == [
        "FailingObserver failed and is told no more; training goes on without it"
    ]


def test_a_failing_record_stops_the_run() -> None:
    with pytest.raises(RuntimeError, match="broken on purpose"):
        Observers(FailingObserver()).step(report())


def test_monitors_are_closed_even_if_the_record_cannot_be() -> None:
    class Unclosable(NotingObserver):
        def close(self) -> None:
            raise OSError("disk gone")

    monitor = NotingObserver()
    with pytest.raises(OSError, match="disk gone"):
        Observers(Unclosable(), [monitor]).close()
    assert monitor.closed


def test_a_monitor_that_cannot_be_built_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def build_nothing() -> Observer:
        raise OSError("no such address")

    kept = NotingObserver()
    assert build_monitors([build_nothing, lambda: kept]) == [kept]
    assert "no such address" in caplog.text
