"""Save, retain, find and load in one process; every way in which a stored checkpoint can be broken."""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from models.config import CrocoConfig, EncoderConfig, Grid, MaeConfig, PoseConfig
from models.pretraining import build_model
from tests.trainer.checkpoint.toy import FailingStore, Toy, Trainer, save_now, unequal, whole
from trainer.checkpoint import storage
from trainer.checkpoint.boxes import boxes_of
from trainer.checkpoint.logical import model_state
from trainer.checkpoint.manager import CheckpointManager, load_into_model, read_tensors
from trainer.checkpoint.record import MANIFEST, Record
from trainer.config.training import CheckpointConfig
from trainer.errors import CheckpointError
from trainer.store.base import ObjectInfo, Store, StoreError
from trainer.store.open import open_store

OBJECT = "rank-00000.bin"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "run")


def manage(store: Store, *, keep_last: int = 3, keep_every_steps: int | None = None) -> CheckpointManager:
    return CheckpointManager(store, CheckpointConfig(keep_last=keep_last, keep_every_steps=keep_every_steps))


def save(store: Store, step: int, trainer: Trainer | None = None, **config: int) -> Record:
    trainer = trainer or Trainer(step)
    return save_now(manage(store, **config), step, trainer.state())


def steps(store: Store) -> list[int]:
    """Steps of the committed checkpoints."""
    return sorted(int(info.key.split("-")[1]) for info in store.list("checkpoints") if info.key.endswith(MANIFEST))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(bytes(data))


def test_a_resumed_run_gives_the_same_losses_as_an_unbroken_one(store: Store) -> None:
    trainer = Trainer(0)
    trainer.train(range(4))
    save(store, 4, trainer)
    saved = whole(trainer.state())
    unbroken = trainer.train(range(4, 9))

    resumed = Trainer(1)
    manager = manage(store)
    record = manager.newest()
    assert record is not None
    manager.load(record, resumed.state())
    assert unequal(whole(resumed.state()), saved) == []
    assert resumed.train(range(4, 9)) == unbroken


def test_a_report_says_what_a_save_took_and_the_record_is_the_one_found_again(store: Store) -> None:
    manager = manage(store)
    manager.save(7, Trainer(0).state(), engine="single", progress={"step": 7, "replaced_clips": 2})
    manager.finish()
    (report,) = manager.poll()
    assert manager.poll() == []
    assert report.record is not None
    assert report.seconds > report.stall_seconds > 0
    assert report.bytes == len(store.get(report.record.prefix + OBJECT))
    assert (report.record.engine, report.record.world_size) == ("single", 1)
    assert report.record.progress == {"step": 7, "replaced_clips": 2}
    assert manage(store).newest() == report.record


def test_a_state_saved_before_the_first_step_can_be_resumed(store: Store) -> None:
    trainer = Trainer(0)
    record = save(store, 0, trainer)
    resumed = Trainer(1)
    manage(store).load(record, resumed.state())
    assert resumed.train(range(3)) == trainer.train(range(3))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.tensor([True, False, True]),
        torch.empty(0, 4),
        torch.arange(7, dtype=torch.int64),
        torch.randn(3, 5).to(torch.bfloat16),
        torch.randn(2, 3, dtype=torch.complex64),
        torch.randn(6, 4).T,
        torch.tensor([float("nan"), float("inf"), -0.0]),
        torch.randn(4).to(torch.float8_e4m3fn),
    ],
    ids=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)}",
)
def test_every_kind_of_tensor_comes_back_bit_for_bit(store: Store, tensor: torch.Tensor) -> None:
    record = save_now(manage(store), 1, {"a": boxes_of(tensor), "b": boxes_of(torch.ones(3))})
    assert manage(store).newest() == record
    live = torch.zeros_like(tensor)
    manage(store).load(record, {"a": boxes_of(live), "b": boxes_of(torch.zeros(3))})
    assert live.stride() == tensor.stride()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    assert torch.equal(live.view(bits), tensor.view(bits))


def test_part_of_a_checkpoint_is_read_by_name(store: Store) -> None:
    trainer = Trainer(0)
    record = save(store, 1, trainer)
    assert unequal(read_tensors(store, record, prefix="model."), whole(model_state(trainer.module))) == []
    assert unequal(read_tensors(store, record), whole(trainer.state())) == []


