"""Published weights become a run that others start from; what cannot is refused, and nothing is left."""

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import models.config
from models.config import TransformerShape
from models.encoder import ClipGroup, VideoEncoder, build_encoder
from models.official_croco import export_official
from models.pretraining import build_model
from tests.models.layouts.vits import SHAPE, random_timm, timm_features
from tests.runs import SMALL_RUN
from trainer.checkpoint.manager import load_into_model, read_tensors, save_weights
from trainer.checkpoint.tools import choose_checkpoint, open_place, read_run_config
from trainer.config.load import dump_run_config, parse_run_config
from trainer.config.run import RunConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.export import export_encoder, plan_export
from trainer.importing import import_weights, read_weights
from trainer.store.open import open_store


@pytest.fixture(autouse=True)
def tiny_is_tinier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.config.ENCODER_SHAPES, "tiny", SHAPE)


def config_of(folder: Path, *, frames: int = 4, size_px: int = 24, **encoder: Any) -> RunConfig:
    """A run of square clips with this encoder, at `folder`."""
    content = yaml.safe_load(SMALL_RUN)
    content["run"]["uri"] = str(folder)
    content["data"]["clip"] |= {"width_px": size_px, "height_px": size_px, "frames": frames}
    content["encoder"] |= encoder
    return parse_run_config(content, origin="the test")


def load_encoder(config: RunConfig) -> VideoEncoder:
    """The encoder of the imported run at `config`'s place, as a run that is warm-started has it."""
    model = build_model(config.encoder, config.objectives, config.token_grid)
    load_into_model(open_store(config.run.uri), model, parts="encoder")
    return model.encoder.eval()


def features_of(encoder: VideoEncoder, clips: Tensor) -> Tensor:
    with torch.no_grad():
        (tokens,) = encoder([ClipGroup(clips)])
    return tokens


@pytest.fixture
def dinov2() -> dict[str, Tensor]:
    """A ViT with DINOv2's names, for images of 3 x 3 patches."""
    return random_timm(table=10, registers="cls_token register_tokens", scale=True)


LEARNED = {"positions": "learned", "registers": 5}


