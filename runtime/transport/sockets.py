"""Links over ZeroMQ: the one module that knows zmq.

`RouterSocket` is one ROUTER socket with its monitor, as plain calls that never block. What is said over it and
when is decided in `transport.router`; `SocketTransport` puts the two together. `zmq.asyncio` is not used: it costs
ten times what the socket itself does. The context is made by `start`, so a process that only forks others never has one.

tcp:// is encrypted by CURVE, and `Authenticator` lets in nobody but clients whose keys are known; ipc:// needs neither,
its files are in a folder of the user's own. libzmq copies a socket's options when it binds or connects, so one socket
does both. What that keeps out, and what it does not, is said in `docs/security.md`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import random
import socket as plain_socket
import struct
from typing import Any

import zmq
from zmq.utils import z85

from runtime.errors import Closed, ConfigError, MisuseError
from runtime.transport.address import Address, nearest, parse, parse_all, write_all
from runtime.transport.base import Buffer, Lane, Receiver, TransportStatistics
from runtime.transport.engine import Hub
from runtime.transport.link import SocketLink, SocketSettings, Tracker
from runtime.transport.router import ACCEPTED, CONNECTED, DISCONNECTED, Dialler, Listener
from runtime.transport.security import Security

__all__ = ["Authenticator", "RouterSocket", "SocketSettings", "SocketTransport", "mint"]

# Plain ints: the operators of zmq's flag enums cost more than the calls that they are for.
_NOBLOCK, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)
_EVENT_KINDS = {
    int(zmq.EVENT_ACCEPTED): ACCEPTED,
    int(zmq.EVENT_CONNECTED): CONNECTED,
    int(zmq.EVENT_DISCONNECTED): DISCONNECTED,
}
# Not ACCEPT_FAILED: without free descriptors there are 100,000 a second.
_EVENT_MASK = sum(_EVENT_KINDS)
_PEER_ID_BYTES = 200
_BLOCK_BYTES = 31 * 1024 * 1024
"""glibc learns from blocks of up to 32 MiB. The pages of this one are never touched."""
_ZAP_TURN, _ZAP_PAUSE_S = 20, 0.01
"""So many handshakes are let through at once, and the pause after them: at most 2,000 a second."""


def mint() -> Security:
    """New keys for a job. Only who has them gets in."""
    public, secret = (z85.decode(key) for key in zmq.curve_keypair())
    return Security(public, secret, frozenset([public]))


class Authenticator:
    """Answers libzmq, for all sockets of a context, whether the owner of a key may connect (ZAP, ZeroMQ RFC 27).

    Who may not is told so and disconnected, counted and logged; nothing that it sends gets this far. Must be there
    before the first socket."""

    def __init__(self, context: zmq.Context[Any], security: Security, hub: Hub) -> None:
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind("inproc://zeromq.zap.01")
        self._security = security
        self._hub = hub
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.TimerHandle | None = None
        self._listen()

    def _listen(self) -> None:
        self._loop.add_reader(int(self._socket.getsockopt(zmq.FD)), self._answer)
        self._answer()

    def _answer(self) -> None:
        for _ in range(_ZAP_TURN):
            try:
                request = self._socket.recv_multipart(_NOBLOCK)
            except zmq.Again:
                return
            _, number, _, source, _, mechanism, *credentials = request
            admitted = self._security.admits(mechanism, credentials[0] if credentials else b"")
            if not admitted:
                self._hub.refuse(source.decode())
            # 300 would say nothing, but leave the connection open until the time for handshakes is over.
            status = b"200" if admitted else b"400"
            self._socket.send_multipart([b"1.0", number, status, b"", b"", b""])
        self._stop()
        self._again = self._loop.call_later(_ZAP_PAUSE_S, self._listen)

    def _stop(self) -> None:
        self._loop.remove_reader(int(self._socket.getsockopt(zmq.FD)))
        if self._again is not None:
            self._again.cancel()

    def close(self) -> None:
        self._stop()
        self._socket.close()


class RouterSocket:
    """One ROUTER socket and its monitor. No call blocks."""

    def __init__(self, context: zmq.Context[Any], settings: SocketSettings) -> None:
        made = self._socket = context.socket(zmq.ROUTER)
        self._settings = settings
        made.setsockopt(zmq.ROUTER_MANDATORY, 1)
        made.setsockopt(zmq.LINGER, int(settings.linger_s * 1000))
        made.setsockopt(zmq.SNDHWM, settings.pipe_messages)
        made.setsockopt(zmq.RCVHWM, settings.unread_messages)
        made.setsockopt(zmq.MAXMSGSIZE, settings.limits.buffer_bytes)
        made.setsockopt(zmq.HANDSHAKE_IVL, int(settings.connect_s * 1000))
        made.setsockopt(zmq.RECONNECT_IVL, 10)
        made.setsockopt(zmq.RECONNECT_IVL_MAX, 100)
        made.setsockopt(zmq.BACKLOG, 1024)
        news = f"inproc://monitor-{id(self)}"
        made.monitor(news, _EVENT_MASK)
        self._monitor = context.socket(zmq.PAIR)
        # libzmq's thread waits where there is no room, with a lock that `close` needs: a flood of connections while the
        # loop is busy would be the end.
        self._monitor.setsockopt(zmq.RCVHWM, 0)
        self._monitor.connect(news)
        self._apart = settings.apart_bytes
        self._first: zmq.Frame | None = None
        self._ahead: tuple[bytes, list[Buffer], zmq.Frame | None] | None = None
        # Past pyzmq's checks for other kinds of sockets, which take as long as the call itself.
        self._send = functools.partial(zmq.backend.Socket.send, made)
        self._recv, self._get = made.recv, made.getsockopt
        self.fd = int(made.getsockopt(zmq.FD))
        self.monitor_fd = int(self._monitor.getsockopt(zmq.FD))

    def readable(self) -> bool:
        """Is there a message? Also takes in the news that the FD stands for."""
        return self._ahead is not None or bool(int(self._get(_EVENTS)) & _POLLIN)

    def receive(self) -> tuple[bytes, list[Buffer]] | None:
        """The routing id and the parts of the next message, or None. Parts are writable, but for the first."""
        if self._ahead is not None:
            (route, parts, self._first), self._ahead = self._ahead, None
            return route, parts
        recv = self._recv
        try:
            route = recv(_NOBLOCK)
        except zmq.Again:
            return None
        frame: zmq.Frame = recv(_NOBLOCK, copy=False)
        self._first = frame
        parts = [frame.bytes]
        while frame.more:
            frame = recv(_NOBLOCK, copy=False)
            view = frame.buffer
            # Small parts share a block of libzmq's and may be unaligned: a copy costs less than that.
            parts.append(view if len(view) >= self._apart else bytearray(view))
        return route, parts

    def descriptor(self) -> int:
        """File descriptor of the connection that the last message came by; -1 if that is unknown."""
        try:
            return int(self._first.get(zmq.SRCFD)) if self._first is not None else -1
        except (zmq.ZMQError, TypeError):
            return -1

    def begin(self, route: bytes) -> bool:
        """Begin a message; False when its pipe is full. Raises ConnectionError when there is no such
        connection (any more)."""
        try:
            self._send(route, _MORE)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            raise ConnectionError(str(error)) from None
        return True

    def finish(self, parts: list[Buffer]) -> list[tuple[Tracker, int]]:
        """The rest of the message. Large parts are not copied: a tracker and size for each of them."""
        if len(parts) == 1 and len(parts[0]) < self._apart:
            self._send(parts[0], _NOBLOCK)
            return []
        large: list[tuple[Tracker, int]] = []
        last = len(parts) - 1
        for index, part in enumerate(parts):
            flags = _NOBLOCK if index == last else _MORE
            if len(part) < self._apart:
                self._send(part, flags)
            else:
                tracker: Any = self._send(part, flags, copy=False, track=True)
                large.append((tracker, len(part)))
        return large

    def event(self) -> tuple[int, int, str] | None:
        """The next event of the monitor: (kind, file descriptor, endpoint)."""
        try:
            head, endpoint = self._monitor.recv_multipart(_NOBLOCK)
        except zmq.Again:
            return None
        kind, value = struct.unpack("=hi", head)
        return _EVENT_KINDS.get(kind & 0xFFFF, -1), value, endpoint.decode("utf-8", "replace")

    def bind(self, address: Address) -> Address:
        """Raises `ConfigError`. Gives the address with the port that was found, and our key. ipc:// comes first:
        what tcp:// asks of its clients is asked of all that are bound after it."""
        if address.scheme == "ipc":
            _refuse_if_in_use(address)
            self._bind(address.endpoint)
            os.chmod(address.target, 0o600)
            return address
        self._guard(address)
        low, high = ports = self._settings.ports or (0, 0)
        if address.port or not any(ports):
            self._bind(address.endpoint if address.port else address.endpoint[:-1] + "*")
        else:
            some = random.sample(range(low, high + 1), high + 1 - low)
            if not any(self._bind_free(address._replace(port=port).endpoint) for port in some):
                text = f"cannot bind {address.target}: none of the {len(some)} ports"
                raise ConfigError(f"{text} {low} to {high} is free (all were tried)")
        bound = parse(str(self._socket.get_string(zmq.LAST_ENDPOINT)).rstrip("\0"))
        keys = self._settings.security
        return bound._replace(key=keys.public if keys is not None else b"")

    def _bind(self, endpoint: str) -> None:
        if not self._bind_free(endpoint):
            raise ConfigError(f"cannot bind {endpoint}: {os.strerror(errno.EADDRINUSE)}")

    def _bind_free(self, endpoint: str) -> bool:
        """False when somebody else has it."""
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise ConfigError(f"cannot bind {endpoint}: {error}") from None
        return True

    def _guard(self, address: Address) -> None:
        """Whom the next bind lets in."""
        version = 6 if ":" in address.target else 4
        self._socket.setsockopt(zmq.IPV6, int(version == 6))
        keys, everyone = self._settings.security, self._settings.accept_from
        if keys is not None:
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
            self._socket.setsockopt(zmq.CURVE_SERVER, 1)
            self._socket.setsockopt(zmq.ZAP_DOMAIN, b"job")
            # Without an Authenticator nobody gets in, where libzmq would let in everybody.
            self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        some = [source for source in everyone if (":" in source) == (version == 6)]
        if everyone and not some:  # no filter at all would let in everybody
            found = ", ".join(everyone)
            raise ConfigError(
                f"cannot bind {address.endpoint}: nobody could connect, of {found} none is IPv{version}"
            )
        for source in some:
            try:
                self._socket.setsockopt(zmq.TCP_ACCEPT_FILTER, source.partition("%")[0].encode())
            except zmq.ZMQError as error:
                raise ConfigError(f"accept_from has {source!r}, no IP address: {error}") from None

    def connect(self, address: Address, route: bytes, name: bytes) -> None:
        """`route`: what we call the connection; `name`: what the other side does. Both must be new."""
        made, keys = self._socket, self._settings.security
        made.setsockopt(zmq.ROUTING_ID, name)
        made.setsockopt(zmq.CONNECT_ROUTING_ID, route)
        made.setsockopt(zmq.IPV6, int(address.scheme == "tcp" and ":" in address.target))
        if address.key and keys is not None:
            made.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
            made.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
            made.setsockopt(zmq.CURVE_SERVERKEY, address.key)
        else:
            made.setsockopt(zmq.CURVE_SERVER, 0)  # what turns CURVE off again
        try:
            made.connect(address.endpoint)
        except zmq.ZMQError as error:
            raise ConnectionError(str(error)) from None

    def disconnect(self, endpoint: str, linger_s: float) -> None:
        """End all connections to `endpoint`; what was sent there has `linger_s` to be written."""
        self._socket.setsockopt(zmq.LINGER, int(linger_s * 1000))
        if self._ahead is None and (message := self.receive()) is not None:
            # To ask for events makes libzmq begin to read a message. If that is of this connection, it cannot go on
            # reading after the disconnect, and aborts the process (libzmq issue 3485).
            self._ahead = (*message, self._first)
        with contextlib.suppress(zmq.ZMQError):  # there was none
            self._socket.disconnect(endpoint)

    def close(self, linger_s: float) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=int(linger_s * 1000))


