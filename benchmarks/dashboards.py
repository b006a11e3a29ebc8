"""The pictures of the dashboards in docs/: two small runs under a real Prometheus, one of them killed and started again.

    .venv/bin/python -m benchmarks.dashboards [--minutes 12] [--out docs/pictures]

`surround` learns CroCo and SimIPU on two FSDP2 ranks from packed shards with a cache, and is killed halfway; `video` learns CroCo in one
process from loose files; a probe of depth follows the first. All are scraped every five seconds with our rules. Then
`monitoring.dashboards.picture` asks that Prometheus what the committed dashboards ask. A stretch of minutes on a CPU: figures that compare
with an hour ago are empty, and MFU is a CPU's.

JSON keys: minutes, pictures.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.report import Report, build_parser
from benchmarks.training import odonata, synthesize_city
from monitoring.dashboards.picture import draw_all
from tests.monitoring.expressions import RULES
from tests.monitoring.prometheus import scraping, wait_until
from tests.runs import ACCELERATE, free_port, kill_tree

_STARTING_S = 600
_DOWN_S = 15
_CROCO = "{kind: croco, decoder: tiny, weight: 1.0, mask: {ratio: 0.8}}"
_SURROUND = (
    "launch/runs/simipu_tiny.yaml",
    f"objectives=[{_CROCO}, {{kind: simipu, points: tiny, weight: 0.1}}]",
    "data.kind=shards",
    "global_batch=4",
    "steps=600",
    "checkpoint.every_steps=20",
    "observe.evaluate_clips=8",
)
_VIDEO = (
    "launch/runs/croco_video_tiny.yaml",
    "global_batch=4",
    "steps=2000",
    "checkpoint.every_steps=100",
    "observe.evaluate_clips=8",
)
_PROBE = ("--task", "depth", "--every", "40", "--steps", "40", "--clips", "20", "--data", "kind=synthetic")


def main() -> None:
    """See the module."""
    parser = build_parser(__doc__)
    parser.add_argument("--city", type=Path, default=Path("/tmp/odonata-monitoring/city"))
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    arguments = parser.parse_args()
    report = Report("dashboards", arguments)
    packed = pack_city(synthesize_city(arguments.city, scenes=4))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ports = {"surround": free_port(), "video": free_port()}
        probe = ("probe", f"{folder}/surround", *_PROBE, "--data", f"root={arguments.city}", "--metrics-port", str(free_port()))
        shards = (f"data.datasets=[{{uri: {packed}}}]", f"data.cache.folder={folder}/cache", f"data.index_folder={folder}/index")
        surround = (*_SURROUND, *shards, *places(folder, "surround", ports))
        video = (*_VIDEO, f"data.root={arguments.city}", *places(folder, "video", ports))
        with running("train", *surround, processes=2) as first, running("train", *video):
            wait_until(lambda: has_started(folder, ports), "both runs take steps", timeout_s=_STARTING_S)
            targets = [*ports.values(), int(probe[-1])]
            with (
                running(*probe),
                scraping(targets, folder, list(RULES.glob("*.yaml")), every="5s", path="/metrics/pod") as prometheus,
            ):
                began = time.monotonic()
                time.sleep(30 * arguments.minutes)
                kill_tree(first.pid)
                time.sleep(_DOWN_S)
                with running("train", *surround, processes=2):
                    time.sleep(30 * arguments.minutes)
                    draw_all(prometheus.url, arguments.out, run="surround", seconds=time.monotonic() - began)
    pictures = sorted(path.name for path in arguments.out.glob("dashboard_*.png"))
    report.say(f"in {arguments.out}: {', '.join(pictures)}")
    report.finish({"minutes": arguments.minutes, "pictures": len(pictures)})


def pack_city(city: Path) -> Path:
    """`city` as shards beside it, unless they are there."""
    packed = city.with_name(f"{city.name}-packed")
    if not packed.is_dir():
        odonata("pack", city, packed)
    return packed


def places(folder: Path, name: str, ports: dict[str, int]) -> tuple[str, ...]:
    """Where run `name` lives and is scraped."""
    return f"run.uri={folder}/{name}", f"observe.metrics_port={ports[name]}", "observe.metrics_host=127.0.0.1"


@contextmanager
def running(*command: str, processes: int = 1) -> Iterator[subprocess.Popen[bytes]]:
    """A command of odonata, on ranks of its own under FSDP2 where it has several; it is killed in the end."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["accelerate.commands.launch", "--config_file", str(ACCELERATE / "fsdp2.yaml")]
        launcher += ["--num_processes", str(processes), "--main_process_port", str(free_port()), "-m"]
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*launcher, "odonata", *command], stdout=sys.stderr, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
        process.wait()


def has_started(folder: Path, runs: dict[str, int]) -> bool:
    """Whether each of `runs` has recorded a step."""
    journals = [folder / name / "steps.jsonl" for name in runs]
    return all(path.exists() and [json.loads(line) for line in path.read_text().splitlines()] for path in journals)


if __name__ == "__main__":
    main()
