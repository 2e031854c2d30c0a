"""The end of a child process, seen through a pidfd: in well under a millisecond and with no thread."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

from runtime.launcher import spawn


class Watch:
    """The end of one child, on the event loop's thread. Reaps the child; never signals a reused pid."""

    def __init__(self, pid: int, ended: Callable[[Watch, spawn.Exit], None]) -> None:
        self.pid = pid
        self.exit: spawn.Exit | None = None
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._pidfd = os.pidfd_open(pid)
        self._loop.add_reader(self._pidfd, self.poll)

    def poll(self) -> spawn.Exit | None:
        """How it ended, if it has; its callback has run then."""
        if self.exit is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else reaped it: we only know that it is gone
                pid, status = self.pid, 0
            if pid == 0:
                return None
            self.exit = spawn.Exit.from_status(status)
            self.close()
            self._ended(self, self.exit)
        return self.exit

    def send_signal(self, number: int) -> None:
        """Signal the process itself; nothing happens when it has ended."""
        if self.exit is None:
            spawn.send_signal(self.pid, number)

    def kill(self) -> None:
        """SIGKILL for the process and for what it has started in its session."""
        if self.exit is None:
            spawn.kill_session(self.pid)
            spawn.send_signal(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Stop watching (the process goes on). Idempotent."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
