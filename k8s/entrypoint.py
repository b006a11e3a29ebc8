"""What runs in a pod: `accelerate launch` of this node's ranks, a signal passed on to them, and their own exit code at the end.

The launcher alone will not do, for two reasons that were measured: it turns every exit code of a rank into 1, by which nobody can tell a
wrong config from a preempted pod; and on SIGTERM it kills the ranks after 30 s, whatever they have still to save. So SIGTERM goes to the
ranks and not to the launcher, which then sees them end by themselves; and each rank leaves its code in a file (`ranks`).

Which code is the pod's, where ranks differ: what is not to be tried again (2, 3), then a defect (1, also a rank that was killed), then
75. The others of a rank that failed lose their peer and say 75, so 75 is the pod's only where no rank said anything else. The sentence of
a rank that ended with that code is the last line of the pod's log, so that it stands in the pod's status.

Left to whom: what becomes of the code is in the manifests (`job`, `jobset`, `pytorchjob`).
"""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from k8s.ranks import FOLDER_VARIABLE, Rank, read_ranks
from trainer.errors import EXIT_DEFECT, EXIT_DO_NOT_RETRY, EXIT_DONE, EXIT_REFUSED, EXIT_RETRY, ConfigError
from trainer.stop import StopWish, listening

log = logging.getLogger(__name__)

_POLL_S = 0.1
_UNWIND_S = 5.0
"""Seconds after the grace period in which ranks may still end by themselves."""
_RANKING = (EXIT_DO_NOT_RETRY, EXIT_REFUSED, EXIT_DEFECT, EXIT_RETRY)
_NAMES = {"train": "the pod", "doctor": "the doctor"}
_OTHER_LAUNCHERS = ("PET_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_SIZE", "NODE_RANK")
"""Variables of controllers that start pods for torchrun: it reads them behind accelerate's back."""


@dataclass(frozen=True)
class Node:
    """This pod's place among the nodes of a run."""

    rank: int | None
    main_address: str | None
    main_port: int
    meeting_s: int
    """Seconds to wait for the other nodes."""


def run_pod(
    run: Path,
    overrides: Sequence[str],
    accelerate: Path,
    node: Node,
    environ: Mapping[str, str],
    *,
    grace_s: float,
    doctor: bool = False,
) -> int:
    """Train `run` on this node to its end, or to the end of the grace period after SIGTERM; the exit code of the pod.

    With `doctor`, all nodes look first for what would stop the run, and train only where nothing does.
    """
    with listening() as stop:
        if doctor:
            beside = replace(node, main_port=node.main_port + 1)  # so that nobody takes the one meeting for the other
            code = _run_ranks("doctor", run, overrides, accelerate, beside, environ, stop, grace_s=grace_s)
            if code != EXIT_DONE or stop.signal:
                return code or EXIT_RETRY
        return _run_ranks("train", run, overrides, accelerate, node, environ, stop, grace_s=grace_s)


def _run_ranks(
    what: str,
    run: Path,
    overrides: Sequence[str],
    accelerate: Path,
    node: Node,
    environ: Mapping[str, str],
    stop: StopWish,
    *,
    grace_s: float,
) -> int:
    launcher_options = _place_node(accelerate, node)
    with tempfile.TemporaryDirectory(prefix="odonata-ranks-") as folder:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(accelerate), *launcher_options]
        command += ["-m", "odonata", what, str(run), *overrides]
        # A session of its own: Ctrl-C of a terminal, too, comes to the ranks by us.
        launcher = subprocess.Popen(command, env=_clean(environ, folder, grace_s), start_new_session=True)
        watch = Watch(launcher, Path(folder), stop, grace_s=grace_s)
        watch.wait()
        code = watch.judge(alone=node.rank is None)
    told = ", ".join(f"{rank.local_rank}: {rank.code}" for rank in watch.ranks) or "none began"
    log.info("the launcher ended with %s, local ranks with %s: %s ends with %d", launcher.returncode, told, _NAMES[what], code)
    if words := next((rank.words for rank in watch.ranks if rank.code == code), ""):
        log.error("%s", words)
    return code


