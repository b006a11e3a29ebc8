"""A model card says what the record says, and nothing that it does not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.runs import SMALL_RUN
from tests.trainer.checkpoint.toy import save_now
from trainer.card import write_card
from trainer.checkpoint.boxes import boxes_of
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.tools import Place
from trainer.config.load import dump_run_config, parse_run_config
from trainer.config.training import CheckpointConfig
from trainer.errors import CheckpointError
from trainer.observe.probes import Probe, write_probe
from trainer.run_history import read_evaluation
from trainer.store.base import Store
from trainer.store.open import open_store

ENVIRONMENT = {
    "versions": {"python": "3.11.7", "torch": "2.13.0", "deepspeed": None},
    "revision": {"commit": "abc123", "changed": True},
    "hardware": {"cpu": "Some CPU", "cores": 16, "memory_bytes": 128 * 2**30, "gpus": [{"name": "H200", "memory_bytes": 1}] * 8},
    "launch": {"engine": "fsdp2", "world_size": 64, "precision": "bf16"},
    "data": {"kind": "synthetic", "root": "/secret/place/city", "version": "v1.0-mini", "samples": 12345},
}
EVALUATION = {
    "task": "depth",
    "encoder": "base-step-4",
    "mode": "frozen",
    "steps": 400,
    "global_batch": 8,
    "clips": 50,
    "trivial": "median depth",
    "trivial_figures": {"delta1": 0.25, "rmse_m": 9.5},
    "seeds": [{"seed": 0}, {"seed": 1}],
    "summary": {"delta1": {"mean": 0.7071, "half_width": 0.012}, "rmse_m": {"mean": None, "half_width": None}},
}


def step_line(step: int, **others: Any) -> dict[str, Any]:
    loss = 10.0 - step
    times = {"time_s": 1.0, "step_seconds": 720.0, "data_seconds": 72.0}
    counts = {"clips": 4, "tokens": 100, "skipped_steps": 1, "replaced_clips": 2, "skipped": False}
    return {"step": step, "loss": loss, "parts": {"croco/loss": loss}} | times | counts | others


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A run of six steps with a checkpoint of step 4 and all that a run records."""
    store = open_store(tmp_path / "runs" / "base")
    content = yaml.safe_load(SMALL_RUN)
    content["data"]["root"] = "/secret/place/city"
    content["warm_start"] = {"uri": "/secret/runs/teacher/checkpoints/step-9-1-ab"}
    store.put("config.yaml", dump_run_config(parse_run_config(content, origin="the test")).encode())
    store.put("environment.json", json.dumps(ENVIRONMENT).encode())
    lines = [step_line(1), step_line(2), step_line(3, loss=None, skipped=True), step_line(4), step_line(5), step_line(6)]
    store.put("steps.jsonl", "\n".join([*map(json.dumps, lines), '{"step": 7, "lo']).encode())
    evaluations = [{"step": step, "time_s": 1.0, "croco/loss": 0.5 * step} for step in (2, 4, 6)]
    store.put("evaluations.jsonl", "".join(f"{json.dumps(line)}\n" for line in evaluations).encode())
    state = {f"{kind}.encoder.weight": boxes_of(torch.zeros(1000, 3)) for kind in ("model", "ema")}
    save_now(CheckpointManager(store, CheckpointConfig()), 4, state, engine="fsdp2")
    return store


def rows(card: str) -> dict[str, str]:
    """First and second column of every table."""
    cells = [line.strip("|").split("|") for line in card.splitlines() if line.startswith("| ")]
    return {row[0].strip(): row[1].strip() for row in cells}


def test_a_card_tells_the_run_up_to_its_checkpoint(store: Store) -> None:
    card = write_card(Place(store))
    found = rows(card)
    assert card.split("---")[1].count("license") == 0
    head = yaml.safe_load(card.split("---")[1])
    assert head["pipeline_tag"] == "image-feature-extraction" and "croco" in head["tags"]
    assert "# base\n\nA ViT-tiny/8 for clips of 4 frames of 32 x 32 pixels, trained with [CroCo]" in card
    assert found["step"] == "4 of 20"
    assert found["clips seen"] == "16, 4 a step"
    assert found["tokens seen"] == "400"
    assert found["time in steps"] == "48.0 minutes, 10% of it waiting for data"
    assert found["loss"] == f"{(9 + 8 + 6) / 3:.4g}"  # step 3 moved no weight, steps 5 and 6 came later
    assert found["croco/loss"] == "2"  # the held-out figure of step 4, below the loss of the same name
    assert found["began with"] == "encoder of teacher, step-9-1-ab"
    assert found["data"] == "synthetic data, city (v1.0-mini), 12,345 samples"
    assert found["parameters"] == "3,000, with a moving average"
    assert found["ranks"] == "64, fsdp2, bf16"
    assert found["GPUs of a node"] == "8 x H200"
    assert found["versions"] == "python 3.11.7, torch 2.13.0"
    assert found["revision"] == "abc123, with changes"
    assert "## Intended use" in card and "## Limits" in card


