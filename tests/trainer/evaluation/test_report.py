"""Reports: intervals by hand, and what both files say."""

import json
import math
from pathlib import Path

import pytest

from trainer.evaluation.report import Evaluation, SeedResult, summarise, write_evaluation
from trainer.store.open import open_store


def evaluation(*figures: float) -> Evaluation:
    return Evaluation(
        task="flow",
        encoder="base",
        uri="runs/base",
        mode="frozen",
        steps=10,
        global_batch=4,
        clips=8,
        trivial="no motion at all",
        trivial_figures={"epe_px": 2.5},
        seeds=[SeedResult(seed, f"runs/seed-{seed}", {"epe_px": value}) for seed, value in enumerate(figures)],
    )


def test_an_interval_is_students() -> None:
    mean, half = summarise([1.0, 2.0, 3.0])
    # deviation 1, three values, and 4.302653 from the table of t for two degrees of freedom
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert summarise([1.5]) == (1.5, None)


def test_both_files_are_written_and_say_the_same(tmp_path: Path) -> None:
    write_evaluation(evaluation(1.0, 2.0, 3.0), open_store(tmp_path))
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["summary"]["epe_px"]["mean"] == 2.0
    assert [one["figures"]["epe_px"] for one in content["seeds"]] == [1.0, 2.0, 3.0]
    text = (tmp_path / "evaluation.md").read_text()
    assert "# flow: base, frozen" in text
    assert "| epe_px | 2 ± 2.5 | 2.5 |" in text


def test_what_could_not_be_scored_is_null() -> None:
    assert evaluation(math.nan).as_json()["summary"]["epe_px"] == {"mean": None, "half_width": None}
