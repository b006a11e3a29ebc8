"""The study's bookkeeping: which cells there are, what is not run twice, and when a claim holds."""

import json
import math
from pathlib import Path

import pytest

from benchmarks import transfer_cells
from benchmarks.report import RESULTS
from benchmarks.transfer_cells import Cell, list_cells, read_figures, read_known, read_trivial, run_cells
from benchmarks.transfer_protocol import CLAIMS, PRETRAININGS, SCRATCH, TASKS, Claim, write_protocol
from benchmarks.transfer_table import as_markdown, compare_with_scratch, judge, paired_differences, tabulate
from models.config import EncoderConfig
from tests.runs import ROOT
from trainer.config.load import load_run_config
from trainer.evaluation.planning import ChosenEncoder, plan_run
from trainer.evaluation.protocol import PROTOCOLS, Mode

STUDY = ROOT / "docs" / "study.md"


def values_of(task: str, **of_names: list[float]) -> dict[tuple[str, str, str, int], dict[str, float]]:
    """Frozen cells of a task: one number a seed of each pre-training."""
    metric = TASKS[task].metric
    return {
        (task, name, "frozen", seed): {metric: value}
        for name, of_seeds in of_names.items()
        for seed, value in enumerate(of_seeds)
    }


@pytest.mark.parametrize("name", PRETRAININGS)
def test_every_pretraining_is_a_run_of_as_many_steps_as_the_protocol_says(name: str, tmp_path: Path) -> None:
    cells, _ = list_cells(tmp_path, [name], ["depth"], 3, {})
    cell = next(cell for cell in cells if cell.name == f"pretrained/{name}-3")
    command, config_path, *overrides = cell.command
    config = load_run_config(Path(config_path), overrides)
    assert command == "train" and config.seed == 3
    of_mix = {"croco", "simipu", "mim4d"}
    assert {objective.kind for objective in config.objectives} == (of_mix if name == "mix" else {name.removesuffix("_long")})
    (row,) = (line for line in STUDY.read_text().splitlines() if line.startswith(f"| {name} |"))
    assert row.endswith(f"| {config.steps} |") and f" {config.global_batch} " in row


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("mode", ["frozen", "finetuned"])
def test_every_task_is_trained_as_the_protocol_says(task: str, mode: Mode) -> None:
    how = TASKS[task]
    chosen = ChosenEncoder("nano", EncoderConfig(size="nano", patch_px=8), {"height_px": 48, "width_px": 80}, None)
    config = plan_run(task, chosen, mode, seed=0, out="runs/x", steps=how.steps, data=["root=city"], overrides=how.settings)
    (row,) = (line for line in STUDY.read_text().splitlines() if line.startswith(f"| {task} | {how.metric} |"))
    assert f"| {config.steps} | {config.global_batch} | {config.optim.lr:g} |" in row


def test_every_task_of_the_study_has_a_protocol() -> None:
    assert set(TASKS) <= set(PROTOCOLS)
    assert {task for claim in CLAIMS for task in claim.tasks} <= set(TASKS)


def test_cells_of_one_seed_share_everything_but_the_encoder(tmp_path: Path) -> None:
    _, cells = list_cells(tmp_path, list(PRETRAININGS), ["depth"], 2, {})
    assert len(cells) == (1 + len(PRETRAININGS)) * len(TASKS["depth"].modes)
    commands = [
        [part for part in cells["depth", name, "frozen", 2].command if str(tmp_path / "pretrained") not in part]
        for name in ("mae", "croco")
    ]
    for command in commands:
        command.remove(next(part for part in command if "evaluated" in part))
    assert commands[0] == commands[1]


def test_a_cell_that_has_ended_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, todo = (Cell(tmp_path / name, ("config", "--schema")) for name in ("done", "todo"))
    done.cost.write_text("1.0\n")
    ran: list[Cell] = []
    monkeypatch.setattr(transfer_cells, "run_cell", lambda cell: ran.append(cell) or True)
    run_cells([[done, todo]], jobs=1)
    assert ran == [todo]


