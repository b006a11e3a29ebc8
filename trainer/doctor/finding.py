"""What a check has found."""

from collections.abc import Callable
from dataclasses import dataclass

from trainer.errors import OdonataError, RetryError


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at on one rank."""

    name: str
    value: str
    """What was found."""
    cure: str = ""
    """What to change; empty where all is well."""
    may_pass: bool = False
    """It may be well at another time, with nothing changed."""


def look(name: str, check: Callable[[], Finding]) -> Finding:
    """The finding of `check`, or of the error that it ends with: its last part says what to change."""
    try:
        return check()
    except OdonataError as error:
        found, _, cure = str(error).rpartition("; ")
        return Finding(name, found, cure, may_pass=isinstance(error, RetryError))
