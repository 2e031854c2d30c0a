"""The two routers of a process: how links over ZeroMQ are made, used and ended. Knows no zmq (see `sockets`).

A process has two ROUTER sockets: peers dial the bound one, the other one dials. Answers go back on the link that
a question came by, so two peers that dial each other have two links and nothing to sort out. Every dial has routing
ids of its own, on both sides (ours is "<peer id>#<n>"): libzmq ignores a second connection with an id that it
has, and would abort the process if we named two connections alike.

The making of a link. The dialler says HELLO (who it is, whom it wants), the other side answers WELCOME (who it
is) or BYE (why not). Records wait until then: a link that never came up has delivered nothing. A BYE also ends a
link, and so does the end of the connection, which the socket's monitor reports by its file descriptor; the
descriptor of a link is known from the message that made it. Events of the monitor are older than the message that is read
after them, but what the dead peer had sent may still lie in the socket: a link is ended once that is drained.

The engine. A socket's FD is edge-triggered: it fires when libzmq has news, which every call into it may swallow.
So after each send and each receive we ask for what is there, and go on until there is nothing. At most `turn_messages`
a turn, then the loop gets its turn. The first record of a pass of the loop leaves at once (a lone call must not wait
for the loop), those after it leave as one message per link, and so do those sent while we receive. A link whose
peer does not keep up gets EAGAIN, keeps its records and tries again when the socket has news.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import Counter
from typing import TYPE_CHECKING

from runtime.errors import WireError
from runtime.transport.base import Buffer, Receiver, Record
from runtime.transport.link import SocketLink, SocketSettings
from runtime.wire import frames

if TYPE_CHECKING:
    from runtime.transport.sockets import RouterSocket

_log = logging.getLogger(__name__)

ACCEPTED, CONNECTED, DISCONNECTED = range(3)
"""What a monitor tells about a connection."""

_NUDGE_S = 0.002
_DRAIN_S = 0.25


class Hub:
    """What the two routers of a transport share: who we are, whom to tell, what is counted."""

    def __init__(self, peer: str, settings: SocketSettings, receiver: Receiver) -> None:
        self.peer = peer
        self.settings = settings
        self.received = receiver.received
        self.lost = receiver.link_lost
        self.counts: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.gone = asyncio.Event()
        """Set whenever a link has ended."""

    def count_rejected(self, who: str, error: WireError) -> None:
        self.rejected[error.reason] += 1
        if self.rejected[error.reason] == 1:
            text = "%s: dropped the connection of %s: %s (others like it are only counted)"
            _log.warning(text, self.peer, who, error)


class Router(ABC):
    """One ROUTER socket, its monitor, its links by routing id. What both sides of a link have in common."""

    strangers = False
    """Whether messages of unknown connections are looked at."""

    def __init__(self, hub: Hub, socket: RouterSocket) -> None:
        self.hub = hub
        self.settings = hub.settings
        self.socket = socket
        self.links: dict[bytes, SocketLink | None] = {}
        """None: a connection that we dropped and ignore from now on."""
        self.by_fd: dict[int, bytes] = {}
        self.linger_s = self.settings.linger_s
        self.loop = asyncio.get_running_loop()
        self._dirty: list[SocketLink] = []
        self._blocked: set[SocketLink] = set()
        self._leaving: dict[SocketLink, tuple[str, float]] = {}
        self._pumping = False
        self._flush_handle: asyncio.Handle | None = None
        self._nudge_handle: asyncio.TimerHandle | None = None
        self._again_handle: asyncio.Handle | None = None

    def start(self) -> None:
        self.loop.add_reader(self.socket.fd, self.pump)
        self.loop.add_reader(self.socket.monitor_fd, self.read_monitor)
        self.pump()
        self.read_monitor()

    def stop(self, linger_s: float) -> None:
        self.loop.remove_reader(self.socket.fd)
        self.loop.remove_reader(self.socket.monitor_fd)
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
        left, step = self.settings.turn_messages, 1
        self._pumping = True
        while left > 0:
            while step > 0 and self._receive():
                step -= 1
                left -= 1
            if self._dirty:
                self._flush_dirty()
            if not self.socket.readable() and not self._retry_blocked():
                self._pumping = False
                if self._leaving:
                    self._finish_leaving(drained=True)
                return
            step = left
        self._pumping = False
        self._finish_leaving(drained=False)
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
            if batch.kind == frames.DATA and link is not None and link.up:
                self._deliver(link, batch.records, parts)
            else:
                self.handshake(link, route, batch)
        except WireError as error:
            self.reject(link, route, error)
        return True

    def _deliver(self, link: SocketLink, records: list[Record], parts: list[Buffer]) -> None:
        counts = self.hub.counts
        counts["messages_in"] += 1
        counts["records_in"] += len(records)
        counts["bytes_in"] += sum(map(len, parts))
        received = self.hub.received
        for record in records:
            if link.closing or link.ended:
                return
            try:
                received(link, record)
            except Exception:  # noqa: BLE001 - a bug of the receiver must not stop the socket for all
                _log.exception("the receiver of records from %s raised", link.peer)

    @abstractmethod
    def handshake(self, link: SocketLink | None, route: bytes, batch: frames.Batch) -> None: ...

    def reject(self, link: SocketLink | None, route: bytes, error: WireError) -> None:
        """End a connection for what it sent."""
        self.hub.count_rejected(link.peer if link else repr(route), error)
        self.say(route, frames.BYE, str(error))
        if link is None:
            self.links[route] = None
            self.bind_fd(route, self.socket.descriptor())
        else:
            link.flushed = True
            self.end(link, f"broke the protocol: {error}")

    def _said_bye(self, link: SocketLink, batch: frames.Batch) -> None:
        if batch.kind != frames.BYE:
            raise WireError("unexpected message", f"kind {batch.kind} on a link that is up")
        self.end(link, _texts(batch, 1)[0][:1000] or "closed by the peer")

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
        if self.socket.readable() or self._blocked:
            self.pump()

    def _flush_dirty(self) -> None:
        dirty, self._dirty = self._dirty, []
        for link in dirty:
            link.dirty = False
            if not link.blocked:
                self.flush(link)

    def flush(self, link: SocketLink) -> None:
        """Hand the link's records to ZeroMQ, as far as it takes them."""
        outbox = link.outbox
        while outbox.queued and link.up:
            if link.unsent > self.settings.high_water:
                link.reap()
            if link.unsent > self.settings.high_water or not self._open(link):
                self._block(link)
                return
            records, size = outbox.take()
            for tracker, length in self.socket.finish(frames.encode_batch(records)):
                link.trackers.append((tracker, length))
                link.unsent += length
                self._nudge()
            counts = self.hub.counts
            counts["messages_out"] += 1
            counts["records_out"] += len(records)
            counts["bytes_out"] += size
        if link.blocked:
            link.blocked = False
            self._blocked.discard(link)
        if link.closing and link.up:
            self.finish_closing(link)

    def _open(self, link: SocketLink) -> bool:
        """Begin a message to the link's peer; False when its pipe is full, or the link is gone."""
        try:
            return self.socket.begin(link.route)
        except ConnectionError as error:
            self._leave(link, f"connection lost: {error}")
            return False

    def _block(self, link: SocketLink) -> None:
        if link.up:
            link.blocked = True
            self._blocked.add(link)
            self._nudge()

    def _retry_blocked(self) -> bool:
        """True when some of them could send again (and the socket is to be asked again)."""
        if not self._blocked:
            return False
        before = len(self._blocked)
        for link in list(self._blocked):
            self.flush(link)
        return len(self._blocked) < before

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
        if waiting or self._blocked:
            self._nudge()

    def say(self, route: bytes, kind: int, *texts: str) -> bool:
        """Send a message about the link itself; False when the peer's pipe is full or gone."""
        records = [Record(text.encode("utf-8", "replace")[:4096]) for text in texts]
        try:
            if not self.socket.begin(route):
                return False
        except ConnectionError:
            return False
        self.socket.finish(frames.encode_batch(records, kind))
        return True

    # ends

    def close_link(self, link: SocketLink) -> None:
        """Flush and end; at the latest after the linger time."""
        link.stop_timer()
        link.timer = self.loop.call_later(self.linger_s, self.drop, link)
        if link.up:
            self.flush(link)
        elif not len(link.outbox):
            self.drop(link)

    def finish_closing(self, link: SocketLink) -> None:
        if self.say(link.route, frames.BYE, "closed by the peer"):
            link.flushed = True
            self.drop(link)
        else:
            self._block(link)

    def drop(self, link: SocketLink) -> None:
        """Forget a link without telling the receiver."""
        if link.ended:
            return
        link.clear()
        self._blocked.discard(link)
        self._leaving.pop(link, None)
        self.forget(link)
        self.hub.gone.set()

    @abstractmethod
    def forget(self, link: SocketLink) -> None: ...

    def end(self, link: SocketLink, reason: str) -> None:
        """The link is lost."""
        if link.ended:
            return
        silent = link.closing
        self.drop(link)
        if not silent:
            self.hub.lost(link, reason)

    def _leave(self, link: SocketLink, reason: str) -> None:
        """The connection is gone; what came by it is still to be read."""
        if not link.ended and link not in self._leaving:
            self._leaving[link] = (reason, self.loop.time() + _DRAIN_S)
            link.outbox.clear()
            if self._again_handle is None:
                self._again_handle = self.loop.call_soon(self.pump)

    def _finish_leaving(self, drained: bool) -> None:
        for link, (reason, deadline) in list(self._leaving.items()):
            if drained or self.loop.time() >= deadline:
                self.end(link, reason)

    # the monitor

    def read_monitor(self) -> None:
        while (event := self.socket.event()) is not None:
            self.on_event(*event)

    def on_event(self, kind: int, fd: int, endpoint: str) -> None:
        if kind != DISCONNECTED:
            return
        route = self.by_fd.pop(fd, None)
        if route is None:
            return
        link = self.links.get(route)
        if link is not None:
            self._leave(link, "connection lost")
        else:
            self.links.pop(route, None)

    def bind_fd(self, route: bytes, fd: int) -> None:
        """From now on the end of connection `fd` is the end of what is at `route`."""
        if self.by_fd.get(fd, route) != route:  # taken by a new connection: the old one has ended
            self.on_event(DISCONNECTED, fd, "")
        if fd >= 0:
            self.by_fd[fd] = route


