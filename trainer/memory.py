"""How much memory this process takes, and took at its peak: of the GPU where there is one, and of the host."""

import resource
from pathlib import Path

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Bytes at the highest point since the process started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def memory_now(device: torch.device) -> dict[str, int]:
    """Bytes by kind: resident in the host, and allocated and reserved by torch on a GPU."""
    host = {"host": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()}
    if device.type != "cuda":
        return host
    return host | {"allocated": torch.cuda.memory_allocated(device), "reserved": torch.cuda.memory_reserved(device)}