@pytest.mark.parametrize("form", ["safetensors", "bare", "model", "state_dict"])
def test_a_run_starts_from_published_weights_with_their_features(form: str, dinov2: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / ("vit.safetensors" if form == "safetensors" else "vit.pth")
    if form == "safetensors":
        save_file(dinov2, path)
    else:
        torch.save(dinov2 if form == "bare" else {form: dinov2, "epoch": 3}, path)
    config = config_of(tmp_path / "run", **LEARNED)
    changes = import_weights(path, config)
    images = torch.randn(2, 3, 24, 24)
    found = features_of(load_encoder(config), images[:, None, None])
    torch.testing.assert_close(found, timm_features(dinov2, images), atol=1e-5, rtol=1e-5)
    origin = json.loads((tmp_path / "run" / "import.json").read_text())
    assert origin["changes"] == changes
    assert changes == [
        "LayerScale folded into the layers before it",
        "kernel of 1 frame made one of 2",
        "5 tokens without a place (class token, registers) kept as registers",
        "positions of 1 x 3 x 3 resampled to 2 x 3 x 3",
    ]
    assert (origin["layout"], origin["file"]) == ("timm", path.name)
    assert origin["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_is_imported_is_a_run_without_steps_that_can_be_exported(dinov2: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(dinov2, tmp_path / "vit.safetensors")
    config = config_of(tmp_path / "run", **LEARNED)
    import_weights(tmp_path / "vit.safetensors", config)
    place = open_place(str(tmp_path / "run"))
    record = choose_checkpoint(place)
    assert (record.step, record.engine, record.progress) == (0, "import", {"step": 0})
    assert read_run_config(place.store) == config
    out = tmp_path / "timm.safetensors"
    export_encoder(plan_export(place, layout="timm"), out, lambda count: None)
    images = torch.randn(2, 3, 24, 24)
    assert read_weights(out).exported == (config.encoder, config.token_grid)
    torch.testing.assert_close(
        timm_features(read_weights(out).tensors, images), timm_features(dinov2, images), atol=1e-5, rtol=1e-5
    )
    import_weights(out, config_of(tmp_path / "again", **LEARNED))


def exported_encoder(folder: Path, *, frames: int = 4, **encoder: Any) -> tuple[VideoEncoder, Path]:
    """A random encoder, and the file that `odonata export` makes of it."""
    config = config_of(folder / "before", frames=frames, **encoder)
    built = build_encoder(config.encoder, config.token_grid)
    store = open_store(config.run.uri)
    save_weights(
        store,
        {f"encoder.{name}": tensor for name, tensor in built.state_dict().items()},
        config.checkpoint,
        step=3,
        engine="test",
    )
    store.put("config.yaml", dump_run_config(config).encode())
    export_encoder(
        plan_export(open_place(config.run.uri), layout="safetensors"), folder / "encoder.safetensors", lambda count: None
    )
    return built.eval(), folder / "encoder.safetensors"


@pytest.mark.parametrize("positions", ["sincos", "learned", "rope"])
def test_what_export_wrote_comes_in_again_as_it_was(positions: str, tmp_path: Path) -> None:
    encoder, file = exported_encoder(tmp_path, positions=positions, registers=2)
    config = config_of(tmp_path / "again", positions=positions, registers=2)
    assert import_weights(file, config) == ["2 tokens without a place (class token, registers) kept as registers"]
    clips = torch.randn(2, 4, 1, 3, 24, 24)
    torch.testing.assert_close(features_of(load_encoder(config), clips), features_of(encoder, clips))


@pytest.mark.parametrize(("positions", "moves"), [("sincos", False), ("rope", True)])
def test_an_exported_encoder_of_video_becomes_one_of_images(positions: str, moves: bool, tmp_path: Path) -> None:
    encoder, file = exported_encoder(tmp_path, positions=positions)
    config = config_of(tmp_path / "images", frames=1, positions=positions, tubelet_frames=1)
    changes = import_weights(file, config)
    assert changes[0] == "kernel of 2 frames made one of 1"
    images = torch.randn(2, 1, 1, 3, 24, 24)
    before, after = features_of(encoder, images), features_of(load_encoder(config), images)
    assert torch.allclose(after, before, atol=1e-5) != moves
    if moves:
        said = re.fullmatch(
            r"no part of a head turns by time: features of a still image move by (\d+)% of their deviation", changes[1]
        )
        assert said and int(said[1]) > 0


@pytest.mark.parametrize(
    ("settings", "options", "sentence"),
    [
        ({"positions": "rope"}, {}, "its encoder is not that of the run, .*set encoder.positions=sincos"),
        ({"positions": "sincos"}, {"pixels": "half"}, "written by `odonata export`, whose images are normalised as ImageNet's"),
        ({"positions": "sincos"}, {"parts": "model"}, "it holds no decoder of CroCo; take --parts encoder"),
    ],
)
def test_an_exported_encoder_is_not_taken_for_another(
    settings: dict[str, Any], options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    _, file = exported_encoder(tmp_path, positions="sincos", frames=1, tubelet_frames=1)
    with pytest.raises(CheckpointError, match=sentence):
        import_weights(file, config_of(tmp_path / "run", frames=1, tubelet_frames=1, **settings), **options)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({}, "has our names and does not say which encoder it is"),
        ({"encoder": '{"size": "enormous"}'}, "odonata [0-9.]+ wrote it, and of its encoder what is not known here"),
        ({"grid": "{}"}, "odonata [0-9.]+ wrote it, and of its encoder what is not known here"),
        ({"encoder": '{"size": "tiny", "patch_px": 8, "registers": 1}'}, "registers is missing, or too much"),
    ],
    ids=["no metadata", "a size of another version", "no grid", "another encoder"],
)
def test_an_exported_encoder_that_does_not_say_what_it_is_is_refused(
    metadata: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    _, file = exported_encoder(tmp_path, positions="sincos")
    with safe_open(file, "pt") as opened:
        said = opened.metadata() | metadata if metadata else None
    save_file(load_file(file), file, said)
    with pytest.raises(CheckpointError, match=sentence):
        import_weights(file, config_of(tmp_path / "run", positions="sincos"))
    assert not (tmp_path / "run").exists()


@pytest.fixture(params=["cosine", "rope"])
def official(request: pytest.FixtureRequest, oracle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An official CroCo checkpoint, and what the official model makes of an image."""
    with safe_open(oracle_dir / f"croco-tiny-rect-{request.param}.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        settings = json.loads(file.metadata()["config"])
    for shapes, part in ((models.config.ENCODER_SHAPES, "enc"), (models.config.DECODER_SHAPES, "dec")):
        width = settings[f"{part}_embed_dim"]
        shape = TransformerShape(width, settings[f"{part}_depth"], settings[f"{part}_num_heads"], 4 * width)
        monkeypatch.setitem(shapes, "tiny", shape)
    weights = {name.removeprefix("state_dict."): tensor for name, tensor in tensors.items() if name.startswith("state_dict.")}
    torch.save({"model": weights, "croco_kwargs": settings}, tmp_path / "croco.pth")
    return request.param, settings["img_size"], weights, tensors["img2"], tensors["feat2"]


def official_config(folder: Path, kind: str, size_px: list[int], *, frames: int = 1, tubelet_frames: int = 1) -> RunConfig:
    content = config_of(folder).model_dump(mode="json")
    content["data"]["clip"] |= {"height_px": size_px[0], "width_px": size_px[1], "frames": frames}
    positions = "sincos" if kind == "cosine" else "rope"
    content["encoder"] |= {"patch_px": 16, "tubelet_frames": tubelet_frames, "positions": positions}
    return parse_run_config(content, origin="the test")


def test_an_official_croco_comes_in_whole(official: Any, tmp_path: Path) -> None:
    kind, size_px, weights, image, features = official
    config = official_config(tmp_path / "run", kind, size_px)
    assert import_weights(tmp_path / "croco.pth", config, parts="model") == []
    model = build_model(config.encoder, config.objectives, config.token_grid)
    load_into_model(open_store(config.run.uri), model, parts="model")
    again = export_official(model, config.token_grid)
    assert again.keys() == weights.keys()
    assert all(torch.allclose(again[name], tensor, atol=1e-6) for name, tensor in weights.items())
    with torch.no_grad():
        torch.testing.assert_close(model.encoder([ClipGroup(image[:, None, None])])[0], features, atol=1e-5, rtol=0)


def test_the_encoder_of_an_official_croco_becomes_one_of_video(official: Any, tmp_path: Path) -> None:
    kind, size_px, _, image, features = official
    config = official_config(tmp_path / "run", kind, size_px, frames=4, tubelet_frames=2)
    changes = import_weights(tmp_path / "croco.pth", config)
    found = features_of(load_encoder(config), image[:, None, None])
    if kind == "cosine":
        assert changes == ["kernel of 1 frame made one of 2"]
        torch.testing.assert_close(found, features, atol=1e-5, rtol=0)
        return
    # By how much is measured on noise, so here it is nearly that.
    said = float(changes[-1].removeprefix("a part of every head turns by time: features of a still image move by ").split("%")[0])
    moved = float(100 * (found - features).square().mean().sqrt() / features.std())
    assert said > 0 and moved == pytest.approx(said, rel=0.5)


def test_pixels_of_another_kind_are_taken_in(tmp_path: Path) -> None:
    weights, config = random_timm(table=9), config_of(tmp_path / "run", positions="learned")
    save_file(weights, tmp_path / "vit.safetensors")
    changes = import_weights(tmp_path / "vit.safetensors", config, pixels="half")
    assert "kernel and bias take images as ImageNet normalises them, where they took (x - 0.5) / 0.5" in changes
    rgb = torch.rand(2, 3, 24, 24)
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    found = features_of(load_encoder(config), ((rgb - mean) / std)[:, None, None])
    torch.testing.assert_close(found, timm_features(weights, (rgb - 0.5) / 0.5), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"model": {"conv1.weight": torch.zeros(2)}}, "none of its 1 names .conv1.weight, .*says that it is a ViT"),
        ({"epoch": 3, "model": [1]}, "holds the keys epoch, model, not weights by name"),
        ([torch.zeros(1)], "holds a list, not weights by name"),
        ({}, "not weights by name"),
        (
            {"model": torch.nn.Linear(1, 1)},
            "cannot be read as tensors and plain values alone .it needs torch.nn.modules.linear.Linear.; give weights as safetensors",
        ),
    ],
    ids=["ResNet", "no weights", "a list", "empty", "a module"],
)
def test_a_file_of_something_else_is_refused(content: Any, sentence: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=sentence):
        import_weights(tmp_path / "other.pth", config_of(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pth", "cut-old.pth", "empty.pth", "text.pth", "folder"])
def test_what_is_no_whole_file_is_refused(name: str, dinov2: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif name in ("empty.pth", "text.pth"):
        path.write_text("weights" if name == "text.pth" else "")
    elif name == "cut-old.pth":
        torch.save(dinov2, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:111])  # in the middle of a number of its head
    else:
        save_file(dinov2, path) if path.suffix == ".safetensors" else torch.save(dinov2, path)
        path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(
        CheckpointError, match=f"{name} was to be imported and (is not a file|is no whole|cannot be read)"
    ) as refused:
        read_weights(path)
    assert "weights_only" not in str(refused.value)  # torch's advice to trust the file


def test_what_is_near_weights_is_told_apart(dinov2: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "vit").mkdir()
    save_file(dinov2, tmp_path / "vit" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"vit was to be imported and is not a file; give .*vit/model\.safetensors"):
        read_weights(tmp_path / "vit")
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "encoder.pt2")
    with pytest.raises(CheckpointError, match="it is cut short, or a program and no weights"):
        read_weights(tmp_path / "encoder.pt2")


def test_safetensors_are_known_without_their_ending(dinov2: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(dinov2, tmp_path / "vit")
    assert read_weights(tmp_path / "vit").tensors.keys() == dinov2.keys()


def test_a_pickle_that_calls_something_is_not_obeyed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"model": Trap(), "args": argparse.Namespace(model="CroCoNet()")}, tmp_path / "trap.pth")
    with pytest.raises(CheckpointError, match="cannot be read as tensors and plain values alone"):
        read_weights(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("encoder", "options", "sentence"),
    [
        ({}, {}, "by its names timm, .* set encoder.registers=5 encoder.positions=learned$"),
        ({**LEARNED, "tubelet_frames": 1}, {"parts": "model"}, "without registers and learned positions, the run's is not"),
        ({"tubelet_frames": 1, "has_time": False}, {"parts": "model"}, "it holds no decoder of CroCo; take --parts encoder"),
    ],
)
def test_weights_of_another_encoder_than_the_runs_are_refused(
    encoder: dict[str, Any], options: dict[str, Any], sentence: str, dinov2: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(dinov2, tmp_path / "vit.safetensors")
    with pytest.raises(CheckpointError, match=sentence):
        import_weights(tmp_path / "vit.safetensors", config_of(tmp_path / "run", **encoder), **options)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_there_is_not_written_over(dinov2: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(dinov2, tmp_path / "vit.safetensors")
    config = config_of(tmp_path / "run", **LEARNED)
    import_weights(tmp_path / "vit.safetensors", config)
    before = read_tensors(open_store(config.run.uri), choose_checkpoint(open_place(config.run.uri)))
    with pytest.raises(ConfigError, match="and a run lies there; give another --out"):
        import_weights(tmp_path / "vit.safetensors", config)
    assert before.keys() == {f"model.encoder.{name}" for name in build_encoder(config.encoder, config.token_grid).state_dict()}
