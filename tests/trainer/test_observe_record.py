"""The record: one valid JSON object a step, whole after a kill, cut back to the step that a resume starts from."""

import json
import math
import os
import resource
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.s3_server import S3Server
from tests.trainer.observe_fakes import Saved, Seat, report
from trainer.checkpoint.claim import Writer, claim_run
from trainer.errors import EXIT_RETRY
from trainer.observe.environment import describe_environment, describe_revision
from trainer.observe.record import RunRecord
from trainer.store.base import StoreError
from trainer.store.open import open_store

ROOT = Path(__file__).parents[2]


@contextmanager
def recording(folder: Path, *, resumed_at: int = 0) -> Iterator[RunRecord]:
    record = RunRecord(
        open_store(folder), resumed_at=resumed_at, config_yaml="steps: 4\n", environment={"a": 1}, clock=lambda: 7.0
    )
    with closing(record):
        yield record


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of strict JSON: NaN and Infinity, which Python's parser takes, are refused."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def steps_in(folder: Path, name: str = "steps.jsonl") -> list[int]:
    return [line["step"] for line in read_lines(folder / name)]


def write_steps(folder: Path, last: int) -> None:
    with recording(folder) as record:
        for step in range(1, last + 1):
            record.step(report(step))
            record.evaluation(step, {"croco/true": 0.5}, seconds=0.5)
            record.checkpoint(Saved(step=step))


