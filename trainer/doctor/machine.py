"""The machine of a rank: versions, devices, disk and shared memory.

Left to whom: whether ranks agree with each other is `examine`'s.
"""

import platform
import shutil
from pathlib import Path

import torch

from trainer.config.data import NuscenesData, ShardsData
from trainer.config.run import RunConfig
from trainer.doctor.finding import Finding
from trainer.observe.environment import find_version
from trainer.parallel.launch import Launch

VERSIONS = "versions"
_PACKAGES = ("torch", "accelerate", "xformers", "deepspeed", "numpy")
_NCCL_BYTES = 64 * 2**20
"""Of /dev/shm for each rank: NCCL's buffers between the GPUs of a node, with room to spare."""
_SHM = Path("/dev/shm")
_TEMPORARY_BYTES = 2e9
"""Journals and the index of a data set."""


def check_versions() -> Finding:
    """Python, packages, CUDA, NCCL and driver; that all ranks say the same is looked at where all are heard."""
    versions = {"python": platform.python_version()} | {name: find_version(name) for name in _PACKAGES}
    if torch.cuda.is_available():
        driver = Path("/sys/module/nvidia/version")
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        versions |= {"CUDA": torch.version.cuda, "NCCL": nccl, "driver": driver.read_text().strip() if driver.exists() else None}
    return Finding(VERSIONS, ", ".join(f"{name} {version}" for name, version in versions.items() if version))


def check_devices(launch: Launch) -> Finding:
    """A GPU for each rank of this node, or none at all."""
    count = torch.cuda.device_count()
    if not count:
        return Finding("devices", "no GPU: training on CPUs")
    found = f"{count} x {torch.cuda.get_device_name(0)}"
    if count < launch.local_world_size:
        return Finding("devices", found, f"start as many ranks a node as it has GPUs, and not {launch.local_world_size}")
    return Finding("devices", found)


def check_shared_memory(launch: Launch, folder: Path = _SHM) -> Finding:
    """Room for what NCCL keeps in /dev/shm; without GPUs nothing of ours lies there."""
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    needed = _NCCL_BYTES * launch.local_world_size if torch.cuda.is_available() else 0
    cure = f"give /dev/shm {_say_bytes(needed)} or more (shared_memory of the cluster config)" if free < needed else ""
    return Finding("shared memory", f"{_say_bytes(free)} free in {folder}", cure)


def check_disk(config: RunConfig, temporary: Path) -> Finding:
    """Room for what a rank writes to its own disk: the cache of shards, and the index and journals."""
    needs = {temporary: _TEMPORARY_BYTES}
    if isinstance(config.data, NuscenesData | ShardsData) and config.data.index_folder:
        needs[config.data.index_folder] = _TEMPORARY_BYTES
    if isinstance(config.data, ShardsData) and config.data.cache:
        needs[config.data.cache.folder] = config.data.cache.size_gb * 1e9
    free = {folder: shutil.disk_usage(_find_existing(folder)).free for folder in needs}
    short = [f"{_say_bytes(needs[folder])} in {folder}" for folder in needs if free[folder] < needs[folder]]
    found = ", ".join(f"{_say_bytes(count)} free in {folder}" for folder, count in free.items())
    return Finding("disk", found, f"make room for {' and '.join(short)}" if short else "")


def _find_existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())


def _say_bytes(count: int | float) -> str:
    return f"{count / 1e9:.1f} GB"
