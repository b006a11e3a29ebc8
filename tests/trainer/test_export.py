"""Exported encoders give the features of ours, in the layouts that others read; what fits no layout is refused."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jaxtyping
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import models.config
import trainer.export
from models.config import EncoderConfig, Grid
from models.encoder import ClipGroup, VideoEncoder, build_encoder
from models.official_croco import load_official
from models.pretraining import build_model
from tests.models.layouts.vits import SHAPE, timm_features
from tests.runs import SMALL_RUN
from tests.trainer.checkpoint.toy import save_now
from trainer.checkpoint.boxes import boxes_of
from trainer.checkpoint.logical import model_state
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.record import Record
from trainer.checkpoint.tools import Place, open_place, read_run_config
from trainer.config.load import dump_run_config, parse_run_config
from trainer.config.run import RunConfig
from trainer.config.training import CheckpointConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.export import Layout, export_encoder, plan_export
from trainer.store.base import Store
from trainer.store.open import open_store

ROOT = Path(__file__).parents[2]


class Run(NamedTuple):
    """A finished run: where it is, its encoder and the moving average of that."""

    folder: Path
    encoder: VideoEncoder
    average: VideoEncoder

    @property
    def place(self) -> Place:
        return open_place(str(self.folder))


@pytest.fixture(scope="module", autouse=True)
def tiny_is_tinier() -> Iterator[None]:
    """Three narrow blocks: graphs of published sizes take half a minute to trace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.config.ENCODER_SHAPES, "tiny", SHAPE)
        yield


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Sizes of a batch that is any are symbols while a graph is traced, which beartype does not take for numbers."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny video encoder with sin-cos positions on clips of 32 x 48 pixels, saved at step 7."""
    return make_run(tmp_path_factory.mktemp("runs") / "video", positions="sincos")


def make_run(folder: Path, *, frames: int = 4, **encoder_settings: Any) -> Run:
    """A run of clips of 32 x 48 pixels, and these settings of its encoder."""
    content = yaml.safe_load(SMALL_RUN)
    content["data"]["clip"] |= {"width_px": 48, "frames": frames}
    content["encoder"] |= encoder_settings
    config = parse_run_config(content, origin="the test")
    store = open_store(folder)
    store.put("config.yaml", dump_run_config(config).encode())
    encoder, average = (build_random_encoder(config, seed) for seed in (0, 1))
    save(store, 7, encoder, average)
    return Run(Path(store.uri), encoder, average)


@pytest.fixture
def store(run: Run, tmp_path: Path) -> Store:
    """A copy of the run, to spoil."""
    return open_store(shutil.copytree(run.folder, tmp_path / "run"))


def build_random_encoder(config: RunConfig, seed: int) -> VideoEncoder:
    """An encoder in which no bias is zero and no norm is plain."""
    torch.manual_seed(seed)
    encoder = build_encoder(config.encoder, config.token_grid)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return encoder.eval()


def save(store: Store, step: int, encoder: nn.Module, average: nn.Module | None = None) -> Record:
    state = model_state(nn.ModuleDict({"encoder": encoder, "head": nn.Linear(2, 2)}))
    if average:
        state |= {f"ema.encoder.{name}": boxes_of(tensor) for name, tensor in average.state_dict().items()}
    return save_now(CheckpointManager(store, CheckpointConfig()), step, state)


def ignore(count: int) -> None:
    """No progress bar."""


def export(place: Place, out: Path, layout: Layout = "safetensors", **options: Any) -> str:
    return export_encoder(plan_export(place, layout=layout, **options), out, ignore)


def features_of(encoder: VideoEncoder, images: Tensor) -> Tensor:
    """Our tokens of still images: one frame of one camera."""
    with torch.no_grad():
        (tokens,) = encoder([ClipGroup(images[:, None, None])])
    return tokens


