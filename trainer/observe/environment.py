"""What a run ran on: versions, revision, hardware and launch, as plain data for environment.json.

Nothing in it names a machine or a person, so that it can be published beside a result.
"""

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

_PACKAGES = ("torch", "accelerate", "xformers", "deepspeed", "numpy", "pillow", "nuscenes-devkit", "pydantic")
_HOME = Path(__file__).resolve().parents[2]


@runtime_checkable
class Place(Protocol):
    """What observers need of `trainer.parallel.launch.Launch`, which they may not see."""

    @property
    def rank(self) -> int: ...
    @property
    def local_rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def local_world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def engine(self) -> str: ...
    @property
    def precision(self) -> str: ...


def describe_environment(place: Place, source: Mapping[str, Any]) -> dict[str, Any]:
    """The environment of this process; `source` is what the training data says of itself."""
    return {
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda}
        | {name: find_version(name) for name in _PACKAGES},
        "revision": describe_revision(_HOME),
        "hardware": {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpus": [_describe_gpu(index) for index in range(torch.cuda.device_count())],
        },
        "launch": {"engine": place.engine, "world_size": place.world_size, "precision": place.precision},
        "data": dict(source),
    }


def describe_revision(folder: Path) -> dict[str, Any] | None:
    """Commit of the code in `folder` and whether files differ from it; none where it is not a checkout (an image)."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None or not (folder / ".git").exists():  # an install inside somebody else's checkout is not ours
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def find_version(package: str) -> str | None:
    """The installed version, if it is installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _describe_gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {"name": properties.name, "memory_bytes": properties.total_memory}
