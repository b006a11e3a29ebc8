"""What a rank's machine lacks."""

from pathlib import Path

import pytest
import torch

from tests.trainer.doctor.configs import config_of
from trainer.config.training import ParallelConfig
from trainer.doctor.machine import check_devices, check_disk, check_shared_memory, check_versions
from trainer.parallel.launch import read_launch

EIGHT = read_launch({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "ACCELERATE_USE_FSDP": "false"}, ParallelConfig())


def test_versions_name_what_decides_about_numbers_and_wires() -> None:
    assert f"torch {torch.__version__}" in check_versions().value


def test_a_node_with_fewer_gpus_than_ranks_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    found = check_devices(EIGHT)
    assert found.value == "4 x H100"
    assert found.cure == "start as many ranks a node as it has GPUs, and not 8"


def test_shared_memory_that_is_not_there_matters_where_there_are_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert check_shared_memory(EIGHT, tmp_path / "nothing").cure == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "0.5 GB or more" in check_shared_memory(EIGHT, tmp_path / "nothing").cure  # 8 x 64 MiB


def test_a_cache_that_does_not_fit_on_the_disk_is_named(tmp_path: Path) -> None:
    shards = ["data.kind=shards", "data.datasets=[{uri: s3://bucket/packed}]"]
    cache = f"data.cache={{folder: {tmp_path}/not/yet, size_gb: 1000000000}}"
    found = check_disk(config_of(tmp_path, tmp_path, *shards, cache), tmp_path)
    assert found.cure == f"make room for 1000000000.0 GB in {tmp_path}/not/yet"
    assert f"free in {tmp_path}" in found.value
