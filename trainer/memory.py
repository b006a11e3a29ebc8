"""How much memory this process took at its peak: of the GPU where there is one, else of the host."""

import resource

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Bytes at the highest point since the process started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
