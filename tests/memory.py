"""How far this process's memory rises while something runs: the kernel's own high-water mark, nothing sampled.

It counts every page, whoever asked for it: tensors, bytes, buffers of libraries. What a process has freed must go back to the
system, or what it takes next rises above nothing: start it with `RETURNS_MEMORY` in its environment. Linux only.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc asks the system for every block above this many bytes and gives it back; by itself it raises the limit to 32 MB."""

_FORGET_THE_MARK = "5"  # proc(5): the high-water mark becomes what is resident now


class Peak:
    """`extra_bytes` says after the block by how much it rose above what was there before."""

    extra_bytes = 0


@contextmanager
def watching_peak() -> Iterator[Peak]:
    """Watch the block; one at a time."""
    gc.collect()
    peak, before = Peak(), _read("VmRSS")
    Path("/proc/self/clear_refs").write_text(_FORGET_THE_MARK)
    try:
        yield peak
    finally:
        peak.extra_bytes = _read("VmHWM") - before


def _read(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024
