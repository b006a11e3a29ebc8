"""A layout is told by names alone; what is none is not guessed."""

import pytest
import torch

from models.config import Grid
from models.layouts.published import read_published, recognise
from tests.models.layouts.vits import random_timm


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        ({"patch_embed.proj.weight", "enc_blocks.0.norm1.weight"}, "croco"),
        ({"patch_embed.proj.weight", "blocks.0.norm1.weight", "cls_token"}, "timm"),
        ({"encoder.patch_embed.proj.weight", "encoder.blocks.0.norm1.weight"}, "videomae"),
        ({"patch_embed.proj.weight", "blocks.0.attn.q_bias"}, "videomae"),
        ({"vit.embeddings.patch_embeddings.projection.weight", "vit.encoder.layer.0.output.dense.bias"}, "transformers"),
        ({"conv1.weight", "layer1.0.conv1.weight"}, None),
        ({"patch_embed.proj.weight", "layers.0.blocks.0.norm1.weight"}, None),
        ({"embed.weight", "blocks.0.norm1.weight"}, "odonata"),
    ],
    ids=["CroCo", "timm", "VideoMAE", "VideoMAE, tuned", "transformers", "ResNet", "Swin", "our own"],
)
def test_a_layout_is_known_by_its_names(names: set[str], layout: str | None) -> None:
    assert recognise(names) == layout


@pytest.mark.parametrize(
    "names",
    [
        ("backbone.embeddings.patch_embeddings.projection.weight", "backbone.encoder.layer.0.norm1.weight"),
        ("net.patch_embed.proj.weight", "net.blocks.0.attn.q_bias"),
    ],
    ids=["transformers", "VideoMAE"],
)
def test_known_parts_of_an_unknown_model_are_a_sentence(names: tuple[str, ...]) -> None:
    layout = recognise(set(names))
    assert layout is not None
    with pytest.raises(ValueError, match=rf"its names \({min(names)}, .*are those of a model that is not known here"):
        read_published({name: torch.zeros(1) for name in names}, layout, Grid(1, 1, 3, 3))


def test_a_vit_without_a_table_has_positions_that_are_not_known() -> None:
    weights = random_timm(table=9)
    del weights["pos_embed"]
    with pytest.raises(ValueError, match="it has no pos_embed, so positions of a kind that is not known"):
        read_published(weights, "timm", Grid(1, 1, 3, 3))
