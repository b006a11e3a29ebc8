"""The one table of GPUs."""

import pytest

from trainer.errors import ConfigError
from trainer.hardware import find_gpu, read_gpus


def test_every_gpu_has_sources() -> None:
    assert set(read_gpus()) == {"a100", "h100", "h200", "b200"}
    assert all(source.startswith("https://") for gpu in read_gpus().values() for source in gpu.sources)


def test_products_are_bound_by_memory_only_where_they_are_small() -> None:
    for gpu in read_gpus().values():
        operations_a_byte = gpu.bf16_flops / gpu.memory_bytes_per_s
        assert 100 < operations_a_byte < 400, "else a digit is wrong"


def test_an_unknown_gpu_is_told_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"a GPU called v100 was asked for and .* knows a100, h100, h200, b200"):
        find_gpu("v100")
