"""Planning: which encoder, which run, and what is refused with which sentence."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml

from models.config import EncoderConfig, EncoderSize, FlowConfig
from odonata.encoders import evaluate
from tests.runs import SMALL_RUN
from tests.trainer.checkpoint.toy import save_now
from trainer.checkpoint.boxes import boxes_of
from trainer.checkpoint.manager import CheckpointManager
from trainer.config.data import NuscenesData
from trainer.config.load import dump_run_config
from trainer.config.run import RunConfig
from trainer.config.store import StoreConfig
from trainer.config.training import CheckpointConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.evaluation.planning import ChosenEncoder, choose_encoder, plan_evaluation, plan_run
from trainer.evaluation.protocol import PROTOCOLS
from trainer.store.open import open_store

STORE = StoreConfig()
VIDEO = ChosenEncoder(
    "video", EncoderConfig(size="tiny", patch_px=8, tubelet_frames=2), {"height_px": 32, "width_px": 48}, "runs/video"
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has begun and saved nothing yet."""
    folder = tmp_path / "base"
    folder.mkdir()
    config = yaml.safe_load(SMALL_RUN) | {"run": {"uri": str(folder)}}
    config["data"]["root"] = "city"
    config["encoder"]["drop_path"] = 0.2
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_a_fresh_encoder_is_like_that_of_a_run_and_knows_time_as_it_does(run: Path) -> None:
    chosen = choose_encoder("scratch", STORE, like=str(run))
    assert chosen.uri is None and chosen.name == "scratch-like-base"
    assert chosen.config == EncoderConfig(size="tiny", patch_px=8, tubelet_frames=2, has_time=True)
    assert chosen.clip == {"height_px": 32, "width_px": 32}


def test_the_command_offers_every_task_and_every_size_of_an_encoder() -> None:
    offered = get_type_hints(evaluate)
    size_or_none = get_args(offered["size"])
    assert set(get_args(offered["task"])) == set(PROTOCOLS)
    assert get_args(size_or_none[0]) == get_args(EncoderSize)


def test_a_fresh_encoder_is_of_a_size_by_name() -> None:
    chosen = choose_encoder("scratch", STORE, size="small", patch_px=8)
    assert (chosen.name, chosen.config.size, chosen.config.patch_px) == ("scratch-small-8", "small", 8)
    assert choose_encoder("scratch", STORE, size="small").config.patch_px == 16


@pytest.mark.parametrize(
    ("encoder", "options", "error", "sentence"),
    [
        ("scratch", {}, ConfigError, r"not which encoder; give --like RUN"),
        ("scratch", {"like": "runs/base", "size": "tiny"}, ConfigError, "give one of them"),
        ("runs/base", {"size": "tiny"}, ConfigError, "has a size of its own"),
        ("no/such/run", {}, CheckpointError, "there is no run"),
        ("scratch", {"like": "no/such/run"}, CheckpointError, "which says what encoder it is"),
    ],
)
def test_an_encoder_that_is_not_told_or_told_twice_is_refused(
    encoder: str, options: dict[str, str], error: type[Exception], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=sentence):
        choose_encoder(encoder, STORE, **options)


def test_a_run_without_a_checkpoint_is_refused(run: Path) -> None:
    with pytest.raises(CheckpointError, match="checkpoint"):
        choose_encoder(str(run), STORE)


@pytest.mark.parametrize("task", PROTOCOLS)
def test_a_task_becomes_an_ordinary_run_on_single_images(task: str, tmp_path: Path) -> None:
    config = plan_run(task, VIDEO, "frozen", seed=3, out=str(tmp_path), steps=40, data=["root=city"])
    assert [objective.kind for objective in config.objectives] == [task]
    assert config.data.clip.frames == 1 and config.data.clip.width_px == 48
    assert config.token_grid == (1, 1, 4, 6)
    assert not config.optim.train_encoder and config.optim.warmup_steps == 2
    assert config.warm_start is not None and config.warm_start.uri == "runs/video"
    assert config.run.uri == f"{tmp_path}/seed-3" and config.seed == 3


