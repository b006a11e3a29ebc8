"""Python's garbage collector at steps of our choosing, on every rank at the same ones.

Left alone it runs when counts of objects say so: on each rank in another step, and all others wait in that step's collectives. So it
is turned off, what was built before the first step is taken out of its sight, and what training leaves behind is collected
every so many steps by all ranks together.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY_STEPS = 100
_GENERATION = 1
"""Young objects and those that have outlived one collection; older ones are as good as never garbage."""


@contextmanager
def collecting_between_steps() -> Iterator[None]:
    """Leave collecting to `collect_if_due` until the end of the block."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


def collect_if_due(step: int) -> None:
    """Collect after every `EVERY_STEPS`th step."""
    if step % EVERY_STEPS == 0:
        gc.collect(_GENERATION)