@dataclass
class Watch:
    """A launcher and its ranks, from their start to their end."""

    launcher: subprocess.Popen[bytes]
    folder: Path
    stop: StopWish
    grace_s: float
    ranks: list[Rank] = field(default_factory=list)
    _told: set[int] = field(default_factory=set)
    _cause: Rank | None = None
    """The rank that was first seen to have failed; the launcher kills the others of it, whose silence then means nothing."""

    def wait(self) -> None:
        """Pass a signal on, and return once the launcher has ended; kill all where that takes longer than it may."""
        while self.launcher.poll() is None:
            self._look()
            if self.stop.signal:
                self._pass_on()
                if self.stop.seconds_ago > self.grace_s + _UNWIND_S:
                    self._kill()
            time.sleep(_POLL_S)
        self._look()

    def judge(self, *, alone: bool) -> int:
        """The exit code of the pod; `alone` where there is no other node."""
        codes = {rank.code for rank in self.ranks}
        if self._cause and self._cause.code is None and not self.stop.signal:
            codes.add(EXIT_DEFECT)
        for code in _RANKING:
            if code in codes:
                return code
        if self.stop.signal:
            return EXIT_RETRY  # killed before they could say so
        if self.ranks:
            return EXIT_DONE if self.launcher.returncode == 0 else EXIT_DEFECT
        return EXIT_DEFECT if alone else EXIT_RETRY  # the other nodes did not come to the meeting

    def _look(self) -> None:
        self.ranks = read_ranks(self.folder)
        failed = [rank for rank in self.ranks if rank.ended_silently] + [rank for rank in self.ranks if rank.code]
        self._cause = self._cause or next(iter(failed), None)

    def _pass_on(self) -> None:
        if not self.ranks and not self._told:
            self._told.add(self.launcher.pid)
            self.launcher.terminate()
        for rank in self.ranks:
            if rank.code is None and rank.pid not in self._told:
                self._told.add(rank.pid)
                _send(rank.pid, signal.SIGTERM)

    def _kill(self) -> None:
        log.warning(
            "%.0f s after SIGTERM ranks still run: killing them; what they have not committed is lost", self.stop.seconds_ago
        )
        for rank in self.ranks:
            if rank.code is None:
                _send(rank.pid, signal.SIGKILL)
        os.killpg(self.launcher.pid, signal.SIGKILL)
        self.launcher.wait()


def _place_node(accelerate: Path, node: Node) -> list[str]:
    """Options of `accelerate launch` that differ between the nodes."""
    try:
        content = yaml.safe_load(accelerate.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"accelerate's config file {accelerate} cannot be read: {error}; name one with --accelerate") from error
    nodes = content.get("num_machines", 1) if isinstance(content, dict) else None
    if nodes == 1 and node.rank is None:
        return ["--main_process_port", str(node.main_port)]
    if not isinstance(nodes, int) or node.rank is None or node.main_address is None or not 0 <= node.rank < nodes:
        raise ConfigError(
            f"{accelerate} asks for num_machines {nodes}, and this one is --node-rank {node.rank} with --main-address {node.main_address}; "
            "each of several nodes needs its rank, from 0 on, and the address of node 0, and a single one needs neither"
        )
    options = {
        "--machine_rank": node.rank,
        "--main_process_ip": node.main_address,
        "--main_process_port": node.main_port,
        "--rdzv_conf": f"timeout={node.meeting_s}",
    }
    return [text for option, value in options.items() for text in (option, str(value))]


def _clean(environ: Mapping[str, str], folder: str, grace_s: float) -> dict[str, str]:
    kept = {name: value for name, value in environ.items() if not name.startswith(_OTHER_LAUNCHERS)}
    # A rank that ends earlier than another lets the launcher end that one, too: it may finish.
    return kept | {FOLDER_VARIABLE: folder, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(round(grace_s))}


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        log.debug("process %d has ended already", pid)