def test_cells_of_an_earlier_report_are_neither_run_nor_pretrained_for(tmp_path: Path) -> None:
    earlier = {
        "cells": [
            {"task": "depth", "pretraining": name, "mode": mode, "seed": 0, "metric": "abs_rel", "value": 0.5}
            for name in (SCRATCH, "mae")
            for mode in TASKS["depth"].modes
        ],
        "table": {"depth": {"abs_rel": {"trivial": {"mean": 0.75, "half_width": None}}}},
        "protocol": write_protocol(),
        "minutes": {"pretrained/mae-0": 2.0, "evaluated/depth-mae-frozen-0": 1.0},
    }
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    known = read_known(tmp_path / "earlier.json")
    assert known.values["depth", "mae", "frozen", 0] == {"abs_rel": 0.5}
    assert known.trivial == {"depth": {"abs_rel": 0.75}}
    assert known.minutes == earlier["minutes"]
    assert list_cells(tmp_path, ["mae"], ["depth"], 0, known.values) == ([], {})
    pretrained, evaluated = list_cells(tmp_path, ["mae", "simipu"], ["depth"], 0, known.values)
    assert [cell.name for cell in pretrained] == ["pretrained/simipu-0"]
    assert {name for _, name, _, _ in evaluated} == {"simipu"}


@pytest.mark.parametrize(
    ("changed", "kept"), [("depth", set()), ("mae", {SCRATCH}), ("pose", {SCRATCH, "mae"}), ("shared", set())]
)
def test_cells_of_another_protocol_are_not_taken_from_an_earlier_report(changed: str, kept: set[str], tmp_path: Path) -> None:
    cells = [
        {"task": "depth", "pretraining": name, "mode": "frozen", "seed": 0, "metric": "abs_rel", "value": 0.5}
        for name in (SCRATCH, "mae")
    ]
    protocol = {**write_protocol(), changed: ["steps=1"]}
    minutes = {f"evaluated/depth-{name}-frozen-0": 1.0 for name in (SCRATCH, "mae")}
    table = {"depth": {"abs_rel": {"trivial": {"mean": 0.75, "half_width": None}}}}
    earlier = {"cells": cells, "table": table, "protocol": protocol, "minutes": minutes}
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    known = read_known(tmp_path / "earlier.json")
    assert {name for _, name, _, _ in known.values} == kept
    assert set(known.minutes) == {f"evaluated/depth-{name}-frozen-0" for name in kept}
    assert set(known.trivial) == ({"depth"} if kept else set())


def test_a_fresh_encoder_is_like_crocos_which_is_pretrained_for_it(tmp_path: Path) -> None:
    pretrained, _ = list_cells(tmp_path, ["mae"], ["depth"], 1, {})
    assert [cell.name for cell in pretrained] == ["pretrained/mae-1", "pretrained/croco-1"]


def test_a_cell_that_fails_is_named_after_the_others_were_run(tmp_path: Path) -> None:
    bad, good = Cell(tmp_path / "bad", ("config", "no/such.yaml")), Cell(tmp_path / "good", ("config", "--schema"))
    with pytest.raises(SystemExit, match=r"bad\.log"):
        run_cells([[bad, good]], jobs=2)
    assert good.has_ended and not bad.has_ended
    assert "no/such.yaml" in bad.log.read_text()


def test_a_difference_is_taken_seed_by_seed_and_positive_where_the_first_is_better() -> None:
    values = values_of("depth", croco=[0.2, 0.3], scratch=[0.3, 0.7, 0.9])
    assert paired_differences(values, "depth", "croco", SCRATCH, "frozen") == pytest.approx([0.1, 0.4])
    assert paired_differences(values, "depth", SCRATCH, "croco", "frozen") == pytest.approx([-0.1, -0.4])


def test_each_pretraining_is_compared_with_scratch_where_two_seeds_have_both() -> None:
    values = values_of("depth", croco=[0.2, 0.3], scratch=[0.3, 0.7], mae=[0.1])
    assert compare_with_scratch(values).keys() == {"depth, croco, frozen"}
    assert compare_with_scratch(values)["depth, croco, frozen"]["mean"] == pytest.approx((0.1 + 0.4) / 2)


