"""What GPUs can do and cost: the numbers of hardware.yaml, which stands beside this file and names its sources.

The only place for them: utilisation divides by the same peak that a plan promises a share of.
"""

from functools import cache
from pathlib import Path

import yaml
from pydantic import Field

from models.config import Section
from trainer.errors import ConfigError


class Gpu(Section):
    """One GPU with its part of a node of eight."""

    device_name: str
    """What torch.cuda.get_device_name contains."""
    bf16_flops: float = Field(gt=0)
    """Operations a second of dense bf16 matrix products with float32 sums."""
    memory_bytes: float = Field(gt=0)
    """HBM."""
    memory_bytes_per_s: float = Field(gt=0)
    """HBM, reading and writing together."""
    nvlink_bytes_per_s: float = Field(gt=0)
    """To the other GPUs of its node, one direction."""
    network_bytes_per_s: float = Field(gt=0)
    """Its network card, one direction."""
    host_bytes_per_s: float = Field(gt=0)
    """To pinned host memory over PCIe, as it is reached: three quarters of the link or more."""
    watts: float = Field(gt=0)
    """Its part of the node's largest draw."""
    cores: int = Field(ge=1)
    """Its part of the node's CPU cores."""
    dollars_per_hour: float = Field(gt=0)
    """Rent, of which there are many."""
    sources: tuple[str, ...] = Field(min_length=1)


@cache
def read_gpus() -> dict[str, Gpu]:
    """All that are known, by name."""
    content = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    return {name: Gpu.model_validate(numbers) for name, numbers in content.items()}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name; ConfigError where it is unknown."""
    gpus = read_gpus()
    if name not in gpus:
        raise ConfigError(
            f"a GPU called {name} was asked for and trainer/hardware.yaml knows {', '.join(gpus)}; take one of these or add it there"
        )
    return gpus[name]
