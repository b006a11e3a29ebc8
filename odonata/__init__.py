"""The `odonata` command: the one public door, and the only reader of arguments and of the environment.

Each command is one call into a room below; imports wait until a command needs them, so that `odonata config` starts
without torch. A module's commands join `app` when it is imported, in the order in which `odonata --help` shows them.
"""

from odonata import runs, data, plan, cluster, jobs, encoders, checkpoints  # noqa: I001  (the order of --help)
from odonata.app import app
from odonata.door import main

__all__ = ["app", "checkpoints", "cluster", "data", "encoders", "jobs", "main", "plan", "runs"]
