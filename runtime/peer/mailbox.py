"""How other threads talk to the peer loop: in order, and with one wake-up for many messages.

Waking a loop costs a system call, so it is done only when the mailbox was empty.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from runtime.errors import Closed

logger = logging.getLogger(__name__)


class Mailbox:
    """Work for the loop from any thread. Made on the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._thread = threading.get_ident()
        self._queue: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._woken = False
        self.delivering = False
        """Does what runs on the loop now come from another thread?"""

    def on_loop_thread(self) -> bool:
        """Is the caller on the loop's own thread?"""
        return threading.get_ident() == self._thread

    def post(self, work: Callable[..., None], *args: Any) -> None:
        """Run `work(*args)` on the loop, after everything posted before it. Raises `Closed` when the
        loop is closed."""
        self._queue.append((work, args))
        if not self._woken:
            self._woken = True
            try:
                self.loop.call_soon_threadsafe(self._deliver)
            except RuntimeError as error:
                raise Closed("the peer loop of this process has been closed") from error

    def _deliver(self) -> None:
        # The flag goes down first: whoever appends after this line wakes the loop again, whoever
        # appended before it is found below.
        self._woken = False
        queue = self._queue
        self.delivering = True
        for _ in range(len(queue)):
            work, args = queue.popleft()
            try:
                work(*args)
            except Exception:  # what one message does wrong must not keep back the others
                logger.exception("%r failed on the peer loop", work)
        self.delivering = False
        if queue and not self._woken:
            self._woken = True
            self.loop.call_soon(self._deliver)
