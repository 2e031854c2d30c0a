"""One end of a link over ZeroMQ: its state, the records that wait to leave, what ZeroMQ still holds of them."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from runtime.errors import MisuseError, WireError
from runtime.transport.base import Lane, Record
from runtime.transport.outbox import Outbox
from runtime.wire import frames

if TYPE_CHECKING:
    from runtime.transport.router import Router


@dataclass(frozen=True, slots=True)
class SocketSettings:
    """Times in seconds, sizes in bytes."""

    connect_s: float = 5.0
    """How long a dial waits for a peer that does not listen yet."""
    linger_s: float = 1.0
    """How long a link that is closed goes on flushing."""
    high_water: int = 8 * 1024 * 1024
    """So much of a link's large buffers may lie in ZeroMQ; what follows waits here until it is less."""
    batch_bytes: int = 64 * 1024
    """So much is sent at once, without waiting for the end of the loop pass."""
    apart_bytes: int = 64 * 1024
    """Buffers of at least that size are sent and received without a copy."""
    turn_messages: int = 256
    """Messages taken from one socket before other callbacks have their turn."""
    pipe_messages: int = 64
    """Messages that ZeroMQ holds per link and direction before we get EAGAIN."""
    limits: frames.Limits = frames.LIMITS


class Tracker(Protocol):
    """Of a large buffer that was handed to ZeroMQ."""

    @property
    def done(self) -> bool:
        """ZeroMQ has let go of it."""
        ...


class SocketLink:
    """One end of a link. Implements `base.Link`."""

    def __init__(self, router: Router, peer: str, route: bytes, endpoint: str | None) -> None:
        settings = router.settings
        self.peer = peer
        self.lane = Lane.RPC
        self.outbound = endpoint is not None
        self.route = route
        self.endpoint = endpoint
        self.up = endpoint is None
        """Both sides know each other: records may flow."""
        self.ended = False
        self.closing = False
        self.dirty = False
        self.blocked = False
        self.connected = False
        self.flushed = False
        """ZeroMQ has all of it, and is to be given time to write it."""
        self.fd = -1
        self.timer: asyncio.TimerHandle | None = None
        self.outbox = Outbox(settings.batch_bytes, settings.limits)
        self.unsent = 0
        """Bytes of large buffers that ZeroMQ still holds."""
        self.trackers: deque[tuple[Tracker, int]] = deque()
        self._router = router
        self._early = settings.batch_bytes

    def send(self, record: Record, ordered: bool = True) -> None:
        header, buffers = record
        if buffers or len(header) > self._early:
            try:
                size = frames.check_record(record, self._router.settings.limits)
            except WireError as error:
                raise MisuseError(f"too large to be sent to {self.peer}: {error}") from None
        else:
            size = len(header)
        if self.closing or self.ended:
            return
        outbox = self.outbox
        outbox.put(record, size)
        if outbox.queued >= self._early and not self.blocked and self.up:
            self._router.flush(self)
            self._router.look_soon()
        elif not self.dirty:
            self._router.flush_soon(self)

    def queued_bytes(self) -> int:
        self.reap()
        return self.outbox.queued + self.unsent

    def close(self) -> None:
        if not self.closing and not self.ended:
            self.closing = True
            self._router.close_link(self)

    def reap(self) -> None:
        """Forget the large buffers that ZeroMQ has let go of."""
        while self.trackers and self.trackers[0][0].done:
            self.unsent -= self.trackers.popleft()[1]

    def clear(self) -> None:
        """The link has ended."""
        self.up, self.ended = False, True
        self.outbox.clear()
        self.trackers.clear()
        self.unsent = 0
        self.stop_timer()

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
