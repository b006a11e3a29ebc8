"""From the shell to a command and back to an exit code.

Here alone an exception becomes an exit code that Kubernetes can act on (trainer/errors.py): an OdonataError is a sentence on stderr.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

from k8s.ranks import telling_the_pod
from odonata.app import app
from trainer.errors import EXIT_RETRY, ConfigError, OdonataError

# isort: off
# Their commands join `app` in this order, in which --help shows them.
from odonata import runs, data, plan, cluster, jobs, encoders, probing, checkpoints  # noqa: F401


def main() -> None:
    """Run the command line, as one rank of a pod or alone."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end_at_once)  # until a training run has begun, which ends with its step
    with telling_the_pod(os.environ):
        _run_command()


def _run_command() -> None:
    """The only place where an exception becomes an exit code."""
    try:
        check_imports_are_ours()
        app()
    except OdonataError as error:
        print(f"odonata: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if _is_peer_loss(error):
            print(f"odonata: another rank is gone; start the same job again and it resumes ({error})", file=sys.stderr)
            sys.exit(EXIT_RETRY)
        raise


def _end_at_once(number: int, frame: FrameType | None) -> None:
    """No OdonataError: wherever the signal comes, logging and whoever guards monitors swallow exceptions, and SystemExit is none."""
    del frame
    name = signal.Signals(number).name
    os.write(
        sys.stderr.fileno(), f"odonata: stopped by {name}; start the same command again: what was finished is kept\n".encode()
    )
    raise SystemExit(EXIT_RETRY)


def check_imports_are_ours() -> None:
    """Our packages have short names: end with a sentence when another project's `models` shadows ours."""
    from importlib.util import find_spec

    home = Path(__file__).resolve().parents[1]
    for name in ("trainer", "models", "monitoring"):
        spec = find_spec(name)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found is None or found.parent.parent != home:
            raise ConfigError(
                f"the package {name} should come from {home / name} and comes from {found}; "
                "start from another folder or take the intruder off PYTHONPATH"
            )


def _is_peer_loss(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return False
    from trainer.parallel.launch import is_peer_loss

    return is_peer_loss(error)
