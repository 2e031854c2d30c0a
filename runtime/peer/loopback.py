"""The link from a process to itself: a group's call reaches the caller's own handlers, too.

Records go round by way of the loop, so that a handler never starts inside the call that asks for it,
and buffers are copied, so that caller and handler do not share memory.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from runtime.transport.base import Lane, Link, Record


class Loopback:
    """One end. `pair` makes both; the outbound end is the one to call by."""

    def __init__(
        self,
        peer: str,
        outbound: bool,
        loop: asyncio.AbstractEventLoop,
        received: Callable[[Link, Record], None],
    ) -> None:
        self.peer = peer
        self.lane = Lane.RPC
        self.outbound = outbound
        self._loop = loop
        self._received = received
        self._queue: deque[Record] = deque()
        self._other = self

    @classmethod
    def pair(
        cls,
        peer: str,
        loop: asyncio.AbstractEventLoop,
        received: Callable[[Link, Record], None],
    ) -> tuple[Loopback, Loopback]:
        """The outbound and the inbound end."""
        out, into = cls(peer, True, loop, received), cls(peer, False, loop, received)
        out._other, into._other = into, out
        return out, into

    def send(self, record: Record, ordered: bool = True) -> None:
        if not self._queue:
            self._loop.call_soon(self._deliver)
        header, buffers = record
        self._queue.append(Record(header, [bytearray(buffer) for buffer in buffers]))

    def queued_bytes(self) -> int:
        return sum(len(buffer) for record in self._queue for buffer in record.buffers)

    def close(self) -> None:
        self._queue.clear()

    def _deliver(self) -> None:
        queue, self._queue = self._queue, deque()
        for record in queue:
            self._received(self._other, record)
