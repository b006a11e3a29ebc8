"""Every exception of Odonata, and the exit code each one ends a process with.

    OdonataError                    a sentence for the user; never a traceback
    ├── ConfigError        exit 2   the run config is wrong: do not retry
    ├── DataError          exit 2   the data set is wrong as a whole: do not retry
    │   └── ClipError               one clip cannot be read; the loader replaces it and counts it
    ├── CheckpointError    exit 2   no checkpoint fits this run: do not retry
    ├── RefusedError       exit 3   another writer holds the run: do not retry
    ├── DivergedError      exit 2   too many non-finite steps in a row: do not retry
    └── RetryError         exit 75  start the same job again: it resumes
        ├── PreemptedError          SIGTERM or SIGINT came; the state is saved
        ├── StoreError              the store does not answer, or has no room (trainer/store)
        └── PeerLostError           another rank vanished or hangs

A message has four parts: what was asked, what was found, what would do, what to change. Exceptions are for the world,
`assert` is for our own slips. They are caught in two places: `odonata/door.py` turns the class into the exit code, and
`trainer.data.loader` turns a ClipError into a replaced clip.

One end is no exception: the watchdog of a rank whose step hangs ends its process with 75 (trainer/watchdog.py).

Left to whom: what Kubernetes does with a code is decided in `k8s/`.
"""

EXIT_DONE = 0
EXIT_DEFECT = 1
EXIT_DO_NOT_RETRY = 2
EXIT_REFUSED = 3
EXIT_RETRY = 75  # EX_TEMPFAIL of sysexits.h


class OdonataError(Exception):
    """The root of the tree; its text is shown to the user as it is."""

    exit_code = EXIT_DEFECT


class ConfigError(OdonataError):
    """The run config cannot be run."""

    exit_code = EXIT_DO_NOT_RETRY


class DataError(OdonataError):
    """The data set cannot be used as a whole."""

    exit_code = EXIT_DO_NOT_RETRY


class ClipError(DataError):
    """One clip cannot be read; `clip` is its name, so that a log line can name it."""

    def __init__(self, clip: str, reason: str) -> None:
        super().__init__(f"clip {clip}: {reason}")
        self.clip = clip
        self.reason = reason

    def __reduce__(self) -> tuple[type["ClipError"], tuple[str, str]]:
        """Two arguments make one message: without this, an error from a loader worker cannot be unpickled."""
        return type(self), (self.clip, self.reason)


class CheckpointError(OdonataError):
    """No stored checkpoint can be used as asked."""

    exit_code = EXIT_DO_NOT_RETRY


class RefusedError(OdonataError):
    """The run has another writer."""

    exit_code = EXIT_REFUSED


class DivergedError(OdonataError):
    """The loss or the gradients were not finite for too many steps in a row."""

    exit_code = EXIT_DO_NOT_RETRY


class RetryError(OdonataError):
    """Nothing is wrong with the job: start it again and it resumes."""

    exit_code = EXIT_RETRY


class PreemptedError(RetryError):
    """A signal asked the run to stop, and it stopped with its state saved."""


class PeerLostError(RetryError):
    """Another rank is gone or does not answer."""
