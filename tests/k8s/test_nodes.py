"""Runs across nodes that have networks of their own: a node is lost, and all meet again; half of them go on.

Two nodes of two ranks each, started as the rendered Job says. Every pod that is started has an address that none had before it. With -s
it is printed what ran where and what came out: the transcript of docs/kubernetes.md.
"""

import sys
import time
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k8s.workload import Workload, build_workload
from tests.k8s.nodes import Nodes, Pod, find_missing
from tests.k8s.workloads import cluster_of
from tests.monitoring.prometheus import wait_until
from tests.runs import Finished, Runner
from trainer.config.load import load_run_config
from trainer.errors import EXIT_DONE, EXIT_RETRY

STEPS = 20
TIMEOUT_S = 30
LIMIT_S = TIMEOUT_S + 60.0
"""... and until a rank that has given up, its launcher and the entrypoint have ended, while other pods start on the same two cores."""
PATIENCE_S = 400
RUN = [
    f"steps={STEPS}",
    "checkpoint.every_steps=5",
    f"parallel.timeout_s={TIMEOUT_S}",
    f"data.timeout_s={TIMEOUT_S / 2}",
    "observe.metrics_port=9400",
]
CLUSTER: dict[str, Any] = {
    "nodes": 2,
    "gpus_per_node": 0,
    "processes_per_node": 2,
    "precision": "no",
    "claims": [{"claim": "city", "path": "/data/city"}, {"claim": "runs", "path": "/data/runs", "writable": True}],
    "startup_s": 300,
    "grace_s": 60,
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def runner(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder = tmp_path_factory.mktemp("runs")
    return Runner(folder, f"data.root={city}", f"data.index_folder={folder / 'index'}")


@pytest.fixture(scope="module")
def unbroken(runner: Runner) -> Finished:
    """One process, from the first step to the last."""
    return runner.run("unbroken")


@pytest.fixture(scope="module")
def nodes(runner: Runner, city: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    if missing := find_missing():
        pytest.skip(missing)
    with Nodes(tmp_path_factory.mktemp("nodes"), {"city": city, "runs": runner.folder}).joined() as joined:
        yield joined


class Story:
    """A run on the nodes, and the Job controller that looks after it."""

    def __init__(self, nodes: Nodes, runner: Runner, name: str) -> None:
        self.nodes, self.runner, self.name = nodes, runner, name
        self.folder = runner.folder / name
        self.pods: dict[int, Pod] = {}
        """The newest of each index."""

    def begin(self, *, step: int, **cluster: Any) -> None:
        """Start both nodes and return once `step` is taken and something is saved."""
        self.workload = self._render(**cluster)
        self.start(0, 1)
        self.runner.wait_for_step(self.name, step, self.pods[0].process, timeout_s=PATIENCE_S)
        manifests = "checkpoints/*/manifest.json"
        wait_until(lambda: any(self.folder.glob(manifests)), "a checkpoint", timeout_s=PATIENCE_S)

    def start(self, *indices: int) -> None:
        """New pods of these indices, in this order."""
        for index in indices:
            self.pods[index] = pod = self.nodes.start(self.workload, index)
            tell(f"{pod.host} at {pod.address}$ {' '.join(pod.command)}")

    def end(self, index: int, *, timeout_s: float = PATIENCE_S) -> Finished:
        """A pod, once it has ended."""
        pod = self.pods[index]
        ended = self.runner.finish(self.name, pod.process, timeout_s=timeout_s)
        tell("".join(f"{pod.host} | {line}\n" for line in ended.output.splitlines()) + f"{pod.host} ends with {ended.returncode}")
        assert "Using the loopback address" not in ended.output, "the others would never find it"
        return ended

    def lose(self, index: int, event: str) -> None:
        """A pod that was killed: nothing of it runs, and nobody hears its last words."""
        self.lost_s = time.monotonic()
        tell(f"({self.pods[index].host} {event})")
        self.runner.finish(self.name, self.pods.pop(index).process)

    def survive(self, index: int) -> None:
        """The other pod gives up in time, and asks for a retry."""
        assert self.end(index, timeout_s=LIMIT_S).returncode == EXIT_RETRY
        tell(f"(that took {time.monotonic() - self.lost_s:.0f} s)")

    def complete(self) -> Finished:
        """Do as a Job controller does until all pods are done: each that asks for a retry is replaced."""
        done: dict[int, Finished] = {}
        while waited_for := self.pods.keys() - done:
            wait_until(lambda: bool(self._find_ended(waited_for)), "the end of a pod", timeout_s=PATIENCE_S)
            for index in self._find_ended(waited_for):
                ended = self.end(index)
                if ended.returncode == EXIT_RETRY:
                    self.start(index)
                else:
                    assert ended.returncode == EXIT_DONE, ended.output[-4000:]
                    done[index] = ended
        return done[0]

    def _find_ended(self, indices: Set[int]) -> list[int]:
        return [index for index in indices if self.pods[index].process.poll() is not None]

    def go_on_with_half(self, **cluster: Any) -> None:
        """One node in place of two."""
        self.workload, self.pods = self._render(nodes=1, **cluster), {}
        self.start(0)

    def _render(self, **cluster: Any) -> Workload:
        places = ["data.root=/data/city", "data.index_folder=/data/runs/index", f"run.uri=/data/runs/{self.name}"]
        run = load_run_config(self.runner.config, [*places, *RUN])
        return build_workload(run, cluster_of(**(CLUSTER | cluster)), name=None)


def tell(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def assert_unbroken(found: Finished, unbroken: Finished) -> None:
    assert [step["step"] for step in found.steps] == list(range(1, STEPS + 1)), "each step once"
    np.testing.assert_allclose(found.losses, unbroken.losses, rtol=1e-6)


def test_fsdp2_outlives_a_node_without_power_though_its_successor_comes_too_early(
    nodes: Nodes, runner: Runner, unbroken: Finished
) -> None:
    story = Story(nodes, runner, "fsdp2")
    story.begin(step=8)
    story.pods[1].lose_power()
    story.lose(1, "loses its power")
    story.start(1)
    story.survive(0)
    story.start(0)
    assert_unbroken(story.complete(), unbroken)


def test_hsdp_is_stopped_by_a_signal_to_one_node_and_goes_on_with_half(nodes: Nodes, runner: Runner, unbroken: Finished) -> None:
    story = Story(nodes, runner, "hsdp")
    story.begin(step=7, engine="hsdp")
    story.pods[1].terminate()
    tell(f"({story.pods[1].host} gets SIGTERM)")
    ended = [story.end(index) for index in (0, 1)]
    assert [each.returncode for each in ended] == [EXIT_RETRY, EXIT_RETRY]
    saved = len(ended[0].steps)
    assert 7 <= saved < STEPS and any(story.folder.glob(f"checkpoints/step-{saved:08d}*/manifest.json"))
    story.go_on_with_half(engine="fsdp2")
    half = story.complete()
    assert f"after step {saved}" in half.output
    assert_unbroken(half, unbroken)


def test_zero3_outlives_the_node_where_all_meet_and_goes_on_with_half(nodes: Nodes, runner: Runner, unbroken: Finished) -> None:
    story = Story(nodes, runner, "zero3")
    story.begin(step=7, engine="zero3")
    story.pods[0].kill()
    story.lose(0, "is killed")
    story.survive(1)
    story.go_on_with_half(engine="zero3")
    assert_unbroken(story.complete(), unbroken)
