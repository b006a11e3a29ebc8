"""Scoring: each task learns what it is shown beyond its trivial answer, held-out clips are always the same ones."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from models.config import EncoderConfig
from models.pretraining import PretrainingModel, build_model
from trainer.config.data import NuscenesData
from trainer.config.run import RunConfig
from trainer.data.build import build_source
from trainer.data.mixed_source import MixedSource
from trainer.errors import DataError
from trainer.evaluation.planning import ChosenEncoder, plan_run
from trainer.evaluation.protocol import PROTOCOLS, TaskName
from trainer.evaluation.scoring import find_trivial_answer, read_clips, score_model, truth_of

TINY = ChosenEncoder("tiny", EncoderConfig(size="tiny", patch_px=16), {"height_px": 32, "width_px": 48}, None)
CPU = torch.device("cpu")
COARSE = [f"objectives.0.lift.{key}" for key in ("width=32", "channels=16", "depth_bins=15")]
QUICK: dict[str, list[str]] = {
    "bev": [*COARSE, "objectives.0.lift.cell_m=4", "objectives.0.cell_m=2"],
    "map": [*COARSE, "objectives.0.lift.cell_m=3", "objectives.0.queries=30", "objectives.0.points=8"],
}
"""Overrides for tasks that would take longer."""

DECIDING = {
    "depth": ["abs_rel"],
    "pose": ["median_cm"],
    "flow": ["epe_px"],
    "bev": ["drivable_iou"],  # vehicles, one cell in a hundred, take more steps than a test has
    "map": ["mAP"],
}
"""Figures by which it is judged whether a task was learnt."""


def plan(task: TaskName, city: Path, folder: Path) -> RunConfig:
    data = [f"root={city}", "kind=synthetic", "cameras=[CAM_FRONT, CAM_BACK]", "workers=0"]
    return plan_run(task, TINY, "finetuned", seed=0, out=str(folder), data=data, overrides=QUICK.get(task, ()))


def build(config: RunConfig) -> PretrainingModel:
    torch.manual_seed(0)
    return build_model(config.encoder, config.objectives, config.token_grid, cameras=config.cameras)


@pytest.mark.parametrize(
    ("task", "steps"), [("depth", 20), ("pose", 60), ("flow", 40), ("bev", 200), pytest.param("map", 200, marks=pytest.mark.slow)]
)
def test_a_task_learns_what_it_is_shown_beyond_its_trivial_answer(task: TaskName, steps: int, city: Path, tmp_path: Path) -> None:
    config, protocol = plan(task, city, tmp_path), PROTOCOLS[task]
    batch, count = next(read_clips(config, "train", 4))
    assert count == len(batch) == 4
    model = build(config)
    model.freeze_encoder()  # features of a random encoder are enough to tell four clips apart
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    for _ in range(steps):
        model(batch, "train").total.backward()
        optimizer.step()
        optimizer.zero_grad()
    truth = truth_of(batch, task)
    with torch.no_grad():
        predicted = model.eval()(batch, "predict")[task].numpy()
    trivial = np.broadcast_to(protocol.answer_trivially(truth), truth.shape)
    learnt, constant = (protocol.scores.figures(protocol.scores.measure(answer, truth)) for answer in (predicted, trivial))
    if task in ("bev", "map"):  # one is best: what is missing
        learnt, constant = ({name: 1 - value for name, value in of_one.items()} for of_one in (learnt, constant))
    for least in DECIDING[task]:
        assert learnt[least] < 0.6 * constant[least], (learnt, constant)


def test_figures_are_of_as_many_held_out_clips_as_asked_for_and_the_same_each_time(city: Path, tmp_path: Path) -> None:
    config = plan("pose", city, tmp_path)
    model = build(config).eval()
    first, second = (score_model(model, config, "pose", clips=20, device=CPU) for _ in range(2))
    assert first == second
    assert first.clips == 20  # two batches, the second one cut
    truths = [truth_of(batch, "pose")[:count] for batch, count in read_clips(config, "val", 20)]
    assert [len(truth) for truth in truths] == [16, 4]
    constant = find_trivial_answer(config, "pose", PROTOCOLS["pose"])
    truth = np.concatenate(truths)
    scores = PROTOCOLS["pose"].scores
    assert first.trivial == scores.figures(scores.measure(np.broadcast_to(constant, truth.shape), truth))


def test_of_data_sets_of_any_weights_every_held_out_clip_is_scored_once(
    loose: NuscenesData, packed_folder: Path, packed_again: Path, tmp_path: Path
) -> None:
    mixed = f"datasets=[{{uri: {packed_folder}, weight: 5}}, {{uri: {packed_again}}}]"
    data = ["kind=shards", mixed, f"index_folder={loose.index_folder}", "cameras=[CAM_FRONT]", "workers=0"]
    config = plan_run("depth", TINY, "frozen", seed=0, out=str(tmp_path), data=data)
    scored = [clip for batch, count in read_clips(config, "val", 10_000) for clip in batch.clips[:count]]
    both = build_source(config.data, "val", frozenset({"images"}), augment=False)
    assert isinstance(both, MixedSource)
    assert sorted(scored) == sorted(both.name(index) for index in range(len(both)))


def test_too_many_held_out_clips_that_cannot_be_read_are_no_result(city: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(city, tmp_path / "city")
    for image in sorted(damaged.glob("s*/CAM_FRONT/*.jpg"))[::3]:
        image.write_bytes(image.read_bytes()[:200])
    config = plan("flow", damaged, tmp_path / "run")
    with pytest.raises(DataError, match=r"clips of the val split were to be scored and \d+ could not be read; .* allows 1\.0%"):
        list(read_clips(config, "val", 40))
    lenient = config.model_copy(update={"data": config.data.model_copy(update={"max_replaced_share": 1.0})})
    assert sum(count for _, count in read_clips(lenient, "val", 8)) == 8


def test_another_seed_is_scored_on_the_same_clips(city: Path, tmp_path: Path) -> None:
    config = plan("flow", city, tmp_path)
    other = config.model_copy(update={"seed": 5})
    batches = [next(read_clips(one, "val", 4))[0] for one in (config, other)]
    assert batches[0].clips == batches[1].clips
    assert torch.equal(batches[0].prepared["flow"]["truth"].nan_to_num(), batches[1].prepared["flow"]["truth"].nan_to_num())
