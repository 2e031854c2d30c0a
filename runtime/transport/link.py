"""One end of a link over ZeroMQ: its state, the records that wait to leave, what ZeroMQ still holds of them."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from runtime.errors import MisuseError, WireError
from runtime.transport.address import Address
from runtime.transport.base import Lane, Record
from runtime.transport.bulk import Arrivals, Departures, split
from runtime.transport.outbox import Outbox
from runtime.transport.security import Security
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
    bulk_bytes: int = 1024 * 1024
    """Buffers of at least that size travel in pieces, on a bulk link beside the link of their record."""
    piece_bytes: int = 1024 * 1024
    """Size of those pieces."""
    turn_s: float = 0.002
    """How long one socket is busy before other callbacks (and sockets) have their turn."""
    pipe_messages: int = 4
    """Messages that ZeroMQ holds per link until they are written. Few, since the socket tells at once when there is
    room for more, and memory that is used again is warm."""
    unread_messages: int = 16
    """Messages that ZeroMQ holds per link until we take them."""
    limits: frames.Limits = frames.LIMITS
    security: Security | None = None
    """Keys for tcp://, which nothing goes over unencrypted; None: this process has no tcp:// links."""
    accept_from: tuple[str, ...] = ()
    """IP addresses that tcp:// connections are taken from, others are closed unread; empty: from everywhere."""
    ports: tuple[int, int] | None = None
    """Lowest and highest port that stand for tcp port 0; None: any that the kernel has."""
    insecure: bool = False
    """Allow tcp:// without keys. For measurements."""


def reached_by(
    ipc: str,
    host: str,
    keys: tuple[bytes, bytes, frozenset[bytes]] | None,
    accept_from: tuple[str, ...],
    ports: tuple[int, int] | None,
) -> tuple[str, SocketSettings | None]:
    """Where a process of a job is to listen, and its settings: at `ipc`, and by TCP at the IP address `host` where there
    is one. `keys`: a `Security`, as plain data."""
    if not host:
        return ipc, None
    security = Security(*keys) if keys else None
    settings = SocketSettings(security=security, accept_from=accept_from, ports=ports)
    return f"{ipc} {Address('tcp', host)}", settings


class Tracker(Protocol):
    """Of a large buffer that was handed to ZeroMQ."""

    @property
    def done(self) -> bool:
        """ZeroMQ has let go of it."""
        ...


class Timed:
    """What a link of any kind waits for."""

    timer: asyncio.TimerHandle | None = None

    def expect(self, seconds: float, late: Callable[[], None], steps: int = 4) -> None:
        """Call `late` unless the timer is stopped by then. A loop that is busy all the while has not looked: so in
        steps."""
        if steps == 0:
            late()
        else:
            loop = asyncio.get_running_loop()
            self.timer = loop.call_later(seconds / 4, self.expect, seconds, late, steps - 1)

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class SocketLink(Timed):
    """One end of a link. Implements `base.Link`."""

    def __init__(
        self, router: Router, peer: str, route: bytes, lane: Lane, endpoint: Address | None = None
    ) -> None:
        settings = router.settings
        self.peer = peer
        self.lane = lane
        self.outbound = endpoint is not None
        self.route = route
        self.endpoint = endpoint
        self.where = endpoint.endpoint if endpoint is not None else ""
        """Where it leads to, as ZeroMQ and messages say it."""
        self.router = router
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
        self.unsent = 0
        """Bytes of large buffers that ZeroMQ still holds."""
        self.trackers: deque[tuple[Tracker, int]] = deque()
        self.mate: SocketLink | None = None
        """Of an rpc link: the bulk link that its large buffers take. Of a bulk link: the other way round."""
        self.departures = Departures(settings.piece_bytes)
        self.pieces: Departures | None = None
        """Of a bulk link: what it is to send, the departures of its mate."""
        self.outbox = Outbox(settings.batch_bytes, settings.limits, departures=self.departures)
        self.loose = Outbox(
            settings.batch_bytes, settings.limits, departures=self.departures, ordered=False
        )
        """Unordered records that need not wait for the large buffers of others."""
        self.plain = lane is not Lane.BULK
        """Records are delivered as they come: none has come in parts yet."""
        self.arrivals: Arrivals | None = None
        """Made when the first record comes in parts."""
        self.last_words: str | None = None
        """The peer has closed the link; what is still on its bulk link comes first."""
        self._early = settings.batch_bytes
        self._bulk_bytes = settings.bulk_bytes if lane is Lane.RPC else sys.maxsize

    def send(self, record: Record, ordered: bool = True) -> None:
        header, buffers = record
        if buffers or len(header) > self._early:
            try:
                size = frames.check_record(record, self.router.settings.limits)
            except WireError as error:
                raise MisuseError(f"too large to be sent to {self.peer}: {error}") from None
        else:
            size = len(header)
        if self.closing or self.ended:
            return
        if size >= self._bulk_bytes and self._send_split(record, size, ordered):
            return
        outbox = self.outbox if ordered or not self.departures.total else self.loose
        outbox.put(record, size)
        if outbox.queued >= self._early and not self.blocked and self.up:
            self.router.flush(self)
            self.router.look_soon()
        elif not self.dirty:
            self.router.flush_soon(self)

    def _send_split(self, record: Record, size: int, ordered: bool) -> bool:
        item = split(record, self._bulk_bytes)
        if item is None:
            return False
        (self.outbox if ordered else self.loose).put_split(item, size)
        if not self.dirty:
            self.router.flush_soon(self)
        return True

    @property
    def queue(self) -> Outbox | Departures:
        """Where the next message comes from."""
        if self.pieces is not None:
            return self.pieces
        return self.loose if self.loose.queued else self.outbox

    def join(self, bulk: SocketLink) -> None:
        """`bulk` takes our large buffers from now on, and brings those of the other side."""
        self.mate, bulk.mate = bulk, self
        bulk.pieces = self.departures

    def arriving(self) -> Arrivals:
        if self.arrivals is None:
            self.arrivals = Arrivals(self.router.settings.limits)
            self.plain = False
        return self.arrivals

    def is_flushed(self) -> bool:
        return not (self.outbox.queued or self.loose.queued or self.departures.total)

    def queued_bytes(self) -> int:
        self.reap()
        queued = self.outbox.queued + self.loose.queued + self.departures.total + self.unsent
        if self.mate is not None:
            self.mate.reap()
            queued += self.mate.unsent
        return queued

    def close(self) -> None:
        if not self.closing and not self.ended:
            self.closing = True
            self.router.close_link(self)

    def reap(self) -> None:
        """Forget the large buffers that ZeroMQ has let go of."""
        while self.trackers and self.trackers[0][0].done:
            self.unsent -= self.trackers.popleft()[1]

    def clear(self) -> None:
        """The link has ended."""
        self.up, self.ended = False, True
        self.forget_queued()
        self.arrivals = None
        self.trackers.clear()
        self.unsent = 0
        self.stop_timer()

    def forget_queued(self) -> None:
        for queue in (self.outbox, self.loose, self.departures):
            queue.clear()


def texts(batch: frames.Batch, count: int) -> list[str]:
    """What a message about a link says: so many short texts."""
    if len(batch.records) != count or any(record.buffers for record in batch.records):
        raise WireError("malformed handshake", f"{len(batch.records)} records")
    try:
        return [record.header.decode() for record in batch.records]
    except UnicodeDecodeError as error:
        raise WireError("malformed handshake", str(error)) from None
