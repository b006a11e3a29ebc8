"""Where log lines go: through the console that the progress bar lives on, so that neither tears the other.

On a terminal rich draws the lines above the bar; elsewhere they are plain, one a line, for `kubectl logs` and grep. Ranks
other than 0 say only what is wrong, and say which rank they are. Lines and bar go to stderr: stdout belongs to the answer
of a command.

Left to whom: what is said, and how often, is up to who says it; `progress` has the lines of a run.
"""

import logging
import warnings

from rich.console import Console
from rich.logging import RichHandler

CONSOLE = Console(stderr=True)
"""The one console of this process: with a second one, log lines would be written across the bar."""

_OURS = ("odonata", "trainer", "models", "monitoring", "k8s")
_HANDLER = "odonata"


def configure_logging(rank: int, console: Console = CONSOLE) -> None:
    """Send this process's log lines to `console`; calling it again replaces what the last call did."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.name == _HANDLER]:
        root.removeHandler(handler)
    root.addHandler(_build_handler(rank, console))
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.captureWarnings(True)
    # One process has no process group, and DCP says so at every save.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


def _build_handler(rank: int, console: Console) -> logging.Handler:
    who = f"rank {rank}: " if rank else ""
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S")
        handler.setFormatter(logging.Formatter(f"{who}%(message)s"))
    else:
        handler = logging.StreamHandler(console.file)
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-7s {who}%(message)s"))
    handler.name = _HANDLER
    return handler