class Listener(Router):
    """The bound socket: links that others make."""

    strangers = True

    def __init__(self, hub: Hub, socket: RouterSocket) -> None:
        super().__init__(hub, socket)
        self._peers: dict[str, SocketLink] = {}
        self._alive: set[int] = set()

    def handshake(self, link: SocketLink | None, route: bytes, batch: frames.Batch) -> None:
        if link is not None:
            self._said_bye(link, batch)
            return
        if batch.kind != frames.HELLO:
            raise WireError("no hello", f"kind {batch.kind} came first")
        peer, wanted = _texts(batch, 2)
        fd = self.socket.descriptor()
        self.read_monitor()
        if fd not in self._alive:
            # Gone again, and the monitor has told so before. Nobody needs to hear of this link.
            self.links[route] = gone = SocketLink(self, peer, route, None)
            gone.closing = True
            self._leave(gone, "connection lost")
            return
        if wanted != self.hub.peer:
            raise WireError("wrong peer", f"{wanted} was wanted, this is {self.hub.peer}")
        if peer in self._peers:
            raise WireError("duplicate peer", f"{peer} has a link here")
        link = SocketLink(self, peer, route, None)
        self.links[route] = self._peers[peer] = link
        link.fd = fd
        self.bind_fd(route, fd)
        if not self.say(route, frames.WELCOME, self.hub.peer):
            self.drop(link)

    def forget(self, link: SocketLink) -> None:
        if self._peers.get(link.peer) is link:
            del self._peers[link.peer]
        if self.by_fd.get(link.fd) == link.route:
            self.links[link.route] = None  # still connected: ignored until it is not
        else:
            self.links.pop(link.route, None)

    def on_event(self, kind: int, fd: int, endpoint: str) -> None:
        if kind == ACCEPTED:
            self._alive.add(fd)
        else:
            self._alive.discard(fd)
            super().on_event(kind, fd, endpoint)