@contextmanager
def files_no_larger_than(size_bytes: int) -> Iterator[None]:
    """This process cannot make a file grow past `size_bytes`: the nearest thing to a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_step_is_one_object_with_all_of_its_report(tmp_path: Path) -> None:
    with recording(tmp_path) as record:
        record.step(report(1))
    [line] = read_lines(tmp_path / "steps.jsonl")
    assert line | {"reading": report(1).reading} == asdict(report(1)) | {"time_s": 7.0}


def test_evaluations_and_checkpoints_have_lines_of_their_own(tmp_path: Path) -> None:
    write_steps(tmp_path, 1)
    assert read_lines(tmp_path / "evaluations.jsonl") == [{"step": 1, "seconds": 0.5, "croco/true": 0.5, "time_s": 7.0}]
    assert read_lines(tmp_path / "checkpoints.jsonl") == [
        {"step": 1, "seconds": 0.5, "stall_seconds": 0.125, "bytes": 2_000_000, "time_s": 7.0}
    ]


def test_config_and_environment_lie_beside_the_steps(tmp_path: Path) -> None:
    with recording(tmp_path):
        pass
    assert (tmp_path / "config.yaml").read_text() == "steps: 4\n"
    assert json.loads((tmp_path / "environment.json").read_text()) == {"a": 1}


def test_numbers_that_are_not_finite_are_null_and_the_step_says_it_was_skipped(tmp_path: Path) -> None:
    with recording(tmp_path) as record:
        record.step(report(1, loss=math.nan, grad_norm=math.inf, parts={"croco/pixels": -math.inf}, skipped=True))
    [line] = read_lines(tmp_path / "steps.jsonl")
    assert (line["loss"], line["grad_norm"], line["parts"], line["skipped"]) == (None, None, {"croco/pixels": None}, True)


def test_a_resume_keeps_the_lines_up_to_its_step_and_goes_on_after_them(tmp_path: Path) -> None:
    write_steps(tmp_path, 5)
    with recording(tmp_path, resumed_at=3) as record:
        record.step(report(4))
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    assert steps_in(tmp_path, "evaluations.jsonl") == steps_in(tmp_path, "checkpoints.jsonl") == [1, 2, 3]


def test_a_run_that_begins_anew_drops_what_an_earlier_start_wrote(tmp_path: Path) -> None:
    write_steps(tmp_path, 2)
    with recording(tmp_path):
        assert steps_in(tmp_path) == []


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "lo', b'{"step": 3}', b"\x00\x00\n", b"\xff\n", b"[]\n", b"3\n", b'{"loss": 1}\n']
)
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    write_steps(tmp_path, 2)
    with (tmp_path / "steps.jsonl").open("ab") as file:
        file.write(torn)
    with recording(tmp_path, resumed_at=3) as record:
        record.step(report(4))
    assert steps_in(tmp_path) == [1, 2, 4]


def test_cutting_back_a_file_that_needs_none_leaves_its_bytes_alone(tmp_path: Path) -> None:
    write_steps(tmp_path, 2)
    before = (tmp_path / "steps.jsonl").stat()
    with recording(tmp_path, resumed_at=2):
        after = (tmp_path / "steps.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_killed_run_leaves_every_step_it_reported(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tests.trainer.observe_fakes import report\n"
        "from tests.trainer.test_observe_record import recording\n"
        "with recording(Path(sys.argv[1])) as record:\n"
        "    for step in range(1, 51): record.step(report(step))\n"
        "    sys.stdout.write('reported'); sys.stdout.flush(); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.read(8) == b"reported"
        process.send_signal(signal.SIGKILL)
    assert steps_in(tmp_path) == list(range(1, 51))


@pytest.mark.parametrize("room_bytes", [0, 10])
def test_a_full_disk_is_a_sentence_that_asks_for_a_retry_and_the_lines_before_stay(tmp_path: Path, room_bytes: int) -> None:
    write_steps(tmp_path, 2)
    with (
        recording(tmp_path, resumed_at=2) as record,
        files_no_larger_than((tmp_path / "steps.jsonl").stat().st_size + room_bytes),
        pytest.raises(StoreError, match=r"append to .*steps\.jsonl.*start the same job again") as caught,
    ):
        record.step(report(3))
    assert caught.value.exit_code == EXIT_RETRY
    with recording(tmp_path, resumed_at=2):
        assert steps_in(tmp_path) == [1, 2]


def test_the_environment_says_versions_hardware_and_launch_and_is_json() -> None:
    environment = json.loads(json.dumps(describe_environment(Seat(), {"samples": 3})))
    assert environment["launch"] == {"engine": "fsdp2", "world_size": 2, "precision": "bf16"}
    assert environment["data"] == {"samples": 3}
    assert environment["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "accelerate", "numpy", "xformers"} <= environment["versions"].keys()
    assert environment["hardware"]["cores"] >= 1
    assert environment["hardware"]["memory_bytes"] > 2**28
    assert environment["hardware"]["cpu"]


def test_the_environment_does_not_name_the_machine() -> None:
    name = os.uname().nodename
    assert len(name) < 4 or name not in json.dumps(describe_environment(Seat(), {}))


def test_code_outside_of_a_checkout_has_no_revision(tmp_path: Path) -> None:
    assert describe_revision(tmp_path) is None


def test_the_revision_is_the_commit_and_whether_files_differ(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "one", "--no-verify")
    commit = git("rev-parse", "HEAD")
    assert describe_revision(tmp_path) == {"commit": commit, "changed": False}
    (tmp_path / "file").write_text("two")
    assert describe_revision(tmp_path) == {"commit": commit, "changed": True}


def test_a_writer_that_was_taken_over_leaves_the_record_of_its_successor_alone(s3_server: S3Server, s3_owner: None) -> None:
    store = open_store(f"s3://{s3_server.bucket}/{secrets.token_hex(8)}", s3_server.config())

    def claim() -> Writer:
        return claim_run(store, job="the same", expiry_s=60.0, find_committed=list)

    def begin() -> RunRecord:
        return RunRecord(store, resumed_at=0, config_yaml="", environment={})

    first, before = claim(), begin()
    before.step(report(1))
    second, after = claim(), begin()
    for step in (1, 2):
        after.step(report(step))
    after.sync()
    before.close()
    assert [json.loads(line)["step"] for line in store.get("steps.jsonl").splitlines()] == [1, 2]
    after.step(report(3))
    after.close()
    assert len(store.get("steps.jsonl").splitlines()) == 3
    first.release()
    second.release()
