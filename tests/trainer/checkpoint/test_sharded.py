"""Checkpoints across engines and world sizes, on gloo: two launches hold all of it."""

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.gloo import run_ranks
from tests.trainer.checkpoint.toy import FailingStore, Toy, Trainer, save_now, unequal, whole
from trainer.checkpoint.boxes import State, take_share
from trainer.checkpoint.logical import model_state
from trainer.checkpoint.manager import CheckpointManager, load_into_model, read_tensors
from trainer.checkpoint.record import Record
from trainer.config.training import CheckpointConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.store.base import Store, StoreError
from trainer.store.open import open_store

SAVED_AT = 4
AFTER = range(SAVED_AT, SAVED_AT + 5)
LOSS_RTOL = 1e-6


def sharding(mesh: DeviceMesh) -> Callable[[nn.Module], nn.Module]:
    """Shard a toy over `mesh` as the trainer shards: each block, then the rest, which stays gathered after a forward."""

    def shard(module: nn.Module) -> nn.Module:
        for block in module.encoder.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
        return module

    return shard


def manage(store: Store) -> CheckpointManager:
    return CheckpointManager(store, CheckpointConfig())


def save(store: Store, trainer: Trainer, *, engine: str) -> Record:
    return save_now(manage(store), SAVED_AT, trainer.state(), engine=engine)


def resume(store: Store, trainer: Trainer) -> Record:
    manager = manage(store)
    record = manager.newest()
    assert record is not None
    manager.load(record, trainer.state())
    return record


def share_bytes(trainer: Trainer) -> int:
    """What this rank is to write, and so to copy."""
    return sum(boxes.bytes for boxes in take_share(trainer.state()).values())


def as_arrays(state: State) -> dict[str, np.ndarray[Any, Any]]:
    return {name: tensor.numpy() for name, tensor in whole(state).items()}


def on_two_ranks(folder: Path) -> dict[str, Any]:
    """Everything that two ranks can show; the parent looks at what comes back."""
    mesh = init_device_mesh("cpu", (2,))
    saw: dict[str, Any] = {}
    trainer = Trainer(0, wrap=sharding(mesh))
    trainer.train(range(SAVED_AT))
    fsdp_store = open_store(folder / "fsdp2")
    saw["fsdp2 record"] = save(fsdp_store, trainer, engine="fsdp2")
    saved = whole(trainer.state())
    saw["saved"] = as_arrays(trainer.state())
    saw["unbroken"] = trainer.train(AFTER)

    resumed = Trainer(1, wrap=sharding(mesh))
    saw["found"] = resume(fsdp_store, resumed)
    saw["fsdp2 unequal"] = unequal(whole(resumed.state()), saved)
    saw["fsdp2 resumed"] = resumed.train(AFTER)

    replicated = Trainer(2, wrap=DistributedDataParallel)
    resume(fsdp_store, replicated)
    saw["ddp unequal"] = unequal(whole(replicated.state()), saved)
    saw["ddp share"] = share_bytes(replicated)
    saw["ddp record"] = save(open_store(folder / "ddp"), replicated, engine="ddp")
    saw["ddp resumed"] = replicated.train(AFTER)

    saw["bf16 unequal"] = round_trip_in_bf16(open_store(folder / "bf16"), mesh)
    saw["gathered"] = names_gathered_after_a_forward(mesh)
    saw["errors"] = errors_of_a_full_disk_under_rank_1(fsdp_store, trainer)
    saw["passed over"] = what_is_passed_over(fsdp_store, trainer)
    saw["mismatch"] = error_of_another_model(fsdp_store, mesh)
    saw["apart"] = error_of_folders_that_are_not_shared(folder, trainer)
    saw["warm"] = encoder_unequal_after_warm_start(open_store(folder / "ddp"), mesh, saved)
    return saw


def round_trip_in_bf16(store: Store, mesh: DeviceMesh) -> list[str]:
    trainer = Trainer(0, wrap=sharding(mesh), dtype=torch.bfloat16)
    trainer.train(range(2))
    save(store, trainer, engine="fsdp2")
    resumed = Trainer(1, wrap=sharding(mesh), dtype=torch.bfloat16)
    resume(store, resumed)
    assert resumed.state()["model.head.weight"].dtype == torch.bfloat16
    return unequal(whole(resumed.state()), whole(trainer.state()))