def test_where_two_images_meet_the_decoder_of_a_croco_run_comes_along(run: Path, tmp_path: Path) -> None:
    fresh = choose_encoder("scratch", STORE, like=str(run))
    assert fresh.decoder == "tiny"
    taught = replace(fresh, uri="runs/base", decoder="small")
    for task, parts in (("depth", "encoder"), ("pose", "encoder_and_decoder"), ("flow", "encoder_and_decoder")):
        config = plan_run(task, taught, "frozen", seed=0, out=str(tmp_path), data=["root=city"])
        assert config.warm_start is not None and config.warm_start.parts == parts
    assert isinstance(config.objectives[0], FlowConfig) and config.objectives[0].decoder == "small"
    alone = plan_run(
        "flow", taught, "frozen", seed=0, out=str(tmp_path), data=["root=city"], overrides=["warm_start.parts=encoder"]
    )
    assert alone.warm_start is not None and alone.warm_start.parts == "encoder"


def test_keys_of_data_and_of_the_whole_run_override_the_protocol(tmp_path: Path) -> None:
    config = plan_run(
        "pose",
        VIDEO,
        "finetuned",
        seed=0,
        out=str(tmp_path),
        data=["root=city", "kind=synthetic", "pairs.max_gap_s=0.5"],
        overrides=["optim.lr=0.5"],
    )
    assert isinstance(config.data, NuscenesData)
    assert config.data.kind == "synthetic" and config.data.pairs.max_gap_s == 0.5
    assert config.data.pairs.cross_camera_share == 0.0
    assert config.optim.train_encoder and config.optim.lr == 0.5 and config.optim.layer_decay == 0.75


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (["root=city", "clip.height_px=30"], r"data\.clip\.height_px is 30, which encoder\.patch_px 8 does not divide"),
        (["root=city", "clip.frames=2"], r"data\.clip\.frames is 2, and objectives\[0\], depth, is asked of single images"),
        (["root=city", "val_split=null"], r"data\.val_split is null; give --data val_split=NAME"),
        ([], r"data\.root: required"),
        (["data.root=city"], "--data data.root=city says data. twice; write root=city"),
        (["/data/nuscenes"], "--data '/data/nuscenes' is not key=value; write for example root=/data/nuscenes"),
    ],
)
def test_data_that_does_not_fit_is_refused(data: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        plan_run("depth", VIDEO, "frozen", seed=0, out=str(tmp_path), data=data)


def test_a_fresh_encoder_has_no_weights_to_choose_from() -> None:
    with pytest.raises(ConfigError, match="has weights of no checkpoint, and --weights ema was given; leave it out"):
        choose_encoder("scratch", STORE, size="nano", weights="ema")


def commit(run: Path, step: int, kinds: tuple[str, ...] = ("model",)) -> None:
    """A checkpoint, of next to nothing."""
    state = {f"{kind}.encoder.weight": boxes_of(torch.zeros(2)) for kind in kinds}
    save_now(CheckpointManager(open_store(str(run), STORE), CheckpointConfig()), step, state)


def test_of_a_run_that_goes_on_the_newest_checkpoint_is_judged_and_named(run: Path) -> None:
    commit(run, 4)
    first = choose_encoder(str(run), STORE)
    commit(run, 6)
    then = choose_encoder(f"{run}/", STORE)
    assert (first.name, then.name) == ("base-step-4", "base-step-6")
    assert first.uri is not None and then.uri is not None
    assert [Path(uri).parent for uri in (first.uri, then.uri)] == [run / "checkpoints"] * 2
    assert first.uri != then.uri and Path(then.uri).is_dir()
    assert choose_encoder(first.uri, STORE) == choose_encoder(f"{first.uri}/", STORE) == first


def test_the_moving_average_is_judged_where_there_is_one_as_it_is_exported(run: Path, tmp_path: Path) -> None:
    commit(run, 4, ("model", "ema"))
    average, last = choose_encoder(str(run), STORE), choose_encoder(str(run), STORE, weights="model")
    assert (average.name, last.name) == ("base-step-4-ema", "base-step-4")
    for chosen, weights in ((average, "ema"), (last, "model")):
        planned = plan_run("depth", chosen, "frozen", seed=0, out=str(tmp_path / "depth"), data=["root=city"])
        assert planned.warm_start and planned.warm_start.weights == weights
    commit(run, 6)
    with pytest.raises(CheckpointError, match=r"weights ema were asked of .*; ask for weights model"):
        choose_encoder(str(run), STORE, weights="ema")


def test_a_place_that_holds_another_training_is_refused_once_it_has_a_checkpoint(tmp_path: Path) -> None:
    def plan(chosen: ChosenEncoder, **changed: Any) -> RunConfig:
        return plan_run("depth", chosen, "frozen", seed=0, out=str(tmp_path), data=["root=city"], **changed)

    head, other = tmp_path / "seed-0", ChosenEncoder("other", VIDEO.config, VIDEO.clip, "runs/other")
    head.mkdir()
    (head / "config.yaml").write_text(dump_run_config(plan(VIDEO)))
    plan(other)
    commit(head, 4)
    plan(VIDEO)
    with pytest.raises(ConfigError, match=r"steps 1000 -> 7; .*give another --out"):
        plan(VIDEO, steps=7)
    with pytest.raises(
        ConfigError, match=r"warm_start\.uri runs/video -> runs/other; give another --out, or what it was begun with"
    ):
        plan(other)
    with pytest.raises(ConfigError, match=r"seed-0 was to be trained for pose and holds a run for depth; give another --out"):
        plan_run("pose", VIDEO, "frozen", seed=0, out=str(tmp_path), data=["root=city"])


@pytest.mark.parametrize("there", ["config.yaml", "checkpoints/step-1/manifest.json"])
def test_an_evaluation_does_not_go_into_the_folder_of_a_run(there: str, tmp_path: Path) -> None:
    open_store(tmp_path / "base").put(there, b"")
    with pytest.raises(ConfigError, match="base was to hold an evaluation and holds a run; give another --out"):
        plan_evaluation("depth", VIDEO, "frozen", seeds=[0], out=str(tmp_path / "base"), data=["root=city"])
    (planned,) = plan_evaluation("depth", VIDEO, "frozen", seeds=[0], out=str(tmp_path / "base" / "depth"), data=["root=city"])
    assert planned == plan_run("depth", VIDEO, "frozen", seed=0, out=str(tmp_path / "base" / "depth"), data=["root=city"])


def test_a_head_on_packed_data_is_the_same_when_its_version_was_written_down(tmp_path: Path) -> None:
    packed = ["kind=shards", "datasets=[{uri: packed}]"]

    def plan(*version: str) -> RunConfig:
        return plan_run("depth", VIDEO, "frozen", seed=0, out=str(tmp_path), data=[*packed, *version])

    (tmp_path / "seed-0").mkdir()
    (tmp_path / "seed-0" / "config.yaml").write_text(dump_run_config(plan("datasets=[{uri: packed, version: 3}]")))
    commit(tmp_path / "seed-0", 4)
    assert plan().data.kind == "shards"


def test_an_encoder_with_weights_keeps_its_shape_and_a_fresh_one_need_not(tmp_path: Path) -> None:
    def plan(chosen: ChosenEncoder, *overrides: str) -> EncoderConfig:
        out = str(tmp_path)
        return plan_run("depth", chosen, "frozen", seed=0, out=out, data=["root=city"], overrides=overrides).encoder

    with pytest.raises(ConfigError, match=r"encoder of video has its shape, .*: encoder\.size tiny -> small; leave that out"):
        plan(VIDEO, "encoder.size=small")
    assert plan(VIDEO, "encoder.attention=sdpa", "encoder.drop_path=0.1").drop_path == 0.1
    assert plan(replace(VIDEO, uri=None), "encoder.size=small").size == "small"
