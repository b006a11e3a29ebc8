"""Exported encoders give the features of ours, in the layouts that others read; what fits no layout is refused."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from models.config import EncoderConfig, Grid
from models.encoder import ClipGroup, VideoEncoder, build_encoder
from tests.runs import SMALL_RUN
from tests.trainer.checkpoint.toy import save_now
from trainer.checkpoint.boxes import boxes_of
from trainer.checkpoint.logical import model_state
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.record import Record
from trainer.checkpoint.tools import Place, open_place
from trainer.config.load import dump_run_config, parse_run_config
from trainer.config.run import RunConfig
from trainer.config.training import CheckpointConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.export import Layout, export_encoder, plan_export
from trainer.store.base import Store
from trainer.store.open import open_store

HEADS = 3
PATCH_PX = 8


class Run(NamedTuple):
    """A finished run: where it is, its encoder and the moving average of that."""

    folder: Path
    encoder: VideoEncoder
    average: VideoEncoder

    @property
    def place(self) -> Place:
        return open_place(str(self.folder))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny video encoder with sin-cos positions on clips of 32 x 48 pixels, saved at step 7."""
    store = open_store(tmp_path_factory.mktemp("runs") / "video")
    content = yaml.safe_load(SMALL_RUN)
    content["data"]["clip"]["width_px"] = 48
    content["encoder"]["positions"] = "sincos"
    config = parse_run_config(content, origin="the test")
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


def timm_features(weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """timm's VisionTransformer without class token and pooling, written down from Dosovitskiy et al. 2021."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)

    patches = F.conv2d(images, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=PATCH_PX)
    x = patches.flatten(2).transpose(1, 2) + weights["pos_embed"]
    for block in (f"blocks.{place}" for place in range(12)):
        B, N, C = x.shape
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x)).reshape(B, N, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = (q @ k.transpose(-2, -1) / (C // HEADS) ** 0.5).softmax(-1) @ v
        x = x + linear(f"{block}.attn.proj", attended.transpose(1, 2).reshape(B, N, C))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x))))
    return norm("norm", x)


def hf_features(weights: Mapping[str, Tensor], config: Mapping[str, Any], images: Tensor) -> Tensor:
    """The ViT of transformers that has no class token, from its config and the names under which it is stored."""
    assert (config["model_type"], config["hidden_act"], config["qkv_bias"]) == ("ijepa", "gelu", True)
    assert config["image_size"] == list(images.shape[-2:])
    heads, width = config["num_attention_heads"], config["hidden_size"]

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], config["layer_norm_eps"])

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, width // heads)).transpose(1, 2)

    embed = "embeddings.patch_embeddings.projection"
    patches = F.conv2d(images, weights[f"{embed}.weight"], weights[f"{embed}.bias"], stride=config["patch_size"])
    x = patches.flatten(2).mT + weights["embeddings.position_embeddings"]
    for layer in (f"encoder.layer.{place}" for place in range(config["num_hidden_layers"])):
        before = norm(f"{layer}.layernorm_before", x)
        q, k, v = (split(linear(f"{layer}.attention.attention.{part}", before)) for part in ("query", "key", "value"))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(f"{layer}.attention.output.dense", attended)
        hidden = linear(f"{layer}.intermediate.dense", norm(f"{layer}.layernorm_after", x))
        x = x + linear(f"{layer}.output.dense", F.gelu(hidden))
    return norm("layernorm", x)


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


def test_an_export_to_timm_gives_our_features_of_still_images(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "vit.safetensors"
    load = export(run.place, out, "timm")
    assert load.startswith(
        "model = timm.create_model('vit_tiny_patch16_224', pretrained=False, num_classes=0, class_token=False,"
    )
    assert "img_size=(32, 48), patch_size=8); model.load_state_dict(" in load
    images = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(timm_features(load_file(out), images), features_of(run.average, images), atol=1e-5, rtol=1e-5)


def test_an_export_to_transformers_gives_our_features_of_still_images(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "vit"
    assert export(run.place, out, "hf") == f"transformers.AutoModel.from_pretrained({str(out)!r})"
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    config, images = json.loads((out / "config.json").read_text()), torch.randn(2, 3, 32, 48)
    found = hf_features(load_file(out / "model.safetensors"), config, images)
    torch.testing.assert_close(found, features_of(run.average, images), atol=1e-5, rtol=1e-5)


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
    with pytest.raises(CheckpointError, match=r"--weights ema.* holds model; use --weights model"):
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
        export(Place(store), tmp_path / "out", weights="ema" if first.startswith("ema.") else "model")
    assert not (tmp_path / "out").exists()