def names_gathered_after_a_forward(mesh: DeviceMesh) -> list[str]:
    """An evaluation leaves the root gathered; its weights must be shards again in the state."""
    trainer = Trainer(0, wrap=sharding(mesh))
    with torch.no_grad():
        trainer.module(torch.zeros(2, 4, 12))
    state = trainer.state()
    trainer.train(range(1))
    whole_here = [name for name, boxes in state.items() if any(tensor.shape == boxes.shape for _, tensor in boxes.boxes)]
    return [name for name in whole_here if "offset" not in name and ".step" not in name and "gain" not in name]


def errors_of_a_full_disk_under_rank_1(store: Store, trainer: Trainer) -> tuple[str, list[str], bool]:
    """What a rank is told when one rank's disk is full, what it changed in the state, and whether the old one is still there."""
    before, older = whole(trainer.state()), manage(store).newest()
    full = FailingStore(store, "rank-00001.bin")
    with pytest.raises(StoreError) as caught:
        save_now(manage(full), 9, trainer.state(), engine="fsdp2")
    return str(caught.value), unequal(whole(trainer.state()), before), manage(store).newest() == older


def what_is_passed_over(store: Store, trainer: Trainer) -> tuple[int, list[str]]:
    """Damage in the object that rank 1 looks at: every rank takes the same older one, the first says why."""
    record = save_now(manage(store), 9, trainer.state(), engine="fsdp2")
    if dist.get_rank() == 0:
        path = Path(store.uri, record.prefix, "rank-00001.bin")
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    dist.barrier()
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logger = logging.getLogger("trainer.checkpoint.manager")
    logger.addHandler(handler)
    found = manage(store).newest()
    logger.removeHandler(handler)
    assert found is not None
    return found.step, log.getvalue().splitlines()


def error_of_another_model(store: Store, mesh: DeviceMesh) -> str:
    record = manage(store).newest()
    assert record is not None
    model = Toy()
    model.head = nn.Linear(12, 7)
    model.more = nn.Linear(2, 2)
    other = model_state(sharding(mesh)(model))
    with pytest.raises(CheckpointError) as caught:
        manage(store).load(record, other)
    return str(caught.value)


def error_of_folders_that_are_not_shared(folder: Path, trainer: Trainer) -> str:
    """What two nodes are told whose run.uri names a folder of their own on each."""
    with pytest.raises(ConfigError) as caught:
        save(open_store(folder / f"node-{dist.get_rank()}"), trainer, engine="fsdp2")
    return str(caught.value)


def encoder_unequal_after_warm_start(store: Store, mesh: DeviceMesh, saved: dict[str, Tensor]) -> list[str]:
    trainer = Trainer(3, wrap=sharding(mesh))
    load_into_model(store, trainer.module, parts="encoder")
    found = whole(trainer.state())
    return [name for name in found if name.startswith("model.encoder.") and not torch.equal(found[name], saved[name])]


def on_four_ranks(folder: Path) -> dict[str, Any]:
    """Resume what two ranks saved, on four: sharded over all, and in two replicas of two shards."""
    saw: dict[str, Any] = {}
    meshes = {
        "fsdp2": init_device_mesh("cpu", (4,)),
        "hsdp": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")),
    }
    for name, origin in (("fsdp2", "ddp"), ("hsdp", "fsdp2")):
        trainer = Trainer(1, wrap=sharding(meshes[name]))
        resume(open_store(folder / origin), trainer)
        saw[f"{name} state"] = as_arrays(trainer.state())
        saw[f"{name} share"] = share_bytes(trainer)
        saw[f"{name} record"] = save(open_store(folder / f"{name} of four"), trainer, engine=name)
        saw[f"{name} resumed"] = trainer.train(AFTER)
    return saw


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(on_two_ranks, 2, folder)


