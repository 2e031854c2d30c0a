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
        self._when = float("inf")
        """Of the handle."""
        self.forget = self._deadlines.forget
        """`item` is over. The timer stays: what fires early costs less than setting it anew."""

    def add(self, item: Limited) -> None:
        """Watch `item`, whose `deadline` (loop time) is set."""
        self._deadlines.add(item)
        assert item.deadline is not None
        if item.deadline < self._when:
            self._arm()

    def close(self) -> None:
        """Nothing is due any more."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
            self._when = float("inf")

    def _arm(self) -> None:
        when = self._deadlines.next()
        if self._handle is not None:
            self._handle.cancel()
        self._handle = None if when is None else self._loop.call_at(when, self._fire)
        self._when = float("inf") if when is None else when

    def _fire(self) -> None:
        self._handle, self._when = None, float("inf")
        for item in self._deadlines.due(self._loop.time()):
            self._due(item)
        self._arm()
