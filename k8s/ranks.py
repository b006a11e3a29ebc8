"""What the ranks of a pod tell the entrypoint that waits for them: that they began, and the exit code that they end with.

`accelerate launch` and torchrun turn every code of a worker into 1, so each rank writes its own into a file of a folder that the
entrypoint made for this start and named in the environment:

    FOLDER/3        of local rank 3: its process, and once it ended, its exit code and the sentence of its error

torchrun's agent kills what is left of a node 30 s after the first rank that ended with another code than 0. Ranks that were asked to stop
do not end together, since one of them commits the checkpoint; so each stays until all others of its node have told their code.
Ranks that have lost a peer stay for nobody: others may find out by their end.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import EXIT_DEFECT, EXIT_DONE, OdonataError, PreemptedError

FOLDER_VARIABLE = "ODONATA_RANKS"
_LONGEST_WAIT_S = 1800.0
"""For ranks of the same node; longer than any grace period, after which the pod is killed as a whole."""
_POLL_S = 0.1


@dataclass(frozen=True)
class Rank:
    """What one rank told last."""

    local_rank: int
    pid: int
    code: int | None
    words: str = ""
    """The sentence of the error that it ended with, in one line."""

    @property
    def ended_silently(self) -> bool:
        """Whether it is gone without a word, as a kill for want of memory ends it."""
        return self.code is None and not _is_alive(self.pid)


@contextmanager
def telling_the_pod(environ: Mapping[str, str]) -> Iterator[None]:
    """Tell an entrypoint, where there is one, how the block ends; SystemExit and exceptions go on."""
    folder, local_rank = environ.get(FOLDER_VARIABLE), environ.get("LOCAL_RANK")
    if folder is None or local_rank is None:
        yield
        return
    place = Path(folder) / local_rank
    _write(place, None)
    try:
        yield
    except SystemExit as ended:
        cause = ended.__context__
        code = ended.code if isinstance(ended.code, int) else EXIT_DEFECT if ended.code else EXIT_DONE
        _write(place, code, str(cause) if isinstance(cause, OdonataError) else "")
        if isinstance(cause, PreemptedError):
            _wait_for_others(Path(folder))
        raise
    except BaseException as error:
        _write(place, EXIT_DEFECT, f"{type(error).__name__}: {error}")
        raise
    _write(place, EXIT_DONE)


def read_ranks(folder: Path) -> list[Rank]:
    """What all ranks that have begun told last, by local rank."""
    ranks = []
    for place in folder.iterdir():
        if place.name.isdigit():
            pid, code, words = [*place.read_text().split(" ", 2), "", ""][:3]
            ranks.append(Rank(int(place.name), int(pid), int(code) if code else None, words))
    return sorted(ranks, key=lambda rank: rank.local_rank)


def _wait_for_others(folder: Path) -> None:
    deadline = time.monotonic() + _LONGEST_WAIT_S
    while any(rank.code is None and _is_alive(rank.pid) for rank in read_ranks(folder)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _write(place: Path, code: int | None, words: str = "") -> None:
    unfinished = place.with_suffix(".new")
    unfinished.write_text(f"{os.getpid()}" if code is None else f"{os.getpid()} {code} {' '.join(words.split())}")
    unfinished.replace(place)  # whoever reads meanwhile sees the one or the other


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
