"""What a rank holds beside its state while it saves and loads, measured; one launch of two ranks shows all of it."""

import os

import pytest
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, zeros

from tests.gloo import run_ranks
from tests.memory import RETURNS_MEMORY, watching_peak
from tests.s3_server import OWNER, S3Server
from tests.trainer.checkpoint.toy import save_now
from trainer.checkpoint import storage
from trainer.checkpoint.boxes import Boxes, boxes_of
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.record import Record
from trainer.config.store import StoreConfig
from trainer.config.training import CheckpointConfig
from trainer.store.base import Store
from trainer.store.open import open_store

MB = 1 << 20
PARAMETERS = 24
PARAMETER = 8 * MB
SHARD = PARAMETERS * PARAMETER // 2
PART_MB = 5
READ_BYTES = 4 * MB
SMALL_THINGS = 12 * MB
SAVE_BUFFERS = {"local": SMALL_THINGS, "s3": SMALL_THINGS + (StoreConfig().threads + 2) * PART_MB * MB}
LOAD_BUFFERS = SMALL_THINGS + storage._READERS * READ_BYTES
"""What does not grow with the state; parts and reads are made small, so that the state is large beside them."""
COPY_SEEN = SHARD - MB
"""A copy of a shard, less what the allocator had kept and what the kernel has not counted yet: it counts pages in batches (proc(5))."""


def build(mesh: DeviceMesh, placement: Placement, value: float) -> dict[str, DTensor]:
    """Tensors of `PARAMETER` bytes full of `value`, made in place: nothing is gathered for them."""
    tensors = {f"model.{number}": zeros(2048, 1024, device_mesh=mesh, placements=[placement]) for number in range(PARAMETERS)}
    for number, tensor in enumerate(tensors.values()):
        tensor.to_local().fill_(value + number)
    return tensors


def boxes_in(tensors: dict[str, DTensor]) -> dict[str, Boxes]:
    return {name: boxes_of(tensor) for name, tensor in tensors.items()}


def manage(store: Store) -> CheckpointManager:
    return CheckpointManager(store, CheckpointConfig())


def on_two_ranks(stores: dict[str, tuple[str, StoreConfig]]) -> dict[str, int]:
    """By how many bytes each thing rose above what was there before it."""
    os.environ.update(OWNER.environment)
    storage._READ_BYTES = READ_BYTES
    mesh = init_device_mesh("cpu", (2,))
    rose: dict[str, int] = {}
    for kind, (uri, config) in stores.items():
        store = open_store(uri, config)
        warm_up(store, mesh)
        tensors = build(mesh, Shard(0), 1.0)
        rose[f"{kind} save"], record = watch_save(store, tensors)
        for axis in (0, 1):
            live = build(mesh, Shard(axis), -9.0)
            with watching_peak() as peak:
                manage(store).load(record, boxes_in(live))
            rose[f"{kind} load along {axis}"] = peak.extra_bytes
            assert all((tensor.to_local() == 1.0 + number).all() for number, tensor in enumerate(live.values()))
    with watching_peak() as peak:
        gathered = [tensor.full_tensor() for tensor in tensors.values()]
    rose["gathering"] = peak.extra_bytes
    del gathered, live, tensors
    rose["save of replicas"], _ = watch_save(open_store(stores["local"][0]), build(mesh, Replicate(), 1.0))
    return rose


def watch_save(store: Store, tensors: dict[str, DTensor]) -> tuple[int, Record]:
    """A save from nothing: its staging counts."""
    with watching_peak() as peak:
        record = save_now(manage(store), 1, boxes_in(tensors))
    return peak.extra_bytes, record


def warm_up(store: Store, mesh: DeviceMesh) -> None:
    """Imports, connections and threads are no part of what is measured."""
    state = {"model.small": boxes_of(zeros(8, 8, device_mesh=mesh, placements=[Shard(0)]))}
    manage(store).load(save_now(manage(store), 0, state), state)


@pytest.fixture(scope="module")
def rose(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, int]]:
    stores = {
        "local": (str(tmp_path_factory.mktemp("memory")), StoreConfig()),
        "s3": (f"s3://{s3_server.bucket}/memory", s3_server.config(part_mb=PART_MB)),
    }
    with pytest.MonkeyPatch.context() as environment:
        for name, value in RETURNS_MEMORY.items():
            environment.setenv(name, value)
        return run_ranks(on_two_ranks, 2, stores)


def largest(rose: list[dict[str, int]], name: str) -> int:
    return max(of_rank[name] for of_rank in rose)


def test_a_state_that_is_gathered_is_seen_by_the_measure(rose: list[dict[str, int]]) -> None:
    assert min(of_rank["gathering"] for of_rank in rose) >= SHARD + COPY_SEEN


@pytest.mark.parametrize("kind", SAVE_BUFFERS)
def test_a_save_holds_a_copy_of_the_shard_and_at_most_one_parameter_more(rose: list[dict[str, int]], kind: str) -> None:
    assert COPY_SEEN <= largest(rose, f"{kind} save") <= SHARD + PARAMETER + SAVE_BUFFERS[kind]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", SAVE_BUFFERS)
def test_a_load_holds_at_most_one_parameter_beside_the_shard_however_it_is_cut(
    rose: list[dict[str, int]], kind: str, axis: int
) -> None:
    assert largest(rose, f"{kind} load along {axis}") <= PARAMETER + LOAD_BUFFERS


def test_replicas_copy_no_more_than_each_will_write(rose: list[dict[str, int]]) -> None:
    assert COPY_SEEN <= largest(rose, "save of replicas") <= SHARD + PARAMETER + SAVE_BUFFERS["local"]