def test_a_claim_holds_where_the_interval_lies_above_zero_and_is_open_without_two_seeds() -> None:
    claim = next(claim for claim in CLAIMS if claim.text == "CroCo beats scratch on pose")
    scratch = [100.0, 90.0, 110.0, 95.0, 105.0]
    clearly = values_of("pose", croco=[value - 10 - seed for seed, value in enumerate(scratch)], scratch=scratch)
    assert judge(claim, clearly)["holds"] is True
    # mean 2, deviation sqrt(250 / 4): half the interval is 2.776 * 7.906 / sqrt(5) = 9.8
    by_chance = values_of(
        "pose", croco=[value - d for value, d in zip(scratch, (12, -8, 2, 7, -3), strict=True)], scratch=scratch
    )
    assert judge(claim, by_chance)["holds"] is False
    interval = judge(claim, by_chance)["differences"]["pose"]
    assert interval["half_width"] == pytest.approx(2.776 * math.sqrt(250 / 4 / 5), rel=1e-3)
    assert judge(claim, {})["holds"] is None
    assert judge(claim, values_of("pose", croco=[1.0], scratch=[2.0]))["holds"] is None


def test_the_table_has_means_and_the_text_a_column_for_every_pretraining_that_is_known() -> None:
    values = values_of("pose", croco=[1.0, 3.0], scratch=[4.0, 4.0]) | values_of("flow", mae=[1.0, 1.0])
    table = tabulate(values, {"pose": {"median_cm": 5.0}, "flow": {"epe_px": 5.0}})
    assert table["pose"]["median_cm"]["croco, frozen"]["mean"] == 2.0
    text = as_markdown(table, compare_with_scratch(values), [judge(claim, values) for claim in CLAIMS])
    head, _, row = text.splitlines()[:3]
    columns = dict(zip(head.split("|"), row.split("|"), strict=True))
    assert columns["  "] == " pose, frozen: median_cm ↓ " and columns[" scratch "] == " 4 ± 0 " and columns[" mae "] == " - "
    assert " mim4d " not in columns
    assert columns[" trivial "] == " 5 "
    # better by 3 and by 1: a mean of 2, and 12.706 standard errors of 1
    assert columns[" croco "] == " 2 ± 13 "
    assert "- CroCo beats scratch on pose: does not hold (pose: median_cm better by 2 ± 13)\n" in text
    assert "- MIM4D beats scratch on BEV: not known yet\n" in text
    assert "Means over 2 seeds, with 95 % intervals." in text


def test_what_is_surely_better_than_scratch_is_bold_and_figures_have_no_exponents() -> None:
    values = values_of("pose", scratch=[1000.0, 2000.0], croco=[400.0, 1399.0], mae=[1400.0, 2401.0, 1900.0])
    claims = [judge(Claim("MAE beats scratch", "mae", SCRATCH, ("pose",)), values)]
    text = as_markdown(tabulate(values, {"pose": {"median_cm": 5.0}}), compare_with_scratch(values), claims)
    assert "(pose: median_cm worse by 400 ± 6.4)" in text and "Means over 2 to 3 seeds" in text
    assert "| 1500 ± 6400 |" in text and "| **900 ± 6300** |" in text and "| 1900 ± 1200 |" in text


def test_figures_of_a_cell_are_those_of_its_seed_and_nan_where_unknown(tmp_path: Path) -> None:
    cell = Cell(tmp_path / "cell", ())
    cell.folder.mkdir()
    evaluation = {"seeds": [{"figures": {"epe_px": 1.5, "outliers": None}}], "trivial_figures": {"epe_px": 3.5, "outliers": 0.5}}
    (cell.folder / "evaluation.json").write_text(json.dumps(evaluation))
    found = read_figures(cell)
    assert found["epe_px"] == 1.5 and math.isnan(found["outliers"])
    assert read_trivial(cell) == {"epe_px": 3.5, "outliers": 0.5}


def test_the_table_of_the_readme_is_that_of_the_saved_cells() -> None:
    known, saved = read_known(RESULTS / "transfer.json"), json.loads((RESULTS / "transfer.json").read_text())
    assert known.values, "the saved cells are of another protocol: run python -m benchmarks.transfer"
    table, differences = tabulate(known.values, known.trivial), compare_with_scratch(known.values)
    claims = [judge(claim, known.values) for claim in CLAIMS]
    assert json.dumps([saved["table"], saved["differences"], saved["claims"]]) == json.dumps([table, differences, claims])
    text = as_markdown(table, differences, claims)
    assert (RESULTS / "transfer.md").read_text() == text, "run python -m benchmarks.transfer with --report --save"
    assert text in (ROOT / "README.md").read_text(), "copy benchmarks/results/transfer.md into README.md"