def test_a_card_names_no_place(store: Store, tmp_path: Path) -> None:
    card = write_card(Place(store))
    assert "/secret" not in card and str(tmp_path) not in card


def test_the_licence_is_the_owners_word(store: Store) -> None:
    assert yaml.safe_load(write_card(Place(store), licence="cc-by-nc-4.0").split("---")[1])["license"] == "cc-by-nc-4.0"


def test_evaluations_stand_in_a_card_with_whose_encoder_it_is_where_it_is_not_its_own(store: Store, tmp_path: Path) -> None:
    elsewhere = open_store(tmp_path / "depth")
    elsewhere.put("evaluation.json", json.dumps(EVALUATION).encode())
    fresh = EVALUATION | {"encoder": "scratch-like-base"}
    card = write_card(Place(store), evaluations=[read_evaluation(elsewhere), fresh])
    assert "## Evaluation: depth, frozen\n" in card
    assert "## Evaluation: depth, frozen, of another encoder: scratch-like-base\n" in card
    assert "400 steps of 8 clips on base-step-4, 2 seeds, scored on 50 held-out clips. Trivial answer: median depth." in card
    assert "| delta1 | 0.7071 ± 0.012 | 0.25 |" in card
    assert "| rmse_m | not a number | 9.5 |" in card


def probe(step: int, **changes: Any) -> Probe:
    figures: dict[str, float | None] = {"delta1": 0.5 + step / 100, "rmse_m": None}
    given: dict[str, Any] = {
        "task": "depth",
        "step": step,
        "checkpoint": "checkpoints/some/",
        "head_steps": 200,
        "global_batch": 8,
    }
    given |= {"clips_asked": 64, "clips": 50, "trivial": "median depth", "trivial_figures": {"delta1": 0.25, "rmse_m": 9.5}}
    return Probe(**(given | {"figures": figures, "seconds": 60.0, "time_s": 1.0} | changes))


def test_the_newest_probe_up_to_the_checkpoint_stands_in_the_card(store: Store) -> None:
    for step in (2, 4, 6):
        write_probe(store, probe(step))
    card = write_card(Place(store))
    assert "## Probe: depth, after step 4" in card and "after step 6" not in card
    assert "head of 200 steps on the frozen encoder, 50 held-out clips" in card
    assert (rows(card)["delta1"], rows(card)["rmse_m"]) == ("0.54", "not a number")


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"step": 1}'])
def test_a_probe_that_cannot_be_read_is_named(store: Store, content: bytes) -> None:
    store.put("probes/depth/step-00000002.json", content)
    with pytest.raises(CheckpointError, match=r"probes/depth/step-00000002\.json was to be read as the record of a probe"):
        write_card(Place(store))


def test_what_was_not_recorded_is_not_there(store: Store) -> None:
    for name in ("environment.json", "steps.jsonl", "evaluations.jsonl"):
        store.delete(name)
    card = write_card(Place(store))
    assert "step" in rows(card) and "clips seen" not in rows(card)
    assert "Losses" not in card and "Held-out" not in card and "Hardware" not in card
    assert "synthetic data, city |" in card


def test_imported_weights_are_told_with_where_they_come_from_and_no_training(store: Store) -> None:
    origin = {"file": "vit.pth", "layout": "timm", "sha256": "ab12", "changes": ["LayerScale folded"]}
    store.put("import.json", json.dumps(origin).encode())
    card = write_card(Place(store))
    assert (
        "not trained here: its weights are those of `vit.pth` (timm, SHA-256 `ab12`), taken over with\n\n- LayerScale folded"
        in card
    )
    assert "## Training" not in card
    assert "croco" not in yaml.safe_load(card.split("---")[1])["tags"] and "without labels" not in card


def test_a_run_that_learnt_from_ground_truth_is_not_called_self_supervised(store: Store) -> None:
    assert "self-supervised" in yaml.safe_load(write_card(Place(store)).split("---")[1])["tags"]
    content = yaml.safe_load(store.get("config.yaml"))
    content |= {"objectives": [{"kind": "depth"}], "optim": content["optim"]}
    content["data"]["clip"]["frames"] = 1
    content["encoder"]["has_time"] = True
    store.put("config.yaml", dump_run_config(parse_run_config(content, origin="the test")).encode())
    card = write_card(Place(store))
    tags = yaml.safe_load(card.split("---")[1])["tags"]
    assert "self-supervised" not in tags and "depth" in tags
    assert "It was trained with the ground truth of depth;" in card and "without labels" not in card


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("environment.json", b"{", r"environment\.json is not JSON"),
        ("config.yaml", None, r"there is no config\.yaml; put the one of its run there"),
    ],
)
def test_a_record_that_cannot_be_read_is_refused(store: Store, name: str, content: bytes | None, sentence: str) -> None:
    store.put(name, content) if content else store.delete(name)
    with pytest.raises(CheckpointError, match=sentence):
        write_card(Place(store))
