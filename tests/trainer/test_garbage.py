"""Garbage is collected at steps of our choosing and at no others."""

import gc
import weakref

from trainer.garbage import EVERY_STEPS, collect_if_due, collecting_between_steps


class Ring:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.ring = self


def test_garbage_stays_until_a_step_is_due_and_python_collects_again_afterwards() -> None:
    with collecting_between_steps():
        assert not gc.isenabled()
        left = weakref.ref(Ring())
        collect_if_due(EVERY_STEPS + 1)
        assert left() is not None
        collect_if_due(2 * EVERY_STEPS)
        assert left() is None
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
