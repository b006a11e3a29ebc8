"""Whole runs that cannot work: each ends at once with a sentence and the code that says do not retry.

What is wrong with a data set or a store is told apart in their own tests; here it is that the command passes it on.
"""

import shutil
from pathlib import Path

from tests.runs import Finished, Runner


def refuse(runner: Runner, name: str, *overrides: str, engine: str | None = None, processes: int = 1) -> Finished:
    """Start a run that must fail with a sentence, not a traceback."""
    process = runner.start(name, *overrides, engine=engine, processes=processes)
    finished = runner.finish(name, process)
    assert finished.returncode != 0
    return finished


def assert_sentence(finished: Finished, sentence: str) -> None:
    assert finished.returncode == 2, finished.output[-3000:]
    assert "odonata: " in finished.output
    assert "Traceback" not in finished.output
    assert sentence in " ".join(finished.output.split())


def test_a_missing_dataroot_is_named(runner: Runner) -> None:
    assert_sentence(refuse(runner, "no-root", "data.root=/no/such/folder"), "/no/such/folder")


def test_a_table_that_does_not_parse_is_named(runner: Runner, city: Path, tmp_path: Path) -> None:
    broken = tmp_path / "city"
    shutil.copytree(city, broken)
    table = next(broken.glob("v1.0-*/ego_pose.json"))
    table.write_text(table.read_text()[:-20])
    assert_sentence(refuse(runner, "bad-table", f"data.root={broken}"), "ego_pose.json")


def test_a_world_that_does_not_divide_the_batch_ends_before_training(runner: Runner) -> None:
    finished = refuse(runner, "odd-batch", "global_batch=9", engine="ddp", processes=2)
    assert "global_batch is 9, which 2 processes" in " ".join(finished.output.split())
    assert not (finished.folder / "steps.jsonl").exists()


def test_broken_images_are_replaced_and_counted_and_too_many_end_the_run(runner: Runner, city: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "city"
    shutil.copytree(city, damaged)
    images = sorted(damaged.glob("s*/CAM_FRONT/*.jpg"))
    for image in images[::2]:
        image.write_bytes(image.read_bytes()[:200])
    kept_going = runner.run("few-broken", f"data.root={damaged}", "data.max_replaced_share=1.0", "steps=6")
    assert kept_going.steps[-1]["replaced_clips"] > 0
    assert "replaced a clip that could not be read" in kept_going.output
    refused = refuse(runner, "many-broken", f"data.root={damaged}", "data.max_replaced_share=0.01")
    assert_sentence(refused, "data.max_replaced_share allows 1.0%")


def test_a_run_that_diverges_skips_on_all_ranks_together_names_the_clips_and_stops(runner: Runner) -> None:
    diverging = ("optim.lr=1e35", "optim.clip_grad_norm=null", "optim.max_skipped_steps=3")
    alone = refuse(runner, "diverged", *diverging)
    assert_sentence(alone, "not finite for 3 steps in a row")
    incidents = sorted((alone.folder / "incidents").iterdir())
    assert len(incidents) == 3
    assert "scene" in incidents[0].read_text()
    assert [step["skipped"] for step in alone.steps[-2:]] == [True, True]
    sharded = refuse(runner, "diverged-fsdp2", *diverging, engine="fsdp2", processes=2)
    assert "not finite for 3 steps in a row" in " ".join(sharded.output.split())
    assert [step["skipped"] for step in sharded.steps] == [step["skipped"] for step in alone.steps]


def test_a_run_of_another_model_is_refused_and_names_the_difference(runner: Runner) -> None:
    runner.copy_finished("wide")
    refused = refuse(runner, "wide", "objectives[0].decoder=small", "steps=30")
    assert_sentence(refused, "another experiment: objectives[0].decoder tiny -> small")
