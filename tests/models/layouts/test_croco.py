"""The encoder of official CroCo weights, in: the features that the official model gives."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import models.config
from models.config import EncoderConfig, Grid, TransformerShape
from models.layouts.plain import fit_encoder
from models.layouts.published import read_published, recognise
from tests.models.layouts.vits import our_features


@pytest.mark.parametrize(("kind", "positions"), [("cosine", "sincos"), ("cosine", "learned"), ("rope", "rope")])
def test_the_encoder_of_an_official_checkpoint_gives_the_official_features(
    kind: str, positions: str, oracle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with safe_open(oracle_dir / f"croco-tiny-rect-{kind}.safetensors", "pt") as file:
        names = list(file.keys())
        weights = {name.removeprefix("state_dict."): file.get_tensor(name) for name in names if name.startswith("state_dict.")}
        image, expected = file.get_tensor("img2"), file.get_tensor("feat2")
        official = json.loads(file.metadata()["config"])
    C = official["enc_embed_dim"]
    shape = TransformerShape(C, official["enc_depth"], official["enc_num_heads"], 4 * C)
    monkeypatch.setitem(models.config.ENCODER_SHAPES, "tiny", shape)
    grid = Grid(1, 1, official["img_size"][0] // 16, official["img_size"][1] // 16)
    config = EncoderConfig.model_validate({"size": "tiny", "positions": positions})
    assert recognise(set(weights)) == "croco"
    fitted = fit_encoder(read_published(weights, "croco", grid), config, grid)
    assert fitted.weights.keys().isdisjoint({"mask_token", "decoder_embed.weight"})
    found = our_features(fitted, config, grid, image[:, None, None])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "asked", "wanted"), [("rope", "sincos", "rope"), ("cosine", "rope", "sincos")])
def test_positions_of_another_kind_are_refused(
    kind: str, asked: str, wanted: str, oracle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with safe_open(oracle_dir / f"croco-tiny-rect-{kind}.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith("state_dict.")]  # noqa: SIM118 (not a dict)
        weights = {name.removeprefix("state_dict."): file.get_tensor(name) for name in names}
        official = json.loads(file.metadata()["config"])
    C = official["enc_embed_dim"]
    monkeypatch.setitem(
        models.config.ENCODER_SHAPES, "tiny", TransformerShape(C, official["enc_depth"], official["enc_num_heads"], 4 * C)
    )
    grid = Grid(1, 1, official["img_size"][0] // 16, official["img_size"][1] // 16)
    with pytest.raises(ValueError, match=rf"set encoder\.positions={wanted}$"):
        fit_encoder(
            read_published(weights, "croco", grid), EncoderConfig.model_validate({"size": "tiny", "positions": asked}), grid
        )
