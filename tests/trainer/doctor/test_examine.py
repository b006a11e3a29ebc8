"""The doctor as a whole: on two real ranks, and what findings come to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ACCELERATE, ROOT, SMALL_RUN, free_port
from tests.trainer.doctor.configs import config_of
from trainer.config.training import ParallelConfig
from trainer.doctor.examine import Diagnosis, choose_exit_code, compare_clocks, compare_versions, examine, group_findings
from trainer.doctor.finding import Finding, look
from trainer.errors import ConfigError, OdonataError
from trainer.parallel.launch import read_launch
from trainer.store.base import StoreError

WELL, WRONG, PASSING = Finding("a", "b"), Finding("a", "b", "change c"), Finding("a", "b", "wait", may_pass=True)


@pytest.mark.parametrize(
    ("findings", "code"), [([WELL], 0), ([WELL, PASSING], 75), ([WRONG, PASSING], 2), ([WELL, WRONG], 2), ([], 0)]
)
def test_what_has_to_be_changed_weighs_more_than_what_may_pass(findings: list[Finding], code: int) -> None:
    assert choose_exit_code([Diagnosis(finding, [0]) for finding in findings]) == code


@pytest.mark.parametrize(("error", "may_pass"), [(ConfigError("asked a; found b; do c"), False), (StoreError("a; do c"), True)])
def test_an_error_is_a_finding_whose_last_part_says_what_to_change(error: OdonataError, may_pass: bool) -> None:
    def fail() -> Finding:
        raise error

    finding = look("store", fail)
    assert (finding.name, finding.cure, finding.may_pass) == ("store", "do c", may_pass)
    assert f"{finding.value}; {finding.cure}" == str(error)


def test_equal_faults_are_one_line_and_what_is_well_is_told_by_the_first_rank() -> None:
    fast, slow, full = Finding("store", "9 MB/s"), Finding("store", "8 MB/s"), Finding("disk", "full", "make room")
    of_ranks = [[fast, full], [slow], [slow, full], [Finding("disk", "gone", "mount it")]]
    found = {each.finding: list(each.ranks) for each in group_findings(of_ranks)}
    assert found == {fast: [0, 1, 2], full: [0, 2], of_ranks[3][0]: [3]}


def test_ranks_of_different_images_are_told_apart() -> None:
    one, other = Finding("versions", "torch 2.13"), Finding("versions", "torch 2.14")
    assert compare_versions([[one], [one]]) == []
    (differing,) = compare_versions([[one], [other], [one]])
    assert differing.finding.cure == "start one image on all nodes"
    assert "0, 2: torch 2.13" in differing.finding.value and "1: torch 2.14" in differing.finding.value


def test_clocks_of_ranks_may_differ_by_as_much_as_claims_allow() -> None:
    assert compare_clocks([100.0], 30.0) == []
    assert compare_clocks([100.0, 129.0], 30.0)[0].finding == Finding("clocks of ranks", "29.0 s apart")
    assert compare_clocks([100.0, 131.0], 30.0)[0].finding.cure


def test_one_process_is_examined_without_a_launcher(city: Path, tmp_path: Path) -> None:
    found = {each.finding.name: each.finding for each in examine(config_of(city, tmp_path), read_launch({}, ParallelConfig()))}
    assert set(found) == {"collectives", "versions", "devices", "shared memory", "disk", "store", "clock", "data"}
    assert [name for name, finding in found.items() if finding.cure] == []
    assert not list((tmp_path / "run").rglob("doctor*")), "the probe is removed"


def test_two_ranks_are_examined_as_a_pod_does_before_it_trains(city: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(SMALL_RUN)
    (tmp_path / "taken").write_text("a file where the run's folder would be")
    command = [sys.executable, "-m", "odonata", "pod", str(tmp_path / "run.yaml"), "--doctor"]
    command += ["--accelerate", str(ACCELERATE / "fsdp2.yaml"), "--main-port", str(free_port())]
    command += [f"data.root={city / 'nowhere'}", f"run.uri={tmp_path / 'taken'}"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2, done.stderr[-3000:]
    lines = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert "the doctor ends with 2" in done.stderr
    text = done.stdout
    assert "2 ranks: all_reduce" in text and "GB/s" in text and lines
    assert "give one that all nodes see" in text and "give a folder that this user may read and write" in text
    assert "step 1" not in done.stderr, "nothing is trained"
