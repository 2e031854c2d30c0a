"""Links over ZeroMQ: the one module that knows zmq.

`RouterSocket` is one ROUTER socket with its monitor, as plain calls that never block. What is said over it and
when is decided in `transport.router`; `SocketTransport` puts the two together. `zmq.asyncio` is not used: it costs
ten times what the socket itself does. The context is made by `start`, so a process that only forks others never has one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket as plain_socket
import struct
from typing import Any

import zmq

from runtime.errors import Closed, ConfigError, MisuseError
from runtime.transport.address import Address, parse
from runtime.transport.base import Buffer, Lane, Receiver, TransportStatistics
from runtime.transport.engine import Hub
from runtime.transport.link import SocketLink, SocketSettings, Tracker
from runtime.transport.router import ACCEPTED, CONNECTED, DISCONNECTED, Dialler, Listener

__all__ = ["RouterSocket", "SocketSettings", "SocketTransport"]

# Plain ints: the operators of zmq's flag enums cost more than the calls that they are for.
_NOBLOCK, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)
_EVENT_KINDS = {
    int(zmq.EVENT_ACCEPTED): ACCEPTED,
    int(zmq.EVENT_CONNECTED): CONNECTED,
    int(zmq.EVENT_DISCONNECTED): DISCONNECTED,
}
_EVENT_MASK = sum(_EVENT_KINDS)
_PEER_ID_BYTES = 200
_BLOCK_BYTES = 31 * 1024 * 1024
"""glibc learns from blocks of up to 32 MiB. The pages of this one are never touched."""


class RouterSocket:
    """One ROUTER socket and its monitor. No call blocks."""

    def __init__(self, context: zmq.Context[Any], settings: SocketSettings) -> None:
        made = self._socket = context.socket(zmq.ROUTER)
        made.setsockopt(zmq.ROUTER_MANDATORY, 1)
        made.setsockopt(zmq.LINGER, int(settings.linger_s * 1000))
        made.setsockopt(zmq.SNDHWM, settings.pipe_messages)
        made.setsockopt(zmq.RCVHWM, settings.unread_messages)
        made.setsockopt(zmq.MAXMSGSIZE, settings.limits.buffer_bytes)
        made.setsockopt(zmq.HANDSHAKE_IVL, int(settings.connect_s * 1000))
        made.setsockopt(zmq.RECONNECT_IVL, 10)
        made.setsockopt(zmq.RECONNECT_IVL_MAX, 100)
        made.setsockopt(zmq.BACKLOG, 1024)
        self._monitor = made.get_monitor_socket(_EVENT_MASK)
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

    def bind(self, address: Address) -> str:
        """Raises `ConfigError`. Gives the address with the port that was found."""
        if address.scheme == "ipc":
            _refuse_if_in_use(address)
        elif ":" in address.target:
            self._socket.setsockopt(zmq.IPV6, 1)
        text = str(address)
        any_port = address.scheme == "tcp" and not address.port
        try:
            self._socket.bind(text[:-1] + "*" if any_port else text)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot bind {text}: {error}") from None
        if address.scheme == "ipc":
            os.chmod(address.target, 0o600)
            return text
        return str(self._socket.get_string(zmq.LAST_ENDPOINT)).rstrip("\0")

    def connect(self, endpoint: str, route: bytes, name: bytes) -> None:
        """`route`: what we call the connection; `name`: what the other side does. Both must be new."""
        self._socket.setsockopt(zmq.ROUTING_ID, name)
        self._socket.setsockopt(zmq.CONNECT_ROUTING_ID, route)
        try:
            if endpoint.startswith("tcp://["):
                self._socket.setsockopt(zmq.IPV6, 1)
            self._socket.connect(endpoint)
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
        """`address`: ipc:// (the file is made, mode 0600, and removed) or tcp:// (port 0: any)."""
        size = len(peer.encode("utf-8", "replace"))
        if not 0 < size <= _PEER_ID_BYTES:
            raise MisuseError(f"a peer id has 1 to {_PEER_ID_BYTES} bytes, {peer!r} has {size}")
        self._bound = parse(address)
        if self._bound.scheme not in ("ipc", "tcp"):
            raise ConfigError(f"sockets have ipc:// and tcp:// addresses, not {address!r}")
        self._settings = settings or SocketSettings()
        self.peer = peer
        self.address = address
        self._context: zmq.Context[Any] | None = None
        self._hub: Hub | None = None
        self._listener: Listener | None = None
        self._diallers: dict[Lane, Dialler] = {}
        self._closed = False

    async def start(self, receiver: Receiver) -> None:
        if self._closed or self._hub is not None:
            raise MisuseError(f"the transport of {self.peer} was started before")
        hub = self._hub = Hub(self.peer, self._settings, receiver, self._dial)
        _keep_freed_memory()
        context = self._context = zmq.Context(io_threads=1)  # `Listener` relies on its order
        bound = RouterSocket(context, self._settings)
        self._listener = Listener(hub, bound)
        try:
            self.address = await asyncio.to_thread(bound.bind, self._bound)  # touches the disk
        except BaseException:
            self._closed = True
            await self._end(0.0, unlink=False)
            raise
        self._listener.start()

    def connect(self, peer: str, address: str, lane: Lane = Lane.RPC) -> SocketLink:
        if self._closed:
            raise Closed(f"the transport of {self.peer} is closed")
        if self._listener is None:
            raise MisuseError(f"the transport of {self.peer} is not started")
        if lane is Lane.BULK:
            raise MisuseError("bulk links are made by the transport itself")
        return self._dial(peer, str(parse(address)), lane)

    def _dial(self, peer: str, endpoint: str, lane: Lane) -> SocketLink:
        dialler = self._diallers.get(lane)
        if dialler is None:
            assert self._context is not None
            assert self._hub is not None
            socket = RouterSocket(self._context, self._settings)
            dialler = self._diallers[lane] = Dialler(self._hub, socket, lane)
            dialler.start()
        return dialler.link_to(peer) or dialler.dial(peer, endpoint)

    def stage(self, buffer: Buffer) -> None:
        """ZeroMQ shares no memory."""

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
            await self._end(max(0.0, deadline - loop.time()), unlink=True)

    async def _end(self, linger_s: float, *, unlink: bool) -> None:
        for router in self._routers():
            router.stop(linger_s)
        self._listener = None
        self._diallers.clear()
        context, self._context = self._context, None
        if context is not None:
            path = self._bound.target if unlink and self._bound.scheme == "ipc" else None
            await asyncio.to_thread(_terminate, context, path)

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


def _terminate(context: zmq.Context[Any], path: str | None) -> None:
    """Waits until what was sent is written, at most the linger time of the sockets."""
    context.term()
    if path is not None:
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
