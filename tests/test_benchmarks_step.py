"""What the benchmarks of a step compare are equals, and the page of figures says what was saved."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import performance
from benchmarks.attention import KINDS, measure
from benchmarks.naive_croco import NaiveCroco
from benchmarks.performance import Row, write_row
from models.config import CrocoConfig, EncoderConfig, Grid, MaskConfig
from models.pretraining import build_model
from tests.models.samples import PATCH_PX, random_batch

GRID = Grid(t=1, v=1, h=4, w=4)


def test_the_naive_twin_learns_the_same() -> None:
    encoder = EncoderConfig(size="tiny", patch_px=PATCH_PX, positions="sincos")
    croco = CrocoConfig(decoder="tiny", mask=MaskConfig(ratio=0.75))
    torch.manual_seed(0)
    model = build_model(encoder, [croco], GRID)
    naive, batch = NaiveCroco(model, GRID), random_batch(encoder, GRID, croco=croco)
    ours, theirs = model(batch, "train").total, naive(batch)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(theirs, ours)
    of_ours = dict(model.encoder.named_parameters())
    for name, parameter in naive.encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, of_ours[name].grad, rtol=1e-3, atol=1e-6)


def test_every_kind_of_attention_is_measured_or_says_why_not() -> None:
    found, left_out = measure((3, 5, 5), torch.device("cpu"), turns=1)
    assert found["seconds"].keys() | left_out.keys() == KINDS.keys()
    assert found["chosen"] == "sdpa" and found["seconds"].keys() >= {"sdpa", "padded"}
    assert found["chosen_over_fastest"] >= 1


@pytest.mark.parametrize(
    ("saved", "shown"),
    [(None, "not measured"), ({"a": {"b": 0.5}}, "0.5"), ({"a": {"b": 0.7}}, "0.7 (missed)"), ({"a": 1}, "not measured")],
)
def test_a_figure_is_met_missed_or_not_measured(
    saved: dict[str, object] | None, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(performance, "RESULTS", tmp_path)
    if saved:
        (tmp_path / "x.json").write_text(json.dumps(saved))
    row = Row("x", "a.b", "what", 0.6, "lower", "why")
    assert write_row(row) == ("what", shown, "at most 0.6", "why", "`python -m benchmarks.x`")


def test_the_page_of_figures_is_that_of_the_saved_results() -> None:
    page = Path(performance.__file__).parents[1] / "docs" / "performance.md"
    assert page.read_text() == performance.write_page(), "run python -m benchmarks.performance"