def test_no_artefact_is_a_pickle(store: Store) -> None:
    record = save(store, 1)
    assert [info.key.removeprefix(record.prefix) for info in store.list("")] == [MANIFEST, OBJECT, "started.json"]
    assert store.get(record.prefix + OBJECT, 0, record.bytes) == b"".join(
        bytes(tensor.reshape(-1).view(torch.uint8).numpy())
        for _, tensor in sorted(
            read_tensors(store, record).items(), key=lambda item: record.tensors[item[0]].chunks[0].byte_offset
        )
    )


def test_every_save_has_a_prefix_of_its_own(store: Store) -> None:
    first = save(store, 3)
    second = save(store, 3)
    assert first.prefix != second.prefix
    assert second.prefix.startswith("checkpoints/step-00000003-")
    assert steps(store) == [3]
    assert manage(store).newest() == second


def test_a_run_without_checkpoints_has_no_newest_one(store: Store) -> None:
    assert manage(store).newest() is None


def test_a_save_killed_before_its_manifest_is_not_seen_and_swept_by_the_next(store: Store, tmp_path: Path) -> None:
    whole_one = save(store, 10)
    program = """
import os, sys
from models.config import CrocoConfig, EncoderConfig, Grid, MaeConfig, PoseConfig
from models.pretraining import build_model
from tests.trainer.checkpoint.toy import Trainer, save_now
from trainer.checkpoint import manager
from trainer.config.training import CheckpointConfig
from trainer.store.open import open_store
killed_at = sys.argv[2]
store = open_store(sys.argv[1])
put = store.put
def killing(key, payload, **options):
    if killed_at == "object" and key.endswith(".bin"):
        payload = (os.kill(os.getpid(), 9) or piece if place == 5 else piece for place, piece in enumerate(payload))
    if killed_at == "manifest" and key.endswith("manifest.json"):
        os.kill(os.getpid(), 9)
    return put(key, payload, **options)
store.put = killing
save_now(manager.CheckpointManager(store, CheckpointConfig()), 20, Trainer(0).state())
"""
    for killed_at in ("object", "manifest"):
        ended = subprocess.run([sys.executable, "-c", program, store.uri, killed_at], check=False)
        assert ended.returncode == -9
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 3
    assert manage(store).newest() == whole_one
    save(store, 15)
    assert steps(store) == [10, 15]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2


BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped byte": (lambda folder: flip(folder / OBJECT, 1000), "has the checksum"),
    "a truncated object": (lambda folder: (folder / OBJECT).write_bytes((folder / OBJECT).read_bytes()[:-1]), "bytes and was"),
    "a missing object": (lambda folder: (folder / OBJECT).unlink(), "is missing"),
    "a flipped byte in the manifest": (lambda folder: flip(folder / MANIFEST, 300), MANIFEST),
    "an unreadable manifest": (lambda folder: (folder / MANIFEST).write_bytes(b"\0" * 100), "is not JSON"),
    "an empty manifest": (lambda folder: (folder / MANIFEST).write_bytes(b""), "is not JSON"),
    "a future version": (lambda folder: (folder / MANIFEST).write_text('{"format_version": 99}'), "format_version 99"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_checkpoint_is_passed_over_with_the_reason(
    store: Store, breakage: str, caplog: pytest.LogCaptureFixture
) -> None:
    older = save(store, 10)
    newer = save(store, 20)
    destroy, reason = BREAKAGES[breakage]
    destroy(Path(store.uri, newer.prefix))
    with caplog.at_level(logging.WARNING):
        assert manage(store).newest() == older
    (line,) = [entry.message for entry in caplog.records if entry.name == "trainer.checkpoint.manager"]
    assert newer.prefix in line
    assert reason in line


def test_a_run_whose_checkpoints_are_all_broken_does_not_begin_anew(store: Store) -> None:
    for step in (10, 20):
        flip(Path(store.uri, save(store, step).prefix, OBJECT), 7)
    with pytest.raises(CheckpointError, match=r"none of the 2 there is whole.*step-00000020.*step-00000010") as caught:
        manage(store).newest()
    assert caught.value.exit_code == 2


def test_the_newest_checkpoints_are_kept_and_those_at_multiples(store: Store) -> None:
    for step in range(5, 55, 5):
        save(store, step, keep_last=2, keep_every_steps=20)
    assert steps(store) == [20, 40, 45, 50]


def test_one_checkpoint_is_enough(store: Store) -> None:
    for step in (1, 2, 3):
        save(store, step, keep_last=1)
        assert steps(store) == [step]


def test_retention_counts_whole_checkpoints_only_and_lets_broken_ones_go(store: Store) -> None:
    for step in (10, 20, 30):
        record = save(store, step)
    flip(Path(store.uri, record.prefix, OBJECT), 7)
    manager = manage(store, keep_last=2)
    found = manager.newest()
    assert found is not None
    assert found.step == 20
    save_now(manager, 25, Trainer(0).state())
    assert steps(store) == [20, 25, 30], "a later step is left alone until the run has come past it"
    save_now(manager, 35, Trainer(0).state())
    assert steps(store) == [25, 35]


@pytest.mark.parametrize("ending", ["started.json", ".bin", MANIFEST])
def test_a_full_store_leaves_the_older_checkpoint_and_the_training_state_as_they_were(store: Store, ending: str) -> None:
    trainer = Trainer(0)
    trainer.train(range(3))
    older = save(store, 3, trainer)
    before = whole(trainer.state())
    listed = store.list("")
    full = FailingStore(store, ending)
    with pytest.raises(StoreError, match="No space left on device") as caught:
        save_now(manage(full, keep_last=1), 4, trainer.state())
    assert caught.value.exit_code == 75
    assert store.list("") == listed
    assert unequal(whole(trainer.state()), before) == []
    assert manage(store).newest() == older
    full.full = False
    assert save_now(manage(full), 4, trainer.state()).step == 4


def test_bytes_that_change_between_staging_and_store_are_no_checkpoint(store: Store) -> None:
    class Forgetful(FailingStore):
        def put(self, key: str, payload: bytes | Iterable[memoryview], *, exclusive: bool = False) -> ObjectInfo:
            if key.endswith(OBJECT) and not isinstance(payload, bytes):
                payload = b"".join(payload)[:-1] + b"!"
            return super().put(key, payload, exclusive=exclusive)

    with pytest.raises(StoreError, match="changed in this host's memory"):
        save(Forgetful(store, "none"), 1)
    assert manage(store).newest() is None


def test_a_retention_that_fails_does_not_fail_the_save(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    class Undeletable(FailingStore):
        def delete(self, prefix: str) -> None:
            raise StoreError(f"cannot delete {prefix}")

    save(store, 1)
    with caplog.at_level(logging.WARNING):
        save(Undeletable(store, "none"), 2, keep_last=1)
    assert "could not remove" in caplog.text
    assert steps(store) == [1, 2]


def test_a_model_that_does_not_fit_is_told_by_name_and_nothing_is_touched(store: Store) -> None:
    record = save(store, 1)
    other = Trainer(0)
    other.module.head = nn.Linear(12, 4)
    other.module.tail = nn.Linear(2, 2)
    other.module.gain = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    del other.module.frozen
    other.optimizer = torch.optim.AdamW(other.module.parameters())
    before = whole(other.state())
    with pytest.raises(CheckpointError) as caught:
        manage(store).load(record, other.state())
    message = str(caught.value)
    assert "only in the checkpoint: model.frozen;" in message
    assert "only in this run: model.tail.bias, model.tail.weight, optim.tail.bias.exp_avg" in message
    assert "and 3 more" in message
    assert "model.head.weight (stored 3 x 12 float32, here 4 x 12 float32)" in message
    assert "model.gain (stored 1 float32, here 1 bfloat16)" in message
    assert unequal(whole(other.state()), before) == []


def test_damage_that_comes_after_the_choice_is_found_while_reading(store: Store) -> None:
    record = save(store, 1)
    flip(Path(store.uri, record.prefix, OBJECT), 1000)
    with pytest.raises(CheckpointError, match="is damaged"):
        manage(store).load(record, Trainer(0).state())
    Path(store.uri, record.prefix, OBJECT).unlink()
    with pytest.raises(StoreError, match="not there"):
        manage(store).load(record, Trainer(0).state())


@pytest.mark.parametrize("given", ["run", "checkpoint"])
def test_an_encoder_can_start_from_the_weights_of_another_run(store: Store, given: str) -> None:
    save(store, 1)
    trainer = Trainer(0)
    record = save(store, 2, trainer)
    torch.manual_seed(5)
    model = Toy()
    before = whole(model_state(model))
    origin = store if given == "run" else open_store(Path(store.uri, record.prefix))
    assert load_into_model(origin, model, parts="encoder").step == 2
    after, source = whole(model_state(model)), whole(model_state(trainer.module))
    assert all(torch.equal(after[name], source[name]) for name in after if "encoder" in name)
    assert all(torch.equal(after[name], before[name]) for name in after if "encoder" not in name)
    load_into_model(origin, model, parts="model")
    assert unequal(whole(model_state(model)), source) == []


def test_an_encoder_can_start_from_the_moving_average(store: Store) -> None:
    taught, average, model = Toy(), Toy(), Toy()
    state = model_state(taught)
    save_now(manage(store), 1, state)
    with pytest.raises(CheckpointError, match=r"weights ema were asked of .*, which holds model; ask for weights model"):
        load_into_model(store, model, parts="encoder", weights="ema")
    averages = {f"ema.encoder.{name}": boxes_of(weight) for name, weight in average.encoder.named_parameters()}
    save_now(manage(store), 2, state | averages)
    load_into_model(store, model, parts="encoder", weights="ema")
    assert all(torch.equal(weight, average.encoder.get_parameter(name)) for name, weight in model.encoder.named_parameters())
    load_into_model(store, model, parts="model", weights="ema")
    assert all(torch.equal(weight, average.encoder.get_parameter(name)) for name, weight in model.encoder.named_parameters())
    assert torch.equal(model.head.weight, taught.head.weight)
    load_into_model(store, model, parts="encoder")
    assert all(torch.equal(weight, taught.encoder.get_parameter(name)) for name, weight in model.encoder.named_parameters())


def test_the_decoder_of_croco_becomes_that_of_a_task_but_for_its_head(store: Store) -> None:
    encoder, grid = EncoderConfig(size="tiny", patch_px=4), Grid(1, 1, 2, 3)
    taught = build_model(encoder, [CrocoConfig(decoder="tiny")], grid)
    save_now(manage(store), 1, model_state(taught))
    model = build_model(encoder, [PoseConfig(decoder="tiny")], grid)
    fresh_head = model.objectives["pose"].decoder.head.weight.detach().clone()
    load_into_model(store, model, parts="encoder_and_decoder")
    source, found = taught.objectives["croco"].decoder.state_dict(), model.objectives["pose"].decoder.state_dict()
    assert found.keys() == source.keys()
    taken = {name for name in found if found[name].shape == source[name].shape and torch.equal(found[name], source[name])}
    assert found.keys() - taken == {"head.weight", "head.bias"}
    assert torch.equal(found["head.weight"], fresh_head)
    assert torch.equal(model.encoder.embed.weight, taught.encoder.embed.weight)
    larger = build_model(encoder, [PoseConfig(decoder="small")], grid)
    with pytest.raises(CheckpointError, match="different in shape"):
        load_into_model(store, larger, parts="encoder_and_decoder")
    without = build_model(encoder, [MaeConfig(decoder="tiny")], grid)
    save_now(manage(store), 2, model_state(without))
    with pytest.raises(CheckpointError, match=r"only in this run: model\.objectives\.pose\.decoder\."):
        load_into_model(store, model, parts="encoder_and_decoder")


def test_weights_to_start_from_must_fit_and_be_there(store: Store) -> None:
    with pytest.raises(CheckpointError, match="holds no whole one"):
        load_into_model(store, Toy(), parts="encoder")
    record = save(store, 1)
    smaller = Toy()
    del smaller.encoder.blocks[1]
    with pytest.raises(CheckpointError, match=r"only in the checkpoint: model\.encoder\.blocks\.1"):
        load_into_model(store, smaller, parts="encoder")
    Path(store.uri, record.prefix, OBJECT).unlink()
    for origin in (store, open_store(Path(store.uri, record.prefix))):
        with pytest.raises(CheckpointError, match=r"holds no whole one \(.*rank-00000\.bin is missing\)"):
            load_into_model(origin, Toy(), parts="encoder")


def test_training_goes_on_while_a_save_is_written_and_what_is_written_is_the_state_of_its_step(store: Store) -> None:
    gate = threading.Event()

    class SlowStore(FailingStore):
        def put(self, key: str, payload: bytes | Iterable[memoryview], *, exclusive: bool = False) -> ObjectInfo:
            assert gate.wait(30)
            return super().put(key, payload, exclusive=exclusive)

    trainer = Trainer(0)
    trainer.train(range(2))
    saved = whole(trainer.state())
    manager = manage(SlowStore(store, "none"))
    manager.save(2, trainer.state(), engine="single", progress={})
    trainer.train(range(2, 5))
    assert manager.poll() == []
    gate.set()
    manager.finish()
    (report,) = manager.poll()
    assert report.record is not None
    assert report.stall_seconds < report.seconds
    assert unequal(read_tensors(store, report.record), saved) == []


def test_a_store_that_fails_for_a_while_is_borne_and_then_told(store: Store) -> None:
    full = FailingStore(store, ".bin")
    manager = CheckpointManager(full, CheckpointConfig(max_failed_saves=2))
    trainer = Trainer(0)
    for step in (1, 2):
        manager.save(step, trainer.state(), engine="single", progress={})
    with pytest.raises(StoreError, match=r"2 saves in a row have failed, the last one so: .*No space left"):
        manager.finish()
    assert [report.step for report in manager.poll() if report.error] == [1, 2]


def test_a_failure_that_was_told_is_not_forgotten(store: Store) -> None:
    full = FailingStore(store, ".bin")
    manager = CheckpointManager(full, CheckpointConfig(max_failed_saves=1))
    manager.save(1, Trainer(0).state(), engine="single", progress={})
    while not manager.poll():
        pass
    assert isinstance(manager.last_error, StoreError)
    with pytest.raises(StoreError, match="1 saves in a row"):
        manager.save(2, Trainer(0).state(), engine="single", progress={})


def test_one_good_save_makes_up_for_failed_ones(store: Store) -> None:
    full = FailingStore(store, ".bin")
    manager = CheckpointManager(full, CheckpointConfig(max_failed_saves=2))
    for step, is_full in ((1, True), (2, False), (3, True), (4, False)):
        full.full = is_full
        manager.save(step, Trainer(0).state(), engine="single", progress={})
        manager.finish()
    assert [bool(report.error) for report in manager.poll()] == [True, False, True, False]
    assert manager.last_committed_step == 4


def test_a_save_that_would_outlast_the_grace_period_is_told_so(store: Store) -> None:
    manager = manage(store)
    assert manager.fits_into(0.0), "nothing is known of how long a save takes"
    save_now(manager, 1, Trainer(0).state())
    assert manager.fits_into(60.0)
    assert not manager.fits_into(1e-6)


def test_the_grace_period_that_is_left_is_judged_when_the_save_in_flight_has_ended(store: Store) -> None:
    class SlowStore(FailingStore):
        def put(self, key: str, payload: bytes | Iterable[memoryview], *, exclusive: bool = False) -> ObjectInfo:
            time.sleep(0.3 * key.endswith(MANIFEST))
            return super().put(key, payload, exclusive=exclusive)

    manager = manage(SlowStore(store, "none"))
    manager.save(1, Trainer(0).state(), engine="single", progress={})
    assert not manager.fits_into(0.4), "some of it went by while the first one ended, and a second one takes as long"
    assert manager.last_committed_step == 1
    manager.save(2, Trainer(0).state(), engine="single", progress={})
    assert manager.fits_into(60.0)
    assert [report.step for report in manager.poll()] == [1, 2]


def test_neighbouring_boxes_are_read_in_one_request_and_a_large_one_in_several(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    class Observed(FailingStore):
        def read_into(self, key: str, offset: int, places: Sequence[memoryview]) -> None:
            asked.append((offset, sum(place.nbytes for place in places)))
            super().read_into(key, offset, places)

    monkeypatch.setattr(storage, "_READ_BYTES", 100)
    saved = {"a": torch.randn(5, 2), "b": torch.randn(10), "c": torch.randn(3), "d": torch.randn(30, 3), "e": torch.tensor(2.0)}
    record = save_now(manage(store), 1, {name: boxes_of(tensor) for name, tensor in saved.items()})
    live = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    manage(Observed(store, "none")).load(record, {name: boxes_of(tensor) for name, tensor in live.items()})
    assert unequal(live, saved) == []
    place = {name: tensor.chunks[0].byte_offset for name, tensor in record.tensors.items()}
    of_large = [(offset, size) for offset, size in asked if place["d"] <= offset < place["d"] + 360]
    assert sorted(of_large) == [(place["d"] + 96 * part, min(96, 360 - 96 * part)) for part in range(4)]
    others = sorted(set(asked) - set(of_large))
    assert sum(size for _, size in others) == 40 + 40 + 12 + 4
    assert len(others) < 4
    assert all(size <= 100 for _, size in others)


@pytest.mark.parametrize("name", ["large", "small"])
def test_damage_is_found_in_whatever_pieces_a_box_is_read(store: Store, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(storage, "_READ_BYTES", 100)
    saved = {"large": torch.randn(30, 3), "small": torch.randn(4), "another": torch.randn(5)}
    state = {key: boxes_of(tensor) for key, tensor in saved.items()}
    record = save_now(manage(store), 1, state)
    flip(Path(store.uri, record.prefix, OBJECT), record.tensors[name].chunks[0].byte_offset + 9)
    with pytest.raises(CheckpointError, match=f"{name} in .* is damaged"):
        manage(store).load(record, state)
