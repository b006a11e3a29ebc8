"""The `odonata` command: the one public door, and the only reader of arguments and of the environment.

Each command is one call into a room below; imports wait until a command needs them, so that `odonata config` starts
without torch. `door` opens it; a module for each group of commands, with what they share in `app` and `printing`.
"""
