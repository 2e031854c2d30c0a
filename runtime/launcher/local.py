"""An agent on this host: starting it before anything is known about its job.

The agent reads frames from its standard input and writes frames to its standard output; standard error
is the launcher's own. Its interpreter starts while the launcher reads options and files, so nothing
heavy is imported here.
"""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

from runtime.launcher import spawn


class LocalAgent(NamedTuple):
    """A started agent: its process and our ends of its pipes."""

    pid: int
    read_fd: int
    write_fd: int


def start_agent(python: str = sys.executable) -> LocalAgent:
    """Start an agent, which then waits for its assignment. Raises `OSError`."""
    down_read, down_write = os.pipe()
    up_read, up_write = os.pipe()
    # Its fork server starts before it has imported anything itself.
    code = spawn.bootstrap("runtime.agent", first="runtime.launcher.zygote:start_first")
    try:
        pid = spawn.start(
            [python, "-c", code], streams=spawn.Streams(stdin=down_read, stdout=up_write)
        )
    except OSError:
        os.close(down_write)
        os.close(up_read)
        raise
    finally:
        os.close(down_read)
        os.close(up_write)
    return LocalAgent(pid, up_read, down_write)
