"""The command line: what it refuses, with which code, and how fast it answers."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from odonata.printing import say_age, say_ranks
from tests.command import Command, command

ROOT = Path(__file__).parents[1]
TINY = "launch/runs/croco_video_tiny.yaml"


__all__ = ["command"]  # a fixture


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    "name",
    [
        (),
        *(
            (name,)
            for name in (
                "train",
                "config",
                "synthesize",
                "pack",
                "plan",
                "evaluate",
                "probe",
                "import",
                "card",
                "view",
                "goodput",
                "doctor",
                "render",
                "pod",
                "submit",
                "resume",
                "list",
                "status",
                "logs",
                "stop",
            )
        ),
    ],
)
def test_help_has_an_example_for_every_command(name: tuple[str, ...], command: Command) -> None:
    done = command(*name, "--help")
    assert done.code == 0
    assert not name or "Example:" in done.out


def test_it_tells_its_version(command: Command) -> None:
    assert command("--version").out.startswith("odonata 0.")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("config", "launch/runs/nothing.yaml"), "is not a file"),
        (("config",), "needs a run config"),
        (("config", TINY, "optim.lrr=1"), "did you mean lr?"),
        (("train", TINY, "--resume", "perhaps"), "neither auto nor never"),
        (("evaluate", "depth", "--encoder", "scratch"), "not which encoder"),
        (("evaluate", "depth", "--encoder", "nowhere", "--data", "root=city"), "there is no run"),
        (("evaluate", "depth", "--encoder", "README.md", "--data", "root=city"), "become a run by `odonata import`"),
        (("evaluate", "depth", "--encoder", "scratch", "--size", "nano", "--seed", "1", "--seed", "1"), "--seed was given 1, 1"),
        (
            ("evaluate", "pose", "--encoder", "scratch", "--size", "tiny", "--data", "kind=synthetic"),
            "data.root: required",
        ),
        (
            ("import", "nowhere.pth", TINY, "data.root=city", "--out", "nowhere"),
            "nowhere.pth was to be imported and is not a file",
        ),
        (("import", "README.md", TINY, "--out", "nowhere"), "cannot be read as tensors and plain values alone"),
        (("import", "README.md", "launch/runs/nothing.yaml", "--out", "nowhere"), "is not a file"),
        (("probe", "nowhere", "--task", "depth", "--every", "10"), "there is no config.yaml"),
        (("probe", "nowhere", "--task", "dept", "--every", "10"), "--task knows depth"),
        (("card", "nowhere"), "there is no run"),
        (("card", "nowhere", "--evaluation", "nothing"), "holds no evaluation.json that can be read"),
        (("view", "nowhere"), "there is no run"),
        (("view",), "give RUN, RUN --clip NAME, or --clip NAME --data root=/data/nuscenes"),
        (("view", "nowhere", "--data", "root=city"), "which goes with RUN too where its data lies elsewhere now"),
        (("view", "nowhere", "--evaluation", "nothing"), "holds no evaluation.json that can be read"),
        (("render", TINY, "--cluster", "k8s/clusters/nothing.yaml", "-o", "manifests"), "is not a file"),
        (("render", TINY, "--cluster", TINY, "-o", "manifests"), "is not a cluster config"),
        (("render", TINY, "--cluster", "k8s/clusters/one_node.yaml", "-o", "manifests"), "would lie on a pod's own disk"),
        (("pod", TINY, "--accelerate", "nothing.yaml"), "cannot be read"),
        (("pod", TINY, "--accelerate", "launch/accelerate/fsdp2.yaml", "--node-rank", "0"), "a single one needs neither"),
        (("submit", TINY, "--cluster", "k8s/clusters/nothing.yaml"), "is not a file"),
        (("submit", TINY, "--cluster", "k8s/clusters/one_node.yaml"), "would lie on a pod's own disk"),
        *(
            ((command, *run, "--context", "no-such-context"), "name a file in KUBECONFIG and a context of it with --context")
            for command, run in {
                "list": (),
                "status": ("mine",),
                "logs": ("mine",),
                "stop": ("mine",),
                "resume": ("mine",),
            }.items()
        ),
        (("doctor", "launch/runs/nothing.yaml"), "is not a file"),
        (("pack", "nowhere"), "has no place to pack it into"),
        (
            ("pack", "nowhere", "packed"),
            f"was to be read as a dataroot and is not a folder in {Path.cwd()}; give a nuScenes dataroot",
        ),
        (("pack", "--verify", "nowhere"), "has no version"),
        (("pack", "--repair", "nowhere"), "has no place to pack it into"),
        (("pack", "--verify", "--version", "v1.0", "nowhere"), "whose versions are numbers"),
        (("pack", "--verify", "s3://"), "names no bucket"),
        (("goodput", "nowhere"), "has no starts.jsonl; give the run.uri of a run"),
    ],
)
def test_a_mistake_is_a_sentence_and_the_code_that_says_do_not_retry(
    arguments: tuple[str, ...], sentence: str, command: Command
) -> None:
    done = command(*arguments)
    assert done.code == 2
    assert done.err.startswith("odonata: ")
    assert sentence in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(("ranks", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8"), (range(1024), "0-1023")])
def test_ranks_in_a_row_are_said_as_one(ranks: Sequence[int], text: str) -> None:
    assert say_ranks(ranks) == text


@pytest.mark.parametrize(("age_s", "text"), [(-5, "0 s"), (90, "90 s"), (120, "2 min"), (2 * 3600, "2 h"), (5 * 86400, "5 d")])
def test_an_age_is_said_in_the_unit_that_fits(age_s: float, text: str) -> None:
    assert say_age(time.time() - age_s) == text


@pytest.mark.parametrize(
    "option", [("--scenes", "0"), ("--scale", "2"), ("--duration-s", "0"), ("--seed", "-1"), ("--rig", "six")]
)
def test_a_synthesis_that_makes_no_sense_is_refused(option: tuple[str, str], tmp_path: Path, command: Command) -> None:
    done = command("synthesize", "--out", str(tmp_path / "city"), *option)
    assert done.code == 2
    assert option[0] in done.err
    assert not (tmp_path / "city").exists()


@pytest.mark.parametrize("option", [("--every", "0"), ("--steps", "0"), ("--clips", "0"), ("--metrics-port", "-1")])
def test_probes_that_make_no_sense_are_refused(option: tuple[str, str], command: Command) -> None:
    done = command("probe", "nowhere", "--task", "depth", "--every", "10", *option)
    assert done.code == 2
    assert option[0] in done.err


def test_another_projects_package_of_our_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; from odonata.door import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert str(tmp_path / "models") in done.stderr


@pytest.mark.parametrize("out", ["a file", "/proc/nothing"])
def test_a_place_that_cannot_hold_a_data_set_is_a_sentence(tmp_path: Path, out: str, command: Command) -> None:
    (tmp_path / "a file").touch()
    ended = command("synthesize", "--out", str(tmp_path / out), "--scenes", "1")
    assert ended.code == 2
    assert ended.err.startswith("odonata: ")
    assert "give another --out" in ended.err


def test_a_signal_that_comes_while_a_monitor_is_built_or_a_line_is_logged_ends_the_command() -> None:
    # Both catch every Exception, so that neither a monitor nor a log can end a run. Tracing the model for MFU takes a minute at times.
    builders = "[lambda: os.kill(os.getpid(), signal.SIGTERM)]"
    logs = "logging.basicConfig(stream=type('Stream', (), {'write': lambda *_: os.kill(os.getpid(), signal.SIGTERM)})())"
    for moment in (f"build_monitors({builders})", f"{logs}; logging.warning('now')"):
        code = (
            "import logging, os, signal; from odonata.door import _end_at_once; from trainer.observe.build import build_monitors; "
            f"signal.signal(signal.SIGTERM, _end_at_once); {moment}; print('went on')"
        )
        ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert (ended.returncode, ended.stdout) == (75, ""), ended.stderr
        assert "stopped by SIGTERM; start the same command again" in ended.stderr


def test_a_signal_before_training_asks_for_a_retry_and_leaves_no_process_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "odonata", "synthesize", "--out", str(tmp_path / "city"), "--scenes", "2", "--workers", "2"]
    started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    process = psutil.Process(started.pid)
    deadline = time.monotonic() + 60
    while len(process.children()) < 3:  # two workers and what counts their resources
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = process.children()
    started.send_signal(signal.SIGTERM)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 75, said
    assert "stopped by SIGTERM" in said
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
