"""A stopwatch adds up by phase, and on CUDA waits for nothing."""

import time

import pytest
import torch

from trainer.stopwatch import Stopwatch


def test_phases_add_up_until_they_are_taken() -> None:
    stopwatch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with stopwatch.timing("forward"):
            time.sleep(0.01)
    with stopwatch.timing_host("data_wait"):
        assert stopwatch.phase == "data_wait"
    assert stopwatch.seconds("forward") >= 0.02
    taken = stopwatch.take()
    assert taken.keys() == {"forward", "data_wait"}
    assert taken["forward"] >= 0.02 > taken["data_wait"]
    assert stopwatch.take() == {}
    assert stopwatch.seconds("forward") == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_a_phase_is_known_once_the_device_has_passed_it() -> None:
    stopwatch = Stopwatch(torch.device("cuda"))
    factor = torch.ones(8192, 8192, device="cuda")
    factor @ factor
    torch.cuda.synchronize()
    with stopwatch.timing("forward"):
        for _ in range(20):
            factor = factor @ factor
    early = stopwatch.take().get("forward", 0.0)
    torch.cuda.synchronize()
    assert early + stopwatch.take().get("forward", 0.0) > 20 * 2 * 8192**3 / 1e15  # no GPU does a PFLOP/s in float32
