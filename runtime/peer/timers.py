"""One timer of the loop for all deadlines of a process: a handle per call would cost more than the call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from runtime.peer.calls import Deadlines, Limited


class Timers:
    """Calls `due(item)` on the loop when the deadline of an item has passed."""

    def __init__(self, loop: asyncio.AbstractEventLoop, due: Callable[[Limited], None]) -> None:
        self._loop = loop
        self._due = due
        self._deadlines = Deadlines()
        self._handle: asyncio.TimerHandle | None = None

    def add(self, item: Limited) -> None:
        """Watch `item`, whose `deadline` (loop time) is set."""
        assert item.deadline is not None
        self._deadlines.add(item)
        if self._handle is None or item.deadline < self._handle.when():
            self._arm()

    def forget(self, item: Limited) -> None:
        """`item` is over. The timer stays: what fires early costs less than setting it anew."""
        self._deadlines.forget(item)

    def close(self) -> None:
        """Nothing is due any more."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _arm(self) -> None:
        when = self._deadlines.next()
        if self._handle is not None:
            self._handle.cancel()
        self._handle = None if when is None else self._loop.call_at(when, self._fire)

    def _fire(self) -> None:
        self._handle = None
        for item in self._deadlines.due(self._loop.time()):
            self._due(item)
        self._arm()