class SocketTransport:
    """One process's access to the network by ZeroMQ. Implements `base.Transport`."""

    def __init__(self, peer: str, address: str, settings: SocketSettings | None = None) -> None:
        """`address`: ipc:// (the file is made, mode 0600, and removed) or tcp:// (port 0: any), or several. Raises
        `ConfigError` for tcp:// without keys."""
        size = len(peer.encode("utf-8", "replace"))
        if not 0 < size <= _PEER_ID_BYTES:
            raise MisuseError(f"a peer id has 1 to {_PEER_ID_BYTES} bytes, {peer!r} has {size}")
        self._settings = settings or SocketSettings()
        self._bound = sorted(parse_all(address), key=lambda one: one.scheme != "ipc")
        for one in self._bound:
            if one.scheme not in ("ipc", "tcp"):
                raise ConfigError(f"sockets have ipc:// and tcp:// addresses, not {one}")
            self._check_keys(one, one.scheme == "tcp" and self._settings.security is not None)
        first = self._bound[0]
        self._folder = os.path.dirname(first.target) if first.scheme == "ipc" else None
        self.peer = peer
        self.address = address
        self._context: zmq.Context[Any] | None = None
        self._hub: Hub | None = None
        self._listener: Listener | None = None
        self._diallers: dict[Lane, Dialler] = {}
        self._authenticator: Authenticator | None = None
        self._closed = False

    async def start(self, receiver: Receiver) -> None:
        if self._closed or self._hub is not None:
            raise MisuseError(f"the transport of {self.peer} was started before")
        hub = self._hub = Hub(self.peer, self._settings, receiver, self._dial)
        _keep_freed_memory()
        context = self._context = zmq.Context(io_threads=1)  # `Listener` relies on its order
        if self._settings.security is not None:
            self._authenticator = Authenticator(context, self._settings.security, hub)
        bound = RouterSocket(context, self._settings)
        self._listener = Listener(hub, bound)
        wanted, self._bound = self._bound, []
        try:
            for one in wanted:
                self._bound.append(await asyncio.to_thread(bound.bind, one))  # touches the disk
        except BaseException:
            self._closed = True
            await self._end(0.0)
            raise
        self.address = write_all(self._bound)
        self._listener.start()

    def connect(self, peer: str, address: str, lane: Lane = Lane.RPC) -> SocketLink:
        if self._closed:
            raise Closed(f"the transport of {self.peer} is closed")
        if self._listener is None:
            raise MisuseError(f"the transport of {self.peer} is not started")
        if lane is Lane.BULK:
            raise MisuseError("bulk links are made by the transport itself")
        way = self.way_to(address)
        self._check_keys(way, bool(way.key))
        return self._dial(peer, way, lane)

    def way_to(self, address: str) -> Address:
        """Which of a peer's addresses we take."""
        return nearest(parse_all(address), self._folder)

    def _check_keys(self, address: Address, encrypted: bool) -> None:
        """Raises `ConfigError` where something would go unencrypted, or we could not decrypt it."""
        keys = self._settings.security
        if encrypted and keys is None:
            raise ConfigError(f"{address.endpoint} is encrypted, and this process has no keys")
        if address.scheme == "tcp" and not encrypted and (keys or not self._settings.insecure):
            who = "this address has no key" if keys else "this process has no keys"
            raise ConfigError(f"{address.endpoint} is not encrypted: {who}")

    def _dial(self, peer: str, endpoint: Address, lane: Lane) -> SocketLink:
        dialler = self._diallers.get(lane)
        if dialler is None:
            assert self._context is not None
            assert self._hub is not None
            socket = RouterSocket(self._context, self._settings)
            dialler = self._diallers[lane] = Dialler(self._hub, socket, lane)
            dialler.start()
        return dialler.link_to(peer) or dialler.dial(peer, endpoint)

    def stage(self, buffer: Buffer, budget: str = "rpc") -> Buffer:
        return buffer

    async def close(self, linger: float = 1.0) -> None:
        if self._closed or self._hub is None:
            self._closed = True
            return
        self._closed = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + linger
        try:
            for router in self._routers():
                router.linger_s = linger
                for link in router.living():
                    if link.lane is not Lane.BULK:  # those end with their mates
                        link.close()
            async with asyncio.timeout_at(deadline):
                while any(router.living() for router in self._routers()):
                    self._hub.gone.clear()
                    await self._hub.gone.wait()
        except TimeoutError:
            pass  # what is left of the links ends now, as was asked
        finally:
            await self._end(max(0.0, deadline - loop.time()))

    async def _end(self, linger_s: float) -> None:
        for router in self._routers():
            router.stop(linger_s)
        if self._authenticator is not None:
            self._authenticator.close()
        self._listener = None
        self._diallers.clear()
        context, self._context = self._context, None
        if context is not None:
            paths = [one.target for one in self._bound if one.scheme == "ipc"]
            await asyncio.to_thread(_terminate, context, paths)

    def _routers(self) -> list[Listener | Dialler]:
        return [*([self._listener] if self._listener else []), *self._diallers.values()]

    def statistics(self) -> TransportStatistics:
        if self._hub is None:
            return TransportStatistics(0, {})
        living = (link for router in self._routers() for link in router.living())
        links = sum(link.lane is not Lane.BULK for link in living)
        return TransportStatistics(links, dict(self._hub.rejected), **self._hub.counts)


def _keep_freed_memory() -> None:
    """glibc gives the memory of a large block back to the kernel when it is freed, unless a larger one has been
    freed before: the page faults of each new one cost more than all the rest of receiving a piece."""
    bytes(_BLOCK_BYTES)


def _terminate(context: zmq.Context[Any], paths: list[str]) -> None:
    """Waits until what was sent is written, at most the linger time of the sockets."""
    context.term()
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _refuse_if_in_use(address: Address) -> None:
    """libzmq takes a path away from whoever listens there; we do not."""
    with plain_socket.socket(plain_socket.AF_UNIX, plain_socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(address.target)
        except (FileNotFoundError, ConnectionRefusedError):
            return  # nothing there, or left behind by a dead process
        except OSError as error:
            raise ConfigError(f"cannot bind {address}: {error}") from None
    raise ConfigError(f"cannot bind {address}: another process listens there")
