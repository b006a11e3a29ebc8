"""The entrypoint of a pod around real runs: what SIGTERM does, and which exit code the pod ends with."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from k8s.entrypoint import Node, Watch, run_pod
from tests.runs import ACCELERATE, ROOT, Finished, Runner, free_port, kill_tree
from trainer.errors import ConfigError
from trainer.stop import StopWish

ALONE = Node(rank=None, main_address=None, main_port=29500, meeting_s=60)


def start_pod(
    runner: Runner, name: str, *overrides: str, accelerate: Path = ACCELERATE / "fsdp2.yaml", options: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """`odonata pod` with two FSDP2 ranks of the small run, or as many as `accelerate` says."""
    command = [sys.executable, "-m", "odonata", "pod", str(runner.config), "--accelerate", str(accelerate)]
    command += ["--grace-s", "60", *(options or ("--main-port", str(free_port()), "--retry-code", "143"))]
    command += [*runner.data, f"run.uri={runner.folder / name}", "steps=100000", "checkpoint.every_steps=100000", *overrides]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PET_NNODES": "7",
        "RANK": "3",
        "WORLD_SIZE": "9",
    }  # as a controller might set
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def runner(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("pods"), f"data.root={city}")


@pytest.fixture(scope="module")
def stopped(runner: Runner) -> Finished:
    """A pod that got SIGTERM in its first steps."""
    process = start_pod(runner, "stopped")
    try:
        runner.wait_for_step("stopped", 3, process)
        process.send_signal(signal.SIGTERM)
        return runner.finish("stopped", process, timeout_s=90)
    finally:
        if process.poll() is None:
            kill_tree(process.pid)


def test_sigterm_commits_the_step_at_hand_and_the_pod_asks_for_a_retry_in_its_cluster_s_words(stopped: Finished) -> None:
    assert stopped.returncode == 143, stopped.output[-3000:]
    (checkpoint,) = (stopped.folder / "checkpoints").iterdir()
    assert checkpoint.name.startswith(f"step-{len(stopped.steps):08d}")
    assert (checkpoint / "manifest.json").exists()


def test_the_pod_says_what_each_of_its_ranks_ended_with(stopped: Finished) -> None:
    assert "local ranks with 0: 75, 1: 75: the pod ends with 75" in stopped.output


def test_a_wrong_config_ends_the_pod_with_the_code_that_nobody_retries(runner: Runner) -> None:
    process = start_pod(runner, "wrong", "parallel.world_size=3")
    wrong = runner.finish("wrong", process)
    assert wrong.returncode == 2, wrong.output[-3000:]
    sentence = "parallel.world_size asks for 3 processes and 2 started"
    assert wrong.output.count(sentence) > 1
    assert sentence in wrong.output.splitlines()[-1], "where Kubernetes takes a pod's last words from"


@pytest.mark.slow
def test_a_pod_that_the_doctor_finds_well_trains(runner: Runner) -> None:
    options = ("--doctor", "--main-port", str(free_port()))
    well = runner.finish("well", start_pod(runner, "well", "steps=2", "checkpoint.every_steps=2", options=options))
    assert well.returncode == 0, well.output[-3000:]
    examined, _, trained = well.output.partition("the doctor ends with 0")
    assert "2 ranks: all_reduce" in examined and "conditional put" in examined
    assert "the pod ends with 0" in trained and len(well.steps) == 2


@pytest.mark.slow
def test_a_signal_to_one_of_two_nodes_stops_both_at_the_same_step_with_one_checkpoint(runner: Runner) -> None:
    two = runner.folder / "two_nodes.yaml"
    text = (ACCELERATE / "fsdp2.yaml").read_text().replace("num_machines: 1", "num_machines: 2")
    two.write_text(text + "same_network: true\n")
    meeting = ("--main-address", "localhost", "--main-port", str(free_port()))
    nodes = [start_pod(runner, "two", accelerate=two, options=("--node-rank", str(rank), *meeting)) for rank in range(2)]
    try:
        runner.wait_for_step("two", 3, nodes[0])
        nodes[1].send_signal(signal.SIGTERM)
        ended = [runner.finish("two", node, timeout_s=90) for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                kill_tree(node.pid)
    assert [each.returncode for each in ended] == [75, 75], ended[0].output[-2000:] + ended[1].output[-2000:]
    (checkpoint,) = (runner.folder / "two" / "checkpoints").iterdir()
    assert checkpoint.name.startswith(f"step-{len(ended[0].steps):08d}")


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        (Node(1, "base-0.base", 29500, 60), "num_machines 1, and this one is --node-rank 1"),
        (Node(None, "base-0.base", 29500, 60), ""),
    ],
)
def test_a_node_that_accelerate_s_file_does_not_know_is_refused(node: Node, sentence: str, tmp_path: Path) -> None:
    several = tmp_path / "several.yaml"
    several.write_text((ACCELERATE / "fsdp2.yaml").read_text().replace("num_machines: 1", "num_machines: 4"))
    file = ACCELERATE / "fsdp2.yaml" if sentence else several
    with pytest.raises(ConfigError, match=sentence or "num_machines 4, and this one is --node-rank None"):
        run_pod(tmp_path / "run.yaml", (), file, node, {}, grace_s=1)


@pytest.mark.parametrize("content", [None, "- a", "a: [", "num_machines: four"])
def test_a_file_that_is_no_config_of_accelerate_is_refused(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match="accelerate"):
        run_pod(tmp_path / "run.yaml", (), file, ALONE, {}, grace_s=1)


class Pod:
    """A watch over a launcher that sleeps and ranks that tell what a test wants."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stop = StopWish()
        self.launcher = self.sleep()
        self.watch = Watch(self.launcher, folder, self.stop, grace_s=0.1)

    @staticmethod
    def sleep(*options: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, *options, "-c", "import time; time.sleep(60)"], start_new_session=True)

    def tell(self, local_rank: int, pid: int, code: int | None = None) -> None:
        (self.folder / str(local_rank)).write_text(f"{pid}" if code is None else f"{pid} {code}")

    def end(self, *, alone: bool = True) -> int:
        """Let the launcher end as it does when a rank has failed, and judge."""
        self.launcher.kill()
        self.launcher.wait()
        self.watch.wait()
        return self.watch.judge(alone=alone)


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("codes", "expected"), [((75, 75), 75), ((75, 2), 2), ((75, 3), 3), ((75, 1), 1), ((1, 2), 2), ((3, 1), 3), ((0, 75), 75)]
)
def test_the_gravest_code_of_the_ranks_is_the_pod_s(pod: Pod, dead: int, codes: tuple[int, int], expected: int) -> None:
    for local_rank, code in enumerate(codes):
        pod.tell(local_rank, dead, code)
    assert pod.end() == expected


