"""The local lane: links between the processes of one host, over unix sockets. Five to eight times quicker than ZeroMQ.

A process that listens at "ipc:///path" has a socket at "/path.u" besides (mode 0600; processes of other users are
turned away). The dialler says HELLO (who it is, whom it wants, which lane, its arena and what it is called there), the
other side answers WELCOME (who it is, its arena likewise) or BYE (why not); records wait until then: a link that never
came up has delivered nothing. A BYE ends a link, and so does the end of the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import os
import socket
from typing import TYPE_CHECKING

from runtime.errors import Closed, ConfigError, MisuseError, WireError
from runtime.transport.address import Address, local_path, parse
from runtime.transport.base import Buffer, Lane, Receiver, TransportStatistics
from runtime.transport.link import SocketSettings, texts
from runtime.transport.local_link import LocalHub, LocalLink
from runtime.transport.pipe import Pipe
from runtime.wire import frames

if TYPE_CHECKING:
    from runtime.transport.arena import Arena

_log = logging.getLogger(__name__)

_BACKLOG = 1024
_TURN_ACCEPTS = 64
_AGAIN_S = 0.02
_PAUSE_S = 0.2
_LANES = {str(int(lane)): lane for lane in Lane}


class LocalTransport:
    """One process's access to the others of its host. Implements `base.Transport`."""

    def __init__(
        self,
        peer: str,
        address: str,
        arena: Arena | None = None,
        settings: SocketSettings | None = None,
    ) -> None:
        """`address`: ipc://; its path is short enough for ".u" to follow. `arena` is not closed here."""
        bound = parse(address)
        path = local_path(bound)
        if path is None:
            raise ConfigError(f"the local lane has short ipc:// addresses, not {address!r}")
        self.peer = peer
        self.address = address
        self._path = path
        self._bound = bound
        self._arena = arena
        self._settings = settings or SocketSettings()
        self._hub: LocalHub | None = None
        self._listening: socket.socket | None = None
        self._links: set[LocalLink] = set()
        self._by_peer: dict[tuple[bool, str, Lane], LocalLink] = {}
        self._closed = False

    async def start(self, receiver: Receiver) -> None:
        if self._closed or self._hub is not None:
            raise MisuseError(f"the transport of {self.peer} was started before")
        hub = self._hub = LocalHub(self.peer, self._settings, receiver, self._arena)
        hub.handshake, hub.forget = self._handshake, self._forget
        try:
            self._listening = await asyncio.to_thread(_listen, self._bound, self._path)
        except BaseException:
            self._closed = True
            raise
        self._watch(hub, self._listening)

    def connect(self, peer: str, address: str, lane: Lane = Lane.RPC) -> LocalLink:
        hub = self._running()
        target = parse(address)
        link = self._living(peer, lane)
        if link is None:
            path = local_path(target)
            if path is None:
                raise ConfigError(f"the local lane has short ipc:// addresses, not {address!r}")
            link = self._new_link(hub, peer, lane, address)
            self._dial(link, path, hub.loop.time() + self._settings.connect_s)
        return link

    def reach(self, peer: str, address: Address, lane: Lane) -> LocalLink | None:
        """As `connect`, but None when there is nobody now."""
        hub = self._running()
        link, path = self._living(peer, lane), local_path(address)
        if link is None and path is not None:
            try:
                made = _connected(path)
            except OSError:
                return None
            link = self._new_link(hub, peer, lane, str(address))
            self._greet(link, made)
        return link

    def stage(self, buffer: Buffer, budget: str = "rpc") -> Buffer:
        return self._arena.staged(buffer, budget) if self._arena is not None else buffer

    def _running(self) -> LocalHub:
        if self._closed:
            raise Closed(f"the transport of {self.peer} is closed")
        if self._hub is None or self._listening is None:
            raise MisuseError(f"the transport of {self.peer} is not started")
        return self._hub

    # making links

    def _living(self, peer: str, lane: Lane) -> LocalLink | None:
        link = self._by_peer.get((True, peer, lane))
        if link is not None and link.closing:
            link.drop()  # the other side takes one of us at a time
            return None
        return link

    def _new_link(self, hub: LocalHub, peer: str, lane: Lane, endpoint: str) -> LocalLink:
        link = LocalLink(hub, peer, lane, endpoint)
        self._links.add(link)
        self._by_peer[True, peer, lane] = link
        return link

    def _dial(self, link: LocalLink, path: str, deadline: float) -> None:
        """Now and, while nobody listens there, again and again."""
        loop = asyncio.get_running_loop()
        try:
            made = _connected(path)
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            if loop.time() < deadline:
                link.timer = loop.call_later(_AGAIN_S, self._dial, link, path, deadline)
            else:
                seconds = f"{self._settings.connect_s:g} s"
                link.end(f"connection refused: nobody listens at {link.endpoint} ({seconds})")
        except OSError as error:
            reason = f"cannot connect to {link.endpoint}: {error}"
            link.expect(0, lambda: link.end(reason))
        else:
            self._greet(link, made)

    def _greet(self, link: LocalLink, made: socket.socket) -> None:
        """Connected: say who we are."""
        pipe = self._attach(link, made)
        seconds = self._settings.connect_s
        if pipe.user() != os.geteuid():
            reason = f"{link.endpoint} belongs to another user ({pipe.user()})"
            link.expect(0, lambda: link.end(reason))
            return
        text = f"no answer from {link.endpoint} within {seconds:g} s"
        link.expect(seconds, lambda: link.end(text))
        link.say(frames.HELLO, self.peer, link.peer, str(int(link.lane)), *self._arena_texts())

    def _attach(self, link: LocalLink, made: socket.socket) -> Pipe:
        link.pipe = Pipe(made, readable=link.readable, room=link.flush, broken=link.mute)
        return link.pipe

    def _accept(self, hub: LocalHub, listening: socket.socket) -> None:
        for _ in range(_TURN_ACCEPTS):
            try:
                made, _ = listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                _log.error("%s cannot accept links: %s", self.peer, error)
                hub.loop.remove_reader(listening.fileno())
                hub.loop.call_later(_PAUSE_S, self._watch, hub, listening)
                return
            link = LocalLink(hub, "", Lane.RPC, None)
            self._links.add(link)
            pipe = self._attach(link, made)
            if pipe.user() != os.geteuid():
                hub.reject(link, WireError("other user", f"uid {pipe.user()}"))
                continue
            late = WireError("no hello", f"within {self._settings.connect_s:g} s")
            link.expect(self._settings.connect_s, functools.partial(hub.reject, link, late))

    def _watch(self, hub: LocalHub, listening: socket.socket) -> None:
        if listening is self._listening:
            hub.loop.add_reader(listening.fileno(), self._accept, hub, listening)

    def _handshake(self, link: LocalLink, batch: frames.Batch) -> None:
        """A message about the link itself."""
        kind = batch.kind
        if link.up:
            if kind != frames.BYE:
                raise WireError("unexpected message", f"kind {kind} on a link that is up")
            link.end(texts(batch, 1)[0][:1000] or "closed by the peer")
        elif not link.outbound:
            self._hello(link, batch)
        elif kind == frames.BYE:
            link.end(f"refused: {texts(batch, 1)[0]}")
        elif kind != frames.WELCOME:
            raise WireError("no welcome", f"kind {kind} came first")
        else:
            peer, *arena = texts(batch, 3)
            if peer != link.peer:
                raise WireError("wrong peer", f"{link.endpoint} is {peer}")
            link.set_up(self._member(*arena))

    def _hello(self, link: LocalLink, batch: frames.Batch) -> None:
        if batch.kind != frames.HELLO:
            raise WireError("no hello", f"kind {batch.kind} came first")
        peer, wanted, lane, *arena = texts(batch, 5)
        if wanted != self.peer:
            raise WireError("wrong peer", f"{wanted} was wanted, this is {self.peer}")
        if lane not in _LANES:
            raise WireError("malformed handshake", f"lane {lane!r}")
        member = self._member(*arena)
        key = (False, peer, _LANES[lane])
        old = self._by_peer.get(key)
        while old is not None and not old.ended and old.readable():
            pass  # if that one has ended, its end is read now
        if old is not None and not old.ended:
            raise WireError("duplicate peer", f"{peer} has a link here")
        link.peer, link.lane = peer, _LANES[lane]
        self._by_peer[key] = link
        link.say(frames.WELCOME, self.peer, *self._arena_texts())
        link.set_up(member)

    def _arena_texts(self) -> tuple[str, str]:
        arena = self._arena
        return ("", "") if arena is None else (arena.id.hex(), str(arena.index))

    def _member(self, arena: str, index: str) -> int | None:
        """What the other end is called in our arena, if that is its arena, too."""
        if self._arena is None or arena != self._arena.id.hex():
            return None
        if not (index.isascii() and index.isdigit()):
            raise WireError("malformed handshake", f"member {index!r}")
        return int(index)

    def _forget(self, link: LocalLink) -> None:
        self._links.discard(link)
        key = (link.outbound, link.peer, link.lane)
        if self._by_peer.get(key) is link:
            del self._by_peer[key]

    # end

    async def close(self, linger: float = 1.0) -> None:
        hub = self._hub
        if self._closed or hub is None:
            self._closed = True
            return
        self._closed = True
        listening, self._listening = self._listening, None
        if listening is not None:
            hub.loop.remove_reader(listening.fileno())
            listening.close()
            await asyncio.to_thread(_unlink, self._path)
        hub.linger_s = linger
        for link in list(self._links):
            link.close()
        try:
            async with asyncio.timeout(linger):
                while self._links:
                    hub.gone.clear()
                    await hub.gone.wait()
        except TimeoutError:
            pass  # what is left of the links ends now, as was asked
        finally:
            for link in list(self._links):
                link.drop()
            if hub.copier is not None:
                await hub.copier.close()

    def statistics(self) -> TransportStatistics:
        if self._hub is None:
            return TransportStatistics(0, {})
        links = sum(link.outbound or link.up for link in self._links)
        return TransportStatistics(links, dict(self._hub.rejected), **self._hub.counts)


def _listen(address: Address, path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        os.fchmod(made.fileno(), 0o600)  # of the file to be made
        try:
            made.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_stale(address, path)
            made.bind(path)
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        raise ConfigError(f"cannot bind {address}: {path}: {error}") from None
    except BaseException:
        made.close()
        raise
    return made


def _remove_stale(address: Address, path: str) -> None:
    try:
        _connected(path).close()
    except ConnectionRefusedError:
        os.unlink(path)  # left behind by a dead process
    else:
        raise ConfigError(f"cannot bind {address}: another process listens there")


def _connected(path: str) -> socket.socket:
    """Unix sockets connect at once. Raises OSError, BlockingIOError where too many wait to be accepted."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        made.connect(path)
    except BaseException:
        made.close()
        raise
    return made


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
