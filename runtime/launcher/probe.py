"""An agent's part in finding out which addresses reach it: it listens, and tries those of other hosts.

It listens on each of its candidate addresses, on a port of its own, until the launcher (`survey.py`) says
that all have tried. A stranger who connects gets no byte: only who knows the question, which the launcher
told the agents, gets the answer, which only this host and those that the launcher told know. So neither an
echo nor somebody else's server at the same address (a docker bridge has one address on every host) passes.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.launcher.channel import Frames, Kind

_HALF = 16


async def serve(command: Mapping[str, Any], channel: Frames) -> None:
    """Take part in a probe that began with `command` ("probe"), until "probed" or the end of input."""
    listeners = _Listeners(command["secret"], command["ports"])
    message = command
    try:
        while message["op"] != "probed":
            if message["op"] == "probe":
                opened, refused = await listeners.open(message["addresses"])
                channel.send_message(
                    Kind.EVENT, {"event": "probing", "opened": opened, "refused": refused}
                )
            elif message["op"] == "try":
                trials = await _try_all(message["targets"], message["patience"])
                channel.send_message(Kind.EVENT, {"event": "tried", "trials": trials})
            frame = await channel.receive()
            if frame is None:
                return
            message = frame.message()
    finally:
        listeners.close()


class _Listeners:
    """Listening sockets that answer one question. `ports`: (lowest, highest), or None for any."""

    def __init__(self, secret: bytes, ports: tuple[int, int] | None) -> None:
        self._secret, self._ports = secret, ports
        self._servers: list[asyncio.Server] = []
        self._connections: set[asyncio.Transport] = set()

    async def open(self, addresses: Sequence[str]) -> tuple[dict[str, int], dict[str, str]]:
        """Listen at each address: the ports by address, and why there is none."""
        opened, refused = {}, {}
        for address in addresses:
            try:
                opened[address] = await self._listen(address)
            except OSError as error:
                refused[address] = _reason(error)
        return opened, refused

    async def _listen(self, address: str) -> int:
        low, high = self._ports or (0, 0)
        ports = list(range(low, high + 1))
        start = random.randrange(len(ports))
        for port in ports[start:] + ports[:start]:
            family, where = _numeric(address, port)
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(where)
                server = await asyncio.get_running_loop().create_server(
                    lambda: _Answer(self._secret, self._connections), sock=sock
                )
            except OSError as error:
                sock.close()
                if error.errno == errno.EADDRINUSE and self._ports:
                    continue
                raise
            self._servers.append(server)
            return int(sock.getsockname()[1])
        raise OSError(f"no free port in {low}:{high}")

    def close(self) -> None:
        for server in self._servers:
            server.close()
        for connection in self._connections:
            connection.abort()


class _Answer(asyncio.Protocol):
    """One connection to us: the answer to the right question, else nothing."""

    def __init__(self, secret: bytes, connections: set[asyncio.Transport]) -> None:
        self._secret, self._connections = secret, connections
        self._heard = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._connections.add(transport)

    def data_received(self, data: bytes) -> None:
        self._heard += data
        if len(self._heard) >= _HALF:
            if self._heard == self._secret[:_HALF]:
                self._transport.write(self._secret[_HALF:])
            self._transport.close()

    def connection_lost(self, _error: Exception | None) -> None:
        self._connections.discard(self._transport)


# The other side


async def _try_all(
    targets: Sequence[tuple[str, str, int, bytes]], patience: float
) -> list[tuple[str, str, float | None, str]]:
    """Connect to (host, address, port, secret) all at once: (host, address, seconds or None, reason)."""
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(_try(address, port, secret, patience), name=f"probe of {host}")
            for host, address, port, secret in targets
        ]
    return [
        (host, address, *task.result())
        for (host, address, _, _), task in zip(targets, tasks, strict=True)
    ]


async def _try(address: str, port: int, secret: bytes, patience: float) -> tuple[float | None, str]:
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        family, where = _numeric(address, port)
        async with asyncio.timeout(patience):
            with socket.socket(family, socket.SOCK_STREAM) as sock:
                sock.setblocking(False)
                await loop.sock_connect(sock, where)
                took = loop.time() - began
                await loop.sock_sendall(sock, secret[:_HALF])
                answer = b""
                while len(answer) < _HALF and (more := await loop.sock_recv(sock, _HALF)):
                    answer += more
                if answer == secret[_HALF:]:
                    return took, ""
                return None, "somebody else answers"
    except TimeoutError:
        return None, "no answer"
    except OSError as error:
        return None, _reason(error)


def _numeric(address: str, port: int) -> tuple[int, Any]:
    """What `socket` wants for an address that is written in figures. Raises `OSError`."""
    family, _, _, _, where = socket.getaddrinfo(
        address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
    )[0]
    return family, where


def _reason(error: OSError) -> str:
    if (error.errno or 0) > 0:  # asyncio puts its own words before those of the system
        return os.strerror(error.errno or 0).lower()
    return (error.strerror or str(error)).lower()
