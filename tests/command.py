"""The command line in the test's own process, which has loaded everything: a launch of its own costs seconds."""

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from odonata import door


class Ended(NamedTuple):
    """A command that ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs `odonata` with arguments as the shell would; signals and logging stay the test session's."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr("trainer.observe.logs.configure_logging", lambda rank: None)

    def call(*arguments: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["odonata", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            door.main()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Ended(code or 0, *capsys.readouterr())

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)
