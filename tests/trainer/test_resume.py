"""Stopping and going on: after kill -9, after signals, on another world size, past a broken checkpoint."""

import json
import signal

import numpy as np
import pytest
import torch

from tests.runs import Finished, Runner, kill_tree, ranks_of
from tests.trainer.test_parity import final_weights, run_under

BIT_EQUAL_KEYS = ("step", "loss", "grad_norm", "learning_rate")


@pytest.fixture(scope="module")
def unbroken(runner: Runner) -> Finished:
    return run_under(runner, "fsdp2 x2")


def kill_after(runner: Runner, name: str, step: int, *overrides: str, engine: str | None, processes: int) -> None:
    """Start a run and kill -9 every process of it once `step` is recorded."""
    process = runner.start(name, *overrides, engine=engine, processes=processes)
    runner.wait_for_step(name, step, process)
    kill_tree(process.pid)
    process.communicate()


def assert_bit_equal(found: Finished, expected: Finished) -> None:
    assert len(found.steps) == len(expected.steps)
    for step, reference in zip(found.steps, expected.steps, strict=True):
        assert [step[key] for key in BIT_EQUAL_KEYS] == [reference[key] for key in BIT_EQUAL_KEYS]
    weights, references = final_weights(found.folder), final_weights(expected.folder)
    assert weights.keys() == references.keys()
    assert all(torch.equal(weights[name], references[name]) for name in references)


def test_ten_steps_a_kill_and_ten_more_equal_twenty_bit_for_bit(runner: Runner, unbroken: Finished) -> None:
    kill_after(runner, "killed", 12, engine="fsdp2", processes=2)
    resumed = runner.run("killed", engine="fsdp2", processes=2)
    assert "resuming" in resumed.output
    assert "after step 10" in resumed.output
    assert_bit_equal(resumed, unbroken)


@pytest.mark.slow
def test_a_killed_run_goes_on_under_another_engine_and_world_size(runner: Runner, unbroken: Finished) -> None:
    kill_after(runner, "moved", 12, engine="fsdp2", processes=2)
    resumed = runner.run("moved")
    np.testing.assert_allclose(resumed.losses, unbroken.losses, rtol=1e-6)
    assert [step["step"] for step in resumed.steps] == list(range(1, 21))


def test_sigterm_saves_asks_for_a_retry_and_loses_no_step(runner: Runner) -> None:
    expected = runner.once("alone")  # when it saves does not change what it learns
    process = runner.start("stopped", "checkpoint.every_steps=100")
    runner.wait_for_step("stopped", 5, process)
    process.send_signal(signal.SIGTERM)
    stopped = runner.finish("stopped", process)
    assert stopped.returncode == 75, stopped.output
    assert "start the same job again" in stopped.output
    steps_before = len(stopped.steps)
    assert 5 <= steps_before < 20
    resumed = runner.run("stopped", "checkpoint.every_steps=100")
    assert f"after step {steps_before}" in resumed.output
    assert_bit_equal(resumed, expected)


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_on_all_ranks(runner: Runner, unbroken: Finished) -> None:
    process = runner.start("stopped-fsdp2", "checkpoint.every_steps=100", engine="fsdp2", processes=2)
    runner.wait_for_step("stopped-fsdp2", 5, process)
    process.send_signal(signal.SIGTERM)
    stopped = runner.finish("stopped-fsdp2", process)
    assert stopped.returncode != 0
    resumed = runner.run("stopped-fsdp2", "checkpoint.every_steps=100", engine="fsdp2", processes=2)
    assert f"after step {len(stopped.steps)}" in resumed.output
    assert_bit_equal(resumed, unbroken)


@pytest.mark.slow
def test_a_lost_peer_ends_the_survivors_and_the_run_resumes(runner: Runner, unbroken: Finished) -> None:
    process = runner.start("bereft", engine="fsdp2", processes=2)
    runner.wait_for_step("bereft", 12, process)
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    ranks[-1].kill()
    assert runner.finish("bereft", process, timeout_s=60).returncode != 0
    assert_bit_equal(runner.run("bereft", engine="fsdp2", processes=2), unbroken)


def test_resume_passes_over_a_broken_checkpoint_and_says_why(runner: Runner) -> None:
    runner.copy_finished("damaged")
    newest = max((runner.folder / "damaged" / "checkpoints").iterdir())
    payload = next(newest.glob("rank-*.bin"))
    content = bytearray(payload.read_bytes())
    content[len(content) // 2] ^= 1
    payload.write_bytes(content)
    resumed = runner.run("damaged")
    assert "after step 10" in resumed.output
    assert "checksum" in resumed.output
    assert [step["step"] for step in resumed.steps] == list(range(1, 21))


def test_a_finished_run_that_is_started_again_does_nothing(runner: Runner) -> None:
    first = runner.copy_finished("finished")
    again = runner.run("finished")
    assert again.steps == first.steps
    assert "nothing is left to do" in again.output


def test_a_run_that_is_resumed_with_another_config_says_so_or_is_refused(runner: Runner) -> None:
    runner.copy_finished("changed")
    refused = runner.finish("changed", runner.start("changed", "steps=21", "seed=5", "data.clip.width_px=64"))
    assert refused.returncode == 2
    assert "another experiment: seed 0 -> 5; data.clip.width_px 32 -> 64" in refused.output
    longer = runner.run("changed", "steps=21", "optim.lr=0.002")
    assert "changed since the last start of this run: steps 20 -> 21; " in longer.output
    assert "optim.lr 0.001 -> 0.002" in longer.output
    assert "steps: 20" in (longer.folder / "config-until-step-00000020.yaml").read_text()


def test_a_run_that_must_begin_anew_refuses_a_folder_with_checkpoints(runner: Runner) -> None:
    runner.copy_finished("taken")
    process = runner.start("taken", options=("--resume", "never"))
    refused = runner.finish("taken", process)
    assert refused.returncode == 2
    assert "holds a checkpoint of step 20" in refused.output


def test_a_warm_start_takes_the_encoder_of_another_run(runner: Runner) -> None:
    runner.copy_finished("teacher")
    student = runner.run(
        "student", "steps=1", f"warm_start.uri={runner.folder / 'teacher'}", "optim.lr=1e-9", "optim.warmup_steps=0"
    )
    teacher_weights, student_weights = (final_weights(runner.folder / name) for name in ("teacher", "student"))
    encoder = [name for name in teacher_weights if name.startswith("model.encoder.")]
    assert encoder
    for name in encoder:
        torch.testing.assert_close(student_weights[name], teacher_weights[name], atol=1e-6, rtol=0)
    decoder = next(name for name in teacher_weights if name.endswith("mask_token"))
    assert not torch.equal(student_weights[decoder], teacher_weights[decoder])
    assert json.loads((student.folder / "steps.jsonl").read_text().splitlines()[0])["step"] == 1
