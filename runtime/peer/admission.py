"""Where threads wait while the processes that they call are behind: so memory of both sides stays bounded.

What a thread sends goes to the loop by the mailbox, and is counted in the windows there. So that a quick
thread cannot fill the mailbox before anything is counted, each one waits for the loop once in a while.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence

from runtime.errors import Timeout
from runtime.peer.flow import RECORD_BYTES
from runtime.peer.future import SAY_AFTER_S, current_waiter
from runtime.peer.mailbox import Mailbox
from runtime.peer.outgoing import Caller

logger = logging.getLogger(__name__)

AHEAD_BYTES = 1024**2
"""So much may be on its way to the loop, from all threads together."""


class Admission:
    """Lets threads send. Used from any thread."""

    def __init__(self, mailbox: Mailbox, caller: Caller) -> None:
        self._mailbox = mailbox
        self._caller = caller
        self._lock = threading.Lock()
        self._ahead = 0

    def wait(self, names: Sequence[str], size: int, timeout: float | None) -> None:
        """See `Endpoint.admit`."""
        if current_waiter.get() is not None or asyncio._get_running_loop() is not None:
            return
        with self._lock:
            self._ahead += (size + RECORD_BYTES) * len(names)
            behind = self._ahead > AHEAD_BYTES
            if behind:
                self._ahead = 0
        caller = self._caller
        if behind or any(caller.full(name, size) for name in names):
            self._wait(names, size, timeout)

    def _wait(self, names: Sequence[str], size: int, timeout: float | None) -> None:
        begun = time.monotonic()
        said = False
        while True:
            gate = threading.Event()
            self._mailbox.post(self._caller.when_room, names, size, gate.set)
            while not gate.wait(self._patience(begun, timeout, said)):
                waited = time.monotonic() - begun
                text = f"room for {size} bytes: {self._who(names, size)}"
                if timeout is not None and waited >= timeout:
                    raise Timeout(f"nothing was sent within {timeout:g} s: no {text}", waited)
                said = True
                logger.warning("waiting for %.0f s for %s", waited, text)
            if not any(self._caller.full(name, size) for name in names):
                return

    @staticmethod
    def _patience(begun: float, timeout: float | None, said: bool) -> float | None:
        waited = time.monotonic() - begun
        left = None if timeout is None else max(0.0, timeout - waited)
        if said:
            return left
        say = max(0.0, SAY_AFTER_S - waited)
        return say if left is None else min(say, left)

    def _who(self, names: Sequence[str], size: int) -> str:
        full = [name for name in names if self._caller.full(name, size)]
        return f"{', '.join(full[:8]) or 'nobody'} behind with what was sent before"
