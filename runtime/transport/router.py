"""The routers of a process: how links over ZeroMQ are made, used and ended. Knows no zmq (see `sockets`).

A process has one bound ROUTER socket, which peers dial, and one that dials for each lane in use. Answers go back on
the link that a question came by, so two peers that dial each other have two links and nothing to sort out. Every dial
has routing ids of its own, on both sides (ours is "<peer id>#<lane>.<n>"): libzmq ignores a second connection with an
id that it has, and would abort the process if we named two connections alike.

The making of a link. The dialler says HELLO (who it is, whom it wants, the lane), the other side answers WELCOME (who it
is) or BYE (why not). Records wait until then: a link that never came up has delivered nothing. A BYE also ends a
link, and so does the end of the connection, which the socket's monitor reports by its file descriptor; the
descriptor of a link is known from the message that made it. Events of the monitor are older than the message that is read
after them, but what the dead peer had sent may still lie in the socket: a link is ended once that is drained.
A dialler that closes waits for a BYE in return, for what libzmq has not read when a connection ends can be lost.

Large buffers (see `bulk`) take a bulk link, the *mate* of an rpc link. Whoever dialled the one dials the other, as soon
as something is to be sent or was announced. Mates end together: the receiver hears of the rpc link.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import TYPE_CHECKING

from runtime.errors import WireError
from runtime.transport.address import Address
from runtime.transport.base import Lane
from runtime.transport.engine import Engine, Hub
from runtime.transport.link import SocketLink, texts
from runtime.wire import frames

if TYPE_CHECKING:
    from runtime.transport.sockets import RouterSocket

ACCEPTED, CONNECTED, DISCONNECTED = range(3)
"""What a monitor tells about a connection."""

_LANES = {lane.name: lane for lane in Lane}
_DRAIN_S = 0.25


class Router(Engine):
    """What both sides of a link have in common: its mate, its end, the monitor of the socket."""

    def __init__(self, hub: Hub, socket: RouterSocket) -> None:
        super().__init__(hub, socket)
        self.by_fd: dict[int, bytes] = {}
        self.linger_s = self.settings.linger_s
        self._leaving: dict[SocketLink, tuple[str, float]] = {}

    def start(self) -> None:
        super().start()
        self.loop.add_reader(self.socket.monitor_fd, self.read_monitor)
        self.read_monitor()

    def stop(self, linger_s: float) -> None:
        self.loop.remove_reader(self.socket.monitor_fd)
        super().stop(linger_s)

    def arrived(self, link: SocketLink, batch: frames.Batch) -> None:
        if link.lane is not (Lane.BULK if batch.kind == frames.PIECE else Lane.RPC):
            raise WireError("wrong lane", f"kind {batch.kind} on {link.lane.name}")
        if batch.kind == frames.PIECE:
            rpc = link.mate
            if rpc is not None and not rpc.ended:
                self.deliver(rpc, rpc.arriving().piece(batch.records))
                rpc.router.finish_closed(rpc)
        elif batch.kind == frames.SPLIT:
            self.deliver(link, link.arriving().announced(batch.records))
            self.ensure_mate(link)
        elif batch.kind == frames.LOOSE:
            self.deliver(link, batch.records)
        else:
            self.deliver(link, link.arriving().behind(batch.records))

    def reject(self, link: SocketLink | None, route: bytes, error: WireError) -> None:
        assert link is not None, "messages of strangers are not looked at"
        self.hub.count_rejected(link.peer, error)
        self.say(route, frames.BYE, str(error))
        link.flushed = True
        self.end(link, f"broke the protocol: {error}")

    def _said_bye(self, link: SocketLink, batch: frames.Batch) -> None:
        if batch.kind != frames.BYE:
            raise WireError("unexpected message", f"kind {batch.kind} on a link that is up")
        reason = texts(batch, 1)[0][:1000] or "closed by the peer"
        if link.lane is Lane.BULK:  # all pieces have come; the rpc link has a good-bye of its own
            rpc = link.mate
            self._return_bye(link)
            self.drop(link)
            if rpc is not None:
                rpc.router.finish_closed(rpc)
        else:
            link.last_words = reason
            self.finish_closed(link)

    def finish_closed(self, link: SocketLink) -> None:
        """End a link that the peer has closed, unless its bulk link still brings what belongs to it."""
        if link.last_words is None:
            return
        if link.mate is None or link.arrivals is None or not link.arrivals.waiting:
            self._return_bye(link)
            self.end(link, link.last_words)

    def _return_bye(self, link: SocketLink) -> None:
        """All was read: a dialler that closes may disconnect."""
        if not link.outbound:
            self.say(link.route, frames.BYE, "")

    def flushed(self, link: SocketLink) -> None:
        if link.departures.queued:
            self.ensure_mate(link)
        rpc = link.mate if link.lane is Lane.BULK else link
        if rpc is not None and rpc.closing and rpc.up and rpc.is_flushed():
            rpc.router.finish_closing(rpc)

    def ensure_mate(self, link: SocketLink) -> None:
        """Large buffers are to be sent or were announced: see that there is a bulk link, and that it sends."""
        if link.mate is None and link.outbound and link.up:
            assert link.endpoint is not None
            link.join(self.hub.dial(link.peer, link.endpoint, Lane.BULK))
        bulk = link.mate
        if bulk is not None and bulk.up and not bulk.blocked and link.departures.queued:
            bulk.router.flush(bulk)
            bulk.router.look_soon()

    # ends

    def close_link(self, link: SocketLink) -> None:
        """Flush and end; at the latest after the linger time."""
        link.stop_timer()
        link.timer = self.loop.call_later(self.linger_s, self.drop, link)
        if link.up:
            self.look_soon()
            self.flush(link)
        elif not len(link.outbox):
            self.drop(link)

    def finish_closing(self, link: SocketLink) -> None:
        for end in (link.mate, link):
            if end is not None and not end.flushed:
                if not end.router.say(end.route, frames.BYE, "closed by the peer"):
                    end.router.block(end)
                    return
                end.flushed = True
        if not link.outbound:
            self.drop(link)  # the dialler disconnects when it has read all, until then we ignore it

    def drop(self, link: SocketLink) -> None:
        """Forget a link without telling the receiver."""
        if link.ended:
            return
        link.clear()
        self.blocked.discard(link)
        self._leaving.pop(link, None)
        self.forget(link)
        self.hub.gone.set()
        mate, link.mate = link.mate, None
        if mate is not None:
            mate.mate = None
            if mate.lane is Lane.BULK and mate not in mate.router._leaving:
                mate.router.drop(mate)

    @abstractmethod
    def forget(self, link: SocketLink) -> None: ...

    def end(self, link: SocketLink, reason: str) -> None:
        """The link is lost."""
        if link.ended:
            return
        silent, rpc = link.closing, link.mate
        self.drop(link)
        if link.lane is not Lane.BULK:
            if not silent:
                self.hub.lost(link, reason)
        elif rpc is not None:
            rpc.router.say(rpc.route, frames.BYE, reason)
            rpc.router.connection_lost(rpc, reason)

    def connection_lost(self, link: SocketLink, reason: str) -> None:
        """The connection is gone; what came by it is still to be read."""
        if not link.ended and link not in self._leaving:
            self._leaving[link] = (reason, self.loop.time() + _DRAIN_S)
            link.forget_queued()
            self.pump_soon()

    def turn_over(self, drained: bool) -> None:
        for link, (reason, deadline) in list(self._leaving.items()):
            if link.last_words is not None:
                self.finish_closed(link)
            elif drained or self.loop.time() >= deadline:
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
            self.connection_lost(link, "connection lost")
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
        self._peers: dict[tuple[str, Lane], SocketLink] = {}
        self._alive: set[int] = set()
        self._silent: set[int] = set()
        """Connections over tcp:// that no message has come by: libzmq has not authenticated them, as far as we know."""

    def handshake(self, link: SocketLink | None, route: bytes, batch: frames.Batch) -> None:
        if link is not None:
            self._said_bye(link, batch)
            return
        if batch.kind == frames.BYE:
            self._turn_away(route, "")  # its hello was lost with the connection before this one
            return
        if batch.kind != frames.HELLO:
            raise WireError("no hello", f"kind {batch.kind} came first")
        peer, wanted, name = texts(batch, 3)
        lane = _LANES.get(name)
        if lane is None:
            raise WireError("malformed handshake", f"lane {name!r}")
        if wanted != self.hub.peer:
            raise WireError("wrong peer", f"{wanted} was wanted, this is {self.hub.peer}")
        self.read_monitor()
        before = self._peers.get((peer, lane))
        if before is not None and before not in self._leaving:
            raise WireError("duplicate peer", f"{peer} has a link here")
        rpc = self._peers.get((peer, Lane.RPC))
        if lane is Lane.BULK and rpc is None:
            raise WireError("no link", f"{peer} has none that this one belongs to")
        link = self.links[route] = SocketLink(self, peer, route, lane)
        if not self._answer(route, frames.WELCOME, self.hub.peer):
            link.closing = True  # gone again: nobody needs to hear of this link
            self.connection_lost(link, "connection lost")
            return
        self._peers[peer, lane] = link
        link.fd = self.socket.descriptor()
        if lane is Lane.BULK and rpc is not None:
            rpc.join(link)
            self.ensure_mate(rpc)

    def reject(self, link: SocketLink | None, route: bytes, error: WireError) -> None:
        if link is not None:
            super().reject(link, route, error)
            return
        self.hub.count_rejected(repr(route), error)
        self._turn_away(route, str(error))

    def _turn_away(self, route: bytes, why: str) -> None:
        if self._answer(route, frames.BYE, why):
            self.links[route] = None

    def _answer(self, route: bytes, kind: int, text: str) -> bool:
        """Say that to the sender of the last message, a stranger; from now on the end of its connection is noticed. False
        when that has ended. Its descriptor may be that of a new connection already, but then libzmq knows the
        route no more, once it has looked."""
        self.read_monitor()
        self.socket.readable()
        fd = self.socket.descriptor()
        if fd not in self._alive or not self.say(route, kind, text):
            return False
        self.bind_fd(route, fd)
        return True

    def forget(self, link: SocketLink) -> None:
        if self._peers.get((link.peer, link.lane)) is link:
            del self._peers[link.peer, link.lane]
        if self.by_fd.get(link.fd) == link.route:
            self.links[link.route] = None  # still connected: ignored until it is not
        else:
            self.links.pop(link.route, None)

    def on_event(self, kind: int, fd: int, endpoint: str) -> None:
        if kind == ACCEPTED:
            self._alive.add(fd)
            if endpoint.startswith("tcp:"):
                self._silent.add(fd)
        else:
            self._alive.discard(fd)
            if fd in self._silent:
                self._silent.discard(fd)
                self.hub.count_silent(endpoint)
            super().on_event(kind, fd, endpoint)

    def bind_fd(self, route: bytes, fd: int) -> None:
        self._silent.discard(fd)
        super().bind_fd(route, fd)