class Dialler(Router):
    """The socket that connects: links that we make."""

    def __init__(self, hub: Hub, socket: RouterSocket) -> None:
        super().__init__(hub, socket)
        self._dials = 0

    def dial(self, peer: str, endpoint: str) -> SocketLink:
        for link in self.living():
            if link.endpoint == endpoint:
                # One that is being closed, or of a process that was at this address before. libzmq ends
                # connections by address, so the old one must go first.
                self.end(link, f"replaced: {endpoint} is {peer} now")
        self._dials += 1
        route = b"%d" % self._dials
        link = SocketLink(self, peer, route, endpoint)
        self.links[route] = link
        try:
            self.socket.connect(endpoint, route, f"{self.hub.peer}#{self._dials}".encode())
        except ConnectionError as error:
            self.loop.call_soon(self.end, link, f"cannot connect to {endpoint}: {error}")
            return link
        self.say(route, frames.HELLO, self.hub.peer, peer)
        link.timer = self.loop.call_later(self.settings.connect_s, self._give_up, link)
        self.look_soon()
        return link

    def link_to(self, peer: str) -> SocketLink | None:
        for link in self.living():
            if link.peer == peer and not link.closing:
                return link
        return None

    def _give_up(self, link: SocketLink) -> None:
        seconds = f"{self.settings.connect_s:g} s"
        if link.connected:
            self.end(link, f"no answer from {link.endpoint} within {seconds}")
        else:
            self.end(link, f"connection refused: nobody listens at {link.endpoint} ({seconds})")

    def handshake(self, link: SocketLink | None, route: bytes, batch: frames.Batch) -> None:
        assert link is not None, "messages of strangers are not looked at"
        if link.up:
            self._said_bye(link, batch)
        elif batch.kind == frames.BYE:
            self.end(link, f"refused: {_texts(batch, 1)[0]}")
        elif batch.kind != frames.WELCOME:
            raise WireError("no welcome", f"kind {batch.kind} came first")
        elif _texts(batch, 1)[0] != link.peer:
            raise WireError("wrong peer", f"{link.endpoint} is {_texts(batch, 1)[0]}")
        else:
            self._up(link, self.socket.descriptor())

    def _up(self, link: SocketLink, fd: int) -> None:
        link.up = True
        link.fd = fd
        self.bind_fd(link.route, fd)
        if not link.closing:
            link.stop_timer()
        self.flush(link)

    def forget(self, link: SocketLink) -> None:
        self.links.pop(link.route, None)
        if self.by_fd.get(link.fd) == link.route:
            del self.by_fd[link.fd]
        self.socket.disconnect(link.endpoint or "", self.linger_s if link.flushed else 0.0)
        self.look_soon()

    def on_event(self, kind: int, fd: int, endpoint: str) -> None:
        if kind != CONNECTED:
            super().on_event(kind, fd, endpoint)
            return
        for link in self.living():
            if link.endpoint == endpoint:
                link.connected = True


def _texts(batch: frames.Batch, count: int) -> list[str]:
    """What a message about a link says: so many short texts."""
    if len(batch.records) != count or any(record.buffers for record in batch.records):
        raise WireError("malformed handshake", f"{len(batch.records)} records")
    try:
        return [record.header.decode() for record in batch.records]
    except UnicodeDecodeError as error:
        raise WireError("malformed handshake", str(error)) from None