@pytest.fixture(scope="module")
def four(folder: Path, two: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return run_ranks(on_four_ranks, 4, folder)


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    same = {name for name in found.keys() & expected.keys() if np.array_equal(found[name], expected[name])}
    return sorted((found.keys() | expected.keys()) - same)


def test_a_resumed_sharded_run_equals_the_unbroken_one_bit_for_bit(two: list[dict[str, Any]]) -> None:
    for saw in two:
        assert saw["found"] == saw["fsdp2 record"]
        assert saw["fsdp2 unequal"] == []
        assert saw["fsdp2 resumed"] == saw["unbroken"]


def test_a_sharded_run_resumes_as_a_replicated_one(two: list[dict[str, Any]]) -> None:
    for saw in two:
        assert saw["ddp unequal"] == []
        np.testing.assert_allclose(saw["ddp resumed"], saw["unbroken"], rtol=LOSS_RTOL)


def test_two_ranks_resume_on_four(two: list[dict[str, Any]], four: list[dict[str, Any]]) -> None:
    for name in ("fsdp2", "hsdp"):
        for saw in four:
            assert differing(saw[f"{name} state"], two[0]["saved"]) == []
            np.testing.assert_allclose(saw[f"{name} resumed"], two[0]["unbroken"], rtol=LOSS_RTOL)


@pytest.mark.parametrize("origin", ["fsdp2", "ddp", "fsdp2 of four", "hsdp of four"])
def test_whatever_wrote_it_one_process_resumes(
    folder: Path, two: list[dict[str, Any]], four: list[dict[str, Any]], origin: str
) -> None:
    store = open_store(folder / origin)
    trainer = Trainer(1)
    record = resume(store, trainer)
    assert record.engine == origin.split(maxsplit=1)[0]
    assert differing(as_arrays(trainer.state()), two[0]["saved"]) == []
    assert unequal(read_tensors(store, record), whole(trainer.state())) == []
    np.testing.assert_allclose(trainer.train(AFTER), two[0]["unbroken"], rtol=LOSS_RTOL)


def test_every_rank_writes_its_part_once(two: list[dict[str, Any]], four: list[dict[str, Any]]) -> None:
    state_bytes = sum(array.nbytes for array in two[0]["saved"].values())
    for record in (two[0]["fsdp2 record"], two[0]["ddp record"], four[0]["fsdp2 record"], four[0]["hsdp record"]):
        assert len(record.objects) == record.world_size
        assert record.bytes == state_bytes, "replicated tensors are written once"
        sizes = [stored.bytes for stored in record.objects.values()]
        assert max(sizes) <= 1.5 * min(sizes)


def test_replicas_copy_only_what_they_write(two: list[dict[str, Any]], four: list[dict[str, Any]]) -> None:
    for ranks, name in ((two, "ddp"), (four, "hsdp"), (four, "fsdp2")):
        written = [stored.bytes for _, stored in sorted(ranks[0][f"{name} record"].objects.items())]
        assert [saw[f"{name} share"] for saw in ranks] == written


def test_bf16_weights_in_uneven_shards_come_back_bit_for_bit(two: list[dict[str, Any]]) -> None:
    assert [saw["bf16 unequal"] for saw in two] == [[], []]


def test_a_state_taken_after_an_evaluation_is_made_of_shards(two: list[dict[str, Any]]) -> None:
    assert [saw["gathered"] for saw in two] == [[], []]


def test_a_full_disk_under_one_rank_is_told_to_all_and_harms_nothing(two: list[dict[str, Any]]) -> None:
    for saw in two:
        sentence, changed, older_is_there = saw["errors"]
        assert "failed on rank 1" in sentence
        assert "No space left on device" in sentence
        assert changed == []
        assert older_is_there


def test_damage_seen_by_one_rank_is_agreed_on_by_all(two: list[dict[str, Any]]) -> None:
    assert [saw["passed over"][0] for saw in two] == [SAVED_AT, SAVED_AT]
    (line,) = two[0]["passed over"][1]
    assert "rank-00001.bin has the checksum" in line
    assert two[1]["passed over"][1] == []


def test_a_model_that_does_not_fit_is_refused_on_all_ranks(two: list[dict[str, Any]]) -> None:
    for saw in two:
        assert "model.head.weight (stored 3 x 12 float32, here 7 x 12 float32)" in saw["mismatch"]
        assert "only in this run: model.more.bias" in saw["mismatch"]


def test_a_run_folder_that_is_not_shared_is_found_at_the_first_save(folder: Path, two: list[dict[str, Any]]) -> None:
    for saw in two:
        assert "rank-00001.bin is missing; run.uri must be one place for all nodes" in saw["apart"]
    assert not list((folder / "node-0").rglob("manifest.json"))


def test_a_sharded_model_starts_from_the_weights_of_a_replicated_run(two: list[dict[str, Any]]) -> None:
    assert [saw["warm"] for saw in two] == [[], []]
