"""The engine of one ROUTER socket: receives and sends what there is, turn by turn. Knows no zmq (see `sockets`).

A socket's FD is edge-triggered: it fires when libzmq has news, which every call into it may swallow. So after each
send and each receive we ask for what is there, and go on until there is nothing, at most for `turn_s`: then the loop
gets its turn, and with it the other sockets. The bound one takes messages from its connections in turn, so that small
ones of the control lane wait for one piece of a large buffer at most. The first record of a pass of the loop leaves at
once (a lone call must not wait for the loop), those after it leave as one message per link, and so do those sent
while we receive. A link whose peer does not keep up gets EAGAIN, keeps its records and tries again when the socket has
news. What messages mean, and when links begin and end, is `router`'s business.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from runtime.errors import WireError
from runtime.transport.address import Address
from runtime.transport.base import Lane, Receiver, Record
from runtime.transport.link import SocketLink, SocketSettings
from runtime.wire import frames

if TYPE_CHECKING:
    from runtime.transport.sockets import RouterSocket

_log = logging.getLogger(__name__)

_CARRIERS = frozenset({frames.DATA, frames.LOOSE, frames.SPLIT, frames.PIECE})
_NUDGE_S = 0.002
_SILENT_S = 60.0


class Hub:
    """What the routers of a transport share: who we are, whom to tell, what is counted."""

    def __init__(
        self,
        peer: str,
        settings: SocketSettings,
        receiver: Receiver,
        dial: Callable[[str, Address, Lane], SocketLink],
    ) -> None:
        self.peer = peer
        self.dial = dial
        self.settings = settings
        self.received = receiver.received
        self.lost = receiver.link_lost
        self.counts: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self._silent_until: dict[str, float] = {}
        self.refused = 0
        """Connections that are about to end for their key, and are counted."""
        self.gone = asyncio.Event()
        """Set whenever a link has ended."""

    def count_rejected(self, who: str, error: WireError) -> None:
        """Logged once a minute for each reason."""
        self.rejected[error.reason] += 1
        now = asyncio.get_running_loop().time()
        if now >= self._silent_until.get(error.reason, now):
            self._silent_until[error.reason] = now + _SILENT_S
            text = "%s: dropped the connection of %s: %s (%d like it so far; logged once a minute)"
            _log.warning(text, self.peer, who, error, self.rejected[error.reason])

    def refuse(self, source: str) -> None:
        """Somebody at that IP address has a key that is not allowed."""
        self.refused += 1
        self.count_rejected(source, WireError("unknown key", "it is not one of this job's"))

    def count_silent(self, endpoint: str) -> None:
        """A connection has ended that never said who it is."""
        if self.refused:
            self.refused -= 1
        else:
            error = WireError("no handshake", "it did not, or could not, say who it is")
            self.count_rejected(f"a stranger who came to {endpoint}", error)


class Engine(ABC):
    """One ROUTER socket and its links by routing id."""

    strangers = False
    """Whether messages of unknown connections are looked at."""

    def __init__(self, hub: Hub, socket: RouterSocket) -> None:
        self.hub = hub
        self.settings = hub.settings
        self.socket = socket
        self.links: dict[bytes, SocketLink | None] = {}
        """None: a connection that we dropped and ignore from now on."""
        self.loop = asyncio.get_running_loop()
        self._dirty: list[SocketLink] = []
        self.blocked: set[SocketLink] = set()
        self._pumping = False
        self._flush_handle: asyncio.Handle | None = None
        self._nudge_handle: asyncio.TimerHandle | None = None
        self._again_handle: asyncio.Handle | None = None

    def start(self) -> None:
        self.loop.add_reader(self.socket.fd, self.pump)
        self.pump()

    def stop(self, linger_s: float) -> None:
        self.loop.remove_reader(self.socket.fd)
        for handle in (self._flush_handle, self._nudge_handle, self._again_handle):
            if handle is not None:
                handle.cancel()
        for link in self.living():
            link.clear()
        self.socket.close(linger_s)

    def living(self) -> list[SocketLink]:
        return [link for link in self.links.values() if link is not None]

    # receiving

    def pump(self) -> None:
        """Receive and send until there is nothing to do, or this turn is over."""
        again, self._again_handle = self._again_handle, None
        if again is not None:
            again.cancel()
        time = self.loop.time
        until, alone = time() + self.settings.turn_s, True
        self._pumping = True
        while True:
            # The answers to the first message do not wait for the others.
            while self._receive() and not alone and time() < until:
                pass
            alone = False
            if self._dirty:
                self._flush_dirty()
            if not self.socket.readable() and not self._retry_blocked():
                break
            if time() >= until:
                self._again_handle = self.loop.call_soon(self.pump)
                break
        self._pumping = False
        self.turn_over(drained=self._again_handle is None)

    def pump_soon(self) -> None:
        if self._again_handle is None:
            self._again_handle = self.loop.call_soon(self.pump)

    def _receive(self) -> bool:
        """Take one message; False when there is none."""
        message = self.socket.receive()
        if message is None:
            return False
        route, parts = message
        link = self.links.get(route)
        if link is None and (route in self.links or not self.strangers):
            return True  # dropped before
        try:
            batch = frames.decode_batch(parts, self.settings.limits)
            if batch.kind in _CARRIERS and link is not None and link.up:
                counts = self.hub.counts
                counts["messages_in"] += 1
                counts["bytes_in"] += sum(map(len, parts))
                if batch.kind == frames.DATA and link.plain:
                    self.deliver(link, batch.records)
                else:
                    self.arrived(link, batch)
            else:
                self.handshake(link, route, batch)
        except WireError as error:
            self.reject(link, route, error)
        return True

    def deliver(self, link: SocketLink, records: list[Record]) -> None:
        self.hub.counts["records_in"] += len(records)
        received = self.hub.received
        for record in records:
            if link.closing or link.ended:
                return
            try:
                received(link, record)
            except Exception:  # noqa: BLE001 - a bug of the receiver must not stop the socket for all
                _log.exception("the receiver of records from %s raised", link.peer)

    @abstractmethod
    def handshake(self, link: SocketLink | None, route: bytes, batch: frames.Batch) -> None:
        """A message about a link came in. `link`: None from a stranger. May raise `WireError`."""

    @abstractmethod
    def arrived(self, link: SocketLink, batch: frames.Batch) -> None:
        """Records came in whose large buffers travel apart, such buffers, or what may be behind them."""

    @abstractmethod
    def reject(self, link: SocketLink | None, route: bytes, error: WireError) -> None:
        """End a connection for what it sent."""

    @abstractmethod
    def connection_lost(self, link: SocketLink, reason: str) -> None: ...

    @abstractmethod
    def flushed(self, link: SocketLink) -> None:
        """ZeroMQ has taken all that the link could send."""

    @abstractmethod
    def turn_over(self, drained: bool) -> None:
        """`drained`: nothing is left to be read."""

    # sending

    def flush_soon(self, link: SocketLink) -> None:
        if self.look_soon() and not link.blocked:
            self.flush(link)
        else:
            link.dirty = True
            self._dirty.append(link)

    def look_soon(self) -> bool:
        """Flush at the end of this pass, and see what came: any call into the socket may have swallowed the
        FD's news. True when nobody asked for that in this pass before."""
        if self._flush_handle is not None or self._pumping:
            return False
        self._flush_handle = self.loop.call_soon(self._flush_and_look)
        return True

    def _flush_and_look(self) -> None:
        self._flush_handle = None
        self._flush_dirty()
        if self.socket.readable() or self.blocked:
            self.pump()

    def _flush_dirty(self) -> None:
        dirty, self._dirty = self._dirty, []
        for link in dirty:
            link.dirty = False
            if not link.blocked:
                self.flush(link)

    def flush(self, link: SocketLink) -> None:
        """Hand the link's records to ZeroMQ, as far as it takes them."""
        queue = link.queue
        while queue.queued and link.up:
            if link.unsent > self.settings.high_water:
                link.reap()
            if link.unsent > self.settings.high_water or not self._open(link):
                self.block(link)
                return
            message = queue.message()
            for tracker, length in self.socket.finish(message.parts):
                link.trackers.append((tracker, length))
                link.unsent += length
                self._nudge()
            counts = self.hub.counts
            counts["messages_out"] += 1
            counts["records_out"] += message.records
            counts["bytes_out"] += message.size
            queue = link.queue
        if link.blocked:
            link.blocked = False
            self.blocked.discard(link)
        self.flushed(link)

    def _open(self, link: SocketLink) -> bool:
        """Begin a message to the link's peer; False when its pipe is full, or the link is gone."""
        try:
            return self.socket.begin(link.route)
        except ConnectionError as error:
            self.connection_lost(link, f"connection lost: {error}")
            return False

    def block(self, link: SocketLink) -> None:
        if link.up:
            link.blocked = True
            self.blocked.add(link)
            self._nudge()

    def _retry_blocked(self) -> bool:
        """True when some of them could send again (and the socket is to be asked again)."""
        if not self.blocked:
            return False
        before = len(self.blocked)
        for link in list(self.blocked):
            self.flush(link)
        return len(self.blocked) < before

    def _nudge(self) -> None:
        """Look again in a moment: nothing tells when ZeroMQ has let go of a buffer."""
        if self._nudge_handle is None:
            self._nudge_handle = self.loop.call_later(_NUDGE_S, self._on_nudge)

    def _on_nudge(self) -> None:
        self._nudge_handle = None
        waiting = False
        for link in self.links.values():
            if link is not None and link.trackers:
                link.reap()
                waiting = waiting or bool(link.trackers)
        self.pump()
        if waiting or self.blocked:
            self._nudge()

    def say(self, route: bytes, kind: int, *texts: str) -> bool:
        """Send a message about the link itself; False when the peer's pipe is full or gone."""
        self.look_soon()
        records = [Record(text.encode("utf-8", "replace")[:4096]) for text in texts]
        try:
            if not self.socket.begin(route):
                return False
        except ConnectionError:
            return False
        self.socket.finish(frames.encode_batch(records, kind))
        return True
