"""What a rank tells the pod around it."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from k8s.ranks import FOLDER_VARIABLE, Rank, read_ranks, telling_the_pod
from tests.runs import ROOT
from trainer.errors import EXIT_RETRY, ConfigError, OdonataError, PeerLostError, PreemptedError


def told(folder: Path) -> list[int | None]:
    return [rank.code for rank in read_ranks(folder)]


def test_a_rank_tells_that_it_began_and_how_it_ended(tmp_path: Path) -> None:
    environment = {FOLDER_VARIABLE: str(tmp_path), "LOCAL_RANK": "3"}
    with telling_the_pod(environment):
        assert read_ranks(tmp_path) == [Rank(3, os.getpid(), None)]
        assert not read_ranks(tmp_path)[0].ended_silently
    assert told(tmp_path) == [0]


@pytest.mark.parametrize(
    ("ending", "code"),
    [(SystemExit(75), 75), (SystemExit(), 0), (SystemExit("why"), 1), (ValueError(), 1), (KeyboardInterrupt(), 1)],
)
def test_an_exception_goes_on_and_its_code_is_told(tmp_path: Path, ending: BaseException, code: int) -> None:
    def end() -> None:
        with telling_the_pod({FOLDER_VARIABLE: str(tmp_path), "LOCAL_RANK": "0"}):
            raise ending

    with pytest.raises(type(ending)):
        end()
    assert told(tmp_path) == [code]


def test_the_sentence_of_an_error_is_told_in_one_line(tmp_path: Path) -> None:
    def command(error: Exception) -> None:
        with telling_the_pod({FOLDER_VARIABLE: str(tmp_path), "LOCAL_RANK": "0"}):
            try:
                raise error
            except OdonataError as known:
                sys.exit(known.exit_code)

    with pytest.raises(SystemExit):
        command(ConfigError("two keys are wrong:\n  a\n  b"))
    assert read_ranks(tmp_path) == [Rank(0, os.getpid(), 2, "two keys are wrong: a b")]
    with pytest.raises(ValueError, match="no number"):
        command(ValueError("no number"))
    assert read_ranks(tmp_path) == [Rank(0, os.getpid(), 1, "ValueError: no number")]


def end_beside_a_sibling(folder: Path, ending: OdonataError) -> threading.Thread:
    """Local rank 0 ends by `ending`, as the command line does, while this process is local rank 1 and lives."""
    (folder / "1").write_text(str(os.getpid()))

    def command() -> None:
        with telling_the_pod({FOLDER_VARIABLE: str(folder), "LOCAL_RANK": "0"}):
            try:
                raise ending
            except OdonataError as error:
                sys.exit(error.exit_code)

    def end() -> None:
        with pytest.raises(SystemExit):
            command()

    ended = threading.Thread(target=end, daemon=True)
    ended.start()
    return ended


def test_a_rank_that_was_asked_to_stop_stays_until_its_siblings_have_ended(tmp_path: Path) -> None:
    rank = end_beside_a_sibling(tmp_path, PreemptedError("stopped"))
    deadline = time.monotonic() + 10
    while told(tmp_path) != [EXIT_RETRY, None]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    rank.join(timeout=0.5)
    assert rank.is_alive(), "it has told its code and stays"
    (tmp_path / "1").write_text(f"{os.getpid()} {EXIT_RETRY}")
    rank.join(timeout=10)
    assert not rank.is_alive()


def test_a_rank_that_has_lost_a_peer_stays_for_nobody(tmp_path: Path) -> None:
    rank = end_beside_a_sibling(tmp_path, PeerLostError("gone"))
    rank.join(timeout=10)
    assert not rank.is_alive() and told(tmp_path) == [EXIT_RETRY, None]


@pytest.mark.parametrize("environment", [{}, {"LOCAL_RANK": "0"}, {FOLDER_VARIABLE: "/nowhere"}])
def test_where_no_pod_waits_nothing_is_told(environment: dict[str, str]) -> None:
    with telling_the_pod(environment):
        pass


def test_ranks_are_read_in_their_order_and_a_write_that_is_not_finished_is_none(tmp_path: Path) -> None:
    for name in ("10", "2", "3.new"):
        (tmp_path / name).write_text("1 75")
    assert [rank.local_rank for rank in read_ranks(tmp_path)] == [2, 10]


def test_the_command_tells_its_own_code(tmp_path: Path) -> None:
    environment = os.environ | {FOLDER_VARIABLE: str(tmp_path), "LOCAL_RANK": "1"}
    command = [sys.executable, "-m", "odonata", "config", "launch/runs/nothing.yaml"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    (rank,) = read_ranks(tmp_path)
    assert (rank.local_rank, rank.code) == (1, ended.returncode) == (1, 2)