def test_the_bare_encoder_can_be_built_again_from_what_its_file_says(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "encoder.safetensors"
    assert export(run.place, out) == f"safetensors.torch.load_file({str(out)!r})"
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["layout"], metadata["step"], metadata["weights"]) == ("pt", "safetensors", "7", "ema")
    assert metadata["odonata_version"]
    built = build_encoder(EncoderConfig(**json.loads(metadata["encoder"])), Grid(**json.loads(metadata["grid"])))
    built.load_state_dict(load_file(out))
    clips = torch.randn(2, 4, 1, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(built([ClipGroup(clips)])[0], run.average([ClipGroup(clips)])[0])


def run_alone(code: str, folder: Path) -> None:
    """Run `code` in `folder`, in a process that cannot import this package."""
    alone = (
        "import importlib.util, sys\n"
        'sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]\n'
        f"sys.path[:] = [path for path in sys.path if path != {str(ROOT)!r}]\n"
        'assert not any(importlib.util.find_spec(name) for name in ("models", "trainer", "odonata"))\n'
    )
    done = subprocess.run([sys.executable, "-I", "-c", alone + code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


READ_ALONE = """
from pathlib import Path

from safetensors.torch import save_file

clips, weights = load_file("clips.safetensors")["clips"], read("encoder.safetensors")
found = {"safetensors": encode(*weights, clips), "of another size": encode(*weights, clips[..., :16, :40])}
found["torch-export"] = torch.export.load("encoder.pt2").module()(clips)
if Path("encoder.onnx").exists():
    import onnxruntime

    (tokens,) = onnxruntime.InferenceSession("encoder.onnx").run(None, {"images": clips.numpy()})
    found["onnx"] = torch.from_numpy(tokens)
save_file({name: tokens.detach().contiguous() for name, tokens in found.items()}, "found.safetensors")
"""


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("settings", "frames", "cameras", "programs"),
    [
        ({"positions": "rope", "registers": 2}, None, 1, {"torch-export": "encoder.pt2", "onnx": "encoder.onnx"}),
        ({"positions": "learned"}, None, 2, {"torch-export": "encoder.pt2"}),
        ({"positions": "learned"}, 1, 1, {"torch-export": "encoder.pt2"}),
        ({"positions": "sincos"}, 1, 2, {"torch-export": "encoder.pt2"}),
    ],
    ids=["rotary with registers", "learned, two cameras", "learned, an image", "sin-cos, an image"],
)
def test_weights_and_programs_give_our_features_in_a_process_without_this_package(
    settings: dict[str, Any], frames: int | None, cameras: int, programs: dict[Layout, str], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "video", **settings)
    export(run.place, tmp_path / "encoder.safetensors")
    for layout, name in programs.items():
        export_encoder(
            plan_export(run.place, layout=layout), tmp_path / name, ignore, overwrite=True, frames=frames, cameras=cameras
        )
    clips = torch.randn(3, frames or 4, cameras, 3, 32, 48)  # the batch is not the one that was traced
    save_file({"clips": clips}, tmp_path / "clips.safetensors")
    (forward,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    run_alone(forward + READ_ALONE, tmp_path)
    with torch.no_grad():
        expected, of_another_size = (run.average([ClipGroup(images)])[0] for images in (clips, clips[..., :16, :40]))
    found = load_file(tmp_path / "found.safetensors")
    torch.testing.assert_close(found.pop("of another size"), of_another_size, atol=1e-5, rtol=1e-5)
    assert found.keys() == {"safetensors", *programs}
    for tokens in found.values():
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_program_says_what_clips_it_takes(run: Run, tmp_path: Path) -> None:
    planned = plan_export(run.place, layout="torch-export")
    export_encoder(planned, tmp_path / "clips.pt2", ignore, cameras=3)
    about = json.loads((tmp_path / "clips.json").read_text())
    assert (about["clip"], about["depth"], about["step"]) == ([4, 3, 3, 32, 48], SHAPE.depth, 7)
    with pytest.raises(ConfigError, match=r"of 3 frames was asked for and a token spans 2; give --frames a multiple"):
        export_encoder(planned, tmp_path / "odd.pt2", ignore, frames=3)
    assert not (tmp_path / "odd.pt2").exists()


@pytest.mark.parametrize(("layout", "ending"), [("safetensors", ".safetensors"), ("torch-export", ".pt2"), ("onnx", ".onnx")])
def test_a_file_that_a_json_goes_with_has_the_ending_of_its_format(layout: Layout, ending: str, run: Run, tmp_path: Path) -> None:
    for name in ("encoder", "encoder.json"):
        with pytest.raises(ConfigError, match=rf"a file of {layout} ends in \{ending}; give .*encoder\{ending}"):
            export(run.place, tmp_path / name, layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("clip", [{"frames": 1}, {"cameras": 2}])
@pytest.mark.parametrize("layout", ["safetensors", "timm"])
def test_what_clips_a_program_is_for_is_not_asked_of_weights(
    layout: Layout, clip: dict[str, int], run: Run, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"and {layout} is none; leave them out, or use --format torch-export or onnx"):
        export_encoder(plan_export(run.place, layout=layout), tmp_path / "vit.safetensors", ignore, **clip)
    assert not (tmp_path / "vit.safetensors").exists()


def test_without_onnxs_packages_an_onnx_file_is_refused_with_the_extra_that_brings_them(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match="install this package with its extra onnx"):
        export(run.place, tmp_path / "encoder.onnx", "onnx")
    assert not (tmp_path / "encoder.onnx").exists()


@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_an_export_to_croco_is_the_whole_model_under_official_names(positions: str, tmp_path: Path) -> None:
    settings = {"positions": positions, "tubelet_frames": 1}
    run = make_run(tmp_path / "images", frames=1, **settings)
    config = read_run_config(run.place.store)
    assert config is not None
    torch.manual_seed(2)
    model = build_model(config.encoder, config.objectives, config.token_grid)
    save_now(CheckpointManager(run.place.store, CheckpointConfig()), 9, model_state(model))
    out = tmp_path / "croco.pth"
    load = export(run.place, out, "croco")
    assert load == f"croco.CroCoNet(**torch.load({str(out)!r})['croco_kwargs']) and its ['model']"
    again = load_official(out).state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    averages = {f"ema.{name}": boxes_of(weight + 1) for name, weight in model.named_parameters() if name.startswith("encoder.")}
    save_now(CheckpointManager(run.place.store, CheckpointConfig()), 10, model_state(model) | averages)
    export(run.place, tmp_path / "average.pth", "croco")
    average = load_official(tmp_path / "average.pth")
    moved = {name: weight + 1 if name.startswith("encoder.") else weight for name, weight in model.named_parameters()}
    assert all(torch.equal(average.get_parameter(name), weight) for name, weight in moved.items())
    kwargs = torch.load(out, weights_only=True)["croco_kwargs"]
    assert kwargs["img_size"] == (32, 48) and kwargs["enc_num_heads"] == SHAPE.heads
    assert kwargs["pos_embed"] == {"sincos": "cosine", "rope": "RoPE100"}[positions]


@pytest.mark.parametrize(
    ("layout", "settings", "sentence"),
    [
        ("croco", {"tubelet_frames": 2}, "is one of video, CroCo's is of images"),
        (
            "croco",
            {"tubelet_frames": 1, "has_time": False, "registers": 1},
            "registers or learned positions, CroCo's has neither",
        ),
        ("croco", {"tubelet_frames": 1, "has_time": False, "size": "giant"}, "not four times as wide"),
        ("hf", {"positions": "learned", "registers": 2}, "has 2 registers, of which the ViT of transformers knows one"),
        ("timm", {"positions": "rope"}, "cannot turn queries and keys"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(
    layout: Layout, settings: dict[str, Any], sentence: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_run_config(run.place.store)
    assert config is not None
    encoder = EncoderConfig.model_validate({"size": "tiny", "patch_px": 8} | settings)
    monkeypatch.setattr(trainer.export, "read_run_config", lambda store: config.model_copy(update={"encoder": encoder}))
    monkeypatch.setattr(trainer.export, "_check_fits", lambda planned: None)
    with pytest.raises(ConfigError, match=f"as {layout} and .*{sentence}.*: use --format safetensors"):
        plan_export(run.place, layout=layout)


def test_registers_and_learned_positions_go_out_to_timm(tmp_path: Path) -> None:
    run, images = make_run(tmp_path / "learned", positions="learned", registers=1), torch.randn(2, 3, 32, 48)
    assert "class_token=True, no_embed_class=True" in export(run.place, tmp_path / "vit.safetensors", "timm")
    expected = features_of(run.average, images)
    torch.testing.assert_close(timm_features(load_file(tmp_path / "vit.safetensors"), images), expected, atol=1e-5, rtol=1e-5)


def test_an_export_to_timm_gives_our_features_of_still_images(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "vit.safetensors"
    load = export(run.place, out, "timm")
    assert load.startswith(
        "model = timm.create_model('vit_tiny_patch16_224', pretrained=False, num_classes=0, class_token=False,"
    )
    assert "img_size=(32, 48), patch_size=8); model.load_state_dict(" in load
    images = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(timm_features(load_file(out), images), features_of(run.average, images), atol=1e-5, rtol=1e-5)


def test_a_size_that_timm_does_not_know_is_given_by_its_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "nano", positions="sincos", size="nano")
    load = export(run.place, tmp_path / "vit.safetensors", "timm")
    assert "'vit_tiny_patch16_224', pretrained=False, num_classes=0, embed_dim=128, depth=6, num_heads=4, class_token" in load


OPEN_ALONE = """
import torch
import transformers
from safetensors.torch import load_file, save_file

images = load_file("images.safetensors")["images"]
models = {name: eval(load) for name, load in LOADS.items()}
with torch.no_grad():
    tokens = {f"{name} {type(model).__name__}": model.eval()(images).last_hidden_state for name, model in models.items()}
save_file({name: of_one.contiguous() for name, of_one in tokens.items()}, "found.safetensors")
"""


def test_transformers_opens_an_export_as_its_own_model_that_gives_our_features_of_still_images(run: Run, tmp_path: Path) -> None:
    runs = {"patches": run, "class": make_run(tmp_path / "learned", positions="learned", registers=1)}
    images = torch.randn(2, 3, 32, 48)
    save_file({"images": images}, tmp_path / "images.safetensors")
    loads = {name: export(each.place, tmp_path / name, "hf") for name, each in runs.items()}
    assert sorted(path.name for path in (tmp_path / "class").iterdir()) == ["config.json", "model.safetensors"]
    run_alone(f"LOADS = {loads!r}\n{OPEN_ALONE}", tmp_path)
    found = load_file(tmp_path / "found.safetensors")
    assert found.keys() == {"patches IJepaModel", "class ViTModel"}
    for name, tokens in found.items():
        expected = features_of(runs[name.split()[0]].average, images)
        torch.testing.assert_close(tokens[:, -expected.shape[1] :], expected, atol=1e-5, rtol=1e-5)


def test_the_weights_are_those_that_were_asked_for(run: Run, tmp_path: Path) -> None:
    sides: tuple[tuple[Any, VideoEncoder], ...] = (("model", run.encoder), ("ema", run.average), (None, run.average))
    for asked, encoder in sides:
        out = tmp_path / f"{asked}.safetensors"
        export(run.place, out, weights=asked)
        found = load_file(out)
        assert found.keys() == encoder.state_dict().keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in encoder.state_dict().items())


def test_without_a_moving_average_the_weights_are_taken_and_asking_for_one_is_told(run: Run, tmp_path: Path) -> None:
    store = open_store(tmp_path / "plain")
    store.put("config.yaml", (run.folder / "config.yaml").read_bytes())
    save(store, 3, run.encoder)
    planned = plan_export(Place(store), layout="timm")
    assert (planned.weights, planned.default_name) == ("model", "plain-step-00000003-model-timm.safetensors")
    with pytest.raises(CheckpointError, match=r"weights ema were asked of .* holds model; ask for weights model"):
        plan_export(Place(store), layout="timm", weights="ema")


def test_progress_is_told_of_every_byte_that_is_read(run: Run, tmp_path: Path) -> None:
    read: list[int] = []
    planned = plan_export(run.place, layout="timm")
    export_encoder(planned, tmp_path / "vit.safetensors", read.append)
    assert sum(read) == planned.bytes == sum(tensor.nbytes for tensor in run.average.state_dict().values())


def test_rotary_positions_are_refused_but_for_our_own_layout(store: Store, tmp_path: Path) -> None:
    replace_in_config(store, b"positions: sincos", b"positions: rope")
    place = Place(store)
    layouts: tuple[Layout, ...] = ("timm", "hf")
    for layout in layouts:
        with pytest.raises(ConfigError, match=f"as {layout} and its encoder has rope positions; .* use --format safetensors"):
            plan_export(place, layout=layout)
    export(place, tmp_path / "encoder.safetensors")


@pytest.mark.parametrize("layout", ["timm", "hf"])
def test_what_is_there_is_not_written_over_unless_asked(run: Run, tmp_path: Path, layout: Layout) -> None:
    out = tmp_path / "out"
    out.mkdir() if layout == "hf" else out.write_bytes(b"mine")
    (tmp_path / "out" / "notes" if layout == "hf" else tmp_path / "notes").write_bytes(b"mine")
    planned = plan_export(run.place, layout=layout)
    with pytest.raises(ConfigError, match="is there already; give another --out, or --overwrite"):
        export_encoder(planned, out, ignore)
    export_encoder(planned, out, ignore, overwrite=True)
    assert load_file(out / "model.safetensors" if layout == "hf" else out)
    assert [path.read_bytes() for path in tmp_path.rglob("notes")] == [b"mine"]


def drop_config(store: Store) -> None:
    store.delete("config.yaml")


def garble_config(store: Store) -> None:
    store.put("config.yaml", b"{")


def empty_config(store: Store) -> None:
    store.put("config.yaml", b"")


def change_config(store: Store) -> None:
    replace_in_config(store, b"size: tiny", b"size: small")


def replace_in_config(store: Store, old: bytes, new: bytes) -> None:
    config = store.get("config.yaml")
    assert old in config
    store.put("config.yaml", config.replace(old, new))


def save_without_encoder(store: Store) -> None:
    save_now(CheckpointManager(store, CheckpointConfig()), 9, {"model.head.weight": boxes_of(torch.ones(2))})


@pytest.mark.parametrize(
    ("spoil", "error", "sentence"),
    [
        (drop_config, CheckpointError, r"there is no config\.yaml in .* put the config\.yaml of its run there"),
        (garble_config, ConfigError, "is not YAML"),
        (empty_config, ConfigError, "is not a run that can start"),
        (change_config, CheckpointError, r"is not the one in config\.yaml .* by the config \(384"),
        (save_without_encoder, CheckpointError, "holds no encoder at all; give the checkpoint of a pre-training run"),
    ],
)
def test_a_run_that_does_not_say_what_its_encoder_is_cannot_be_exported(
    store: Store, spoil: Callable[[Store], None], error: type[Exception], sentence: str
) -> None:
    spoil(store)
    with pytest.raises(error, match=sentence):
        plan_export(Place(store), layout="safetensors")


def test_damage_is_found_while_the_encoder_is_read_and_no_file_is_left(store: Store, tmp_path: Path) -> None:
    (path,) = (tmp_path / "run").rglob("*.bin")
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()[:64]) + path.read_bytes()[64:])
    planned = plan_export(Place(store), layout="safetensors")
    (first,) = (name for name, tensor in planned.record.tensors.items() if tensor.chunks[0].byte_offset == 0)
    with pytest.raises(CheckpointError, match="is damaged: its checksum differs"):
        export(Place(store), tmp_path / "out.safetensors", weights="ema" if first.startswith("ema.") else "model")
    assert not list(tmp_path.glob("out.*"))