class Dialler(Router):
    """A socket that connects: links that we make, all for one lane."""

    def __init__(self, hub: Hub, socket: RouterSocket, lane: Lane) -> None:
        super().__init__(hub, socket)
        self._lane = lane
        self._dials = 0

    def dial(self, peer: str, address: Address) -> SocketLink:
        endpoint = address.endpoint
        for link in self.living():
            if link.where == endpoint:
                # One that is being closed, or of a process that was at this address before. libzmq ends
                # connections by address, so the old one must go first.
                self.end(link, f"replaced: {endpoint} is {peer} now")
        self._dials += 1
        route = b"%d" % self._dials
        link = SocketLink(self, peer, route, self._lane, address)
        self.links[route] = link
        self.look_soon()
        try:
            name = f"{self.hub.peer}#{self._lane.value}.{self._dials}"
            self.socket.connect(address, route, name.encode())
        except ConnectionError as error:
            self.loop.call_soon(self.end, link, f"cannot connect to {endpoint}: {error}")
            return link
        self.say(route, frames.HELLO, self.hub.peer, peer, self._lane.name)
        link.expect(self.settings.connect_s, functools.partial(self._give_up, link))
        return link

    def link_to(self, peer: str) -> SocketLink | None:
        for link in self.living():
            if link.peer == peer and not link.closing:
                return link
        return None

    def _give_up(self, link: SocketLink) -> None:
        seconds = f"{self.settings.connect_s:g} s"
        if link.connected:
            keys = " (it may have other keys)" if link.endpoint and link.endpoint.key else ""
            self.end(link, f"no answer from {link.where} within {seconds}{keys}")
        else:
            self.end(link, f"connection refused: nobody listens at {link.where} ({seconds})")

    def handshake(self, link: SocketLink | None, route: bytes, batch: frames.Batch) -> None:
        assert link is not None, "messages of strangers are not looked at"
        if link.up:
            self._said_bye(link, batch)
        elif batch.kind == frames.BYE:
            self.end(link, f"refused: {texts(batch, 1)[0]}")
        elif batch.kind != frames.WELCOME:
            raise WireError("no welcome", f"kind {batch.kind} came first")
        elif texts(batch, 1)[0] != link.peer:
            raise WireError("wrong peer", f"{link.where} is {texts(batch, 1)[0]}")
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
        self.socket.disconnect(link.where, self.linger_s if link.flushed else 0.0)
        self.look_soon()

    def on_event(self, kind: int, fd: int, endpoint: str) -> None:
        if kind != CONNECTED:
            super().on_event(kind, fd, endpoint)
            return
        for link in self.living():
            if link.where == endpoint:
                link.connected = True