def test_a_rank_that_was_killed_is_a_failure_that_counts_though_the_others_ask_for_a_retry(pod: Pod, dead: int) -> None:
    pod.tell(0, os.getpid())
    pod.tell(1, dead)
    pod.watch._look()
    pod.tell(0, dead, 75)
    assert pod.end() == 1


def test_a_rank_that_the_launcher_killed_after_another_one_failed_means_nothing(pod: Pod, dead: int) -> None:
    pod.tell(0, dead, 75)
    pod.tell(1, os.getpid())
    pod.watch._look()
    pod.tell(1, dead)
    assert pod.end() == 75


def test_nodes_that_do_not_meet_try_again_and_a_launcher_that_fails_alone_is_a_defect(pod: Pod) -> None:
    assert pod.end(alone=False) == 75
    assert pod.watch.judge(alone=True) == 1


def test_all_ranks_done_is_done(pod: Pod, dead: int) -> None:
    pod.launcher.kill()
    pod.launcher.wait()
    pod.launcher.returncode = 0
    pod.tell(0, dead, 0)
    pod.watch.wait()
    assert pod.watch.judge(alone=True) == 0


def test_a_signal_before_any_rank_has_begun_ends_the_launcher(pod: Pod) -> None:
    pod.stop.note(signal.SIGTERM, None)
    pod.watch.wait()
    assert pod.launcher.returncode == -signal.SIGTERM
    assert pod.watch.judge(alone=True) == 75


def test_a_rank_that_does_not_heed_sigterm_is_killed_at_the_end_of_the_grace_period(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("k8s.entrypoint._UNWIND_S", 0.2)
    deaf = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )
    assert deaf.stdout is not None
    deaf.stdout.readline()
    pod.tell(0, deaf.pid)
    pod.stop.note(signal.SIGTERM, None)
    pod.watch.wait()
    assert deaf.wait(timeout=10) == -signal.SIGKILL
    assert pod.launcher.returncode == -signal.SIGKILL
    assert pod.watch.judge(alone=True) == 75
    deaf.stdout.close()


def test_each_rank_is_told_once(pod: Pod) -> None:
    rank = pod.sleep()
    pod.tell(0, rank.pid)
    pod.stop.note(signal.SIGTERM, None)
    pod.watch._look()
    pod.watch._pass_on()
    assert rank.wait(timeout=10) == -signal.SIGTERM
    assert pod.launcher.poll() is None, "the launcher ends by itself, when its ranks have"
    pod.watch._pass_on()
    assert pod.end() == 75
