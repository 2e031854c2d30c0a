"""The pipe between the launcher and an agent: framed, ordered, with back-pressure.

A frame is five bytes of head (kind, length), a body and a line feed: `srun` hands on what a program writes
up to its last line feed, and keeps the rest. Down (launcher to agent) go the job and then
stop and kill; up go events (msgpack) and the workers' console output (bytes as they are to be written).
End of input means "the other side is gone" to both. The same frames travel over ssh's standard
input and output, so bodies that come *up* are never unpickled.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

import msgpack

from runtime.errors import WireError

LIMIT = 256 * 1024 * 1024
"""Longest body in bytes. A worker's line has at most 16 MiB, a plan is far smaller."""

_HEAD = struct.Struct("!BI")
_PIPE_BYTES = 1024 * 1024
_HIGH_WATER = 4 * 1024 * 1024


class Kind(IntEnum):
    """What a frame's body is."""

    JOB = 1  # down: pickled `agent.Assignment`
    COMMAND = 2  # down: msgpack dict: {"op": "stop", ...}, {"op": "kill"}
    EVENT = 3  # up: msgpack dict: {"event": "hello" | "started" | "exited" | "waiting" | "end" ...}
    STDOUT = 4  # up: whole lines of workers, prefixed
    STDERR = 5
    RELAY = 6  # both ways: a frame of another agent's link (`relay.py`)


class Frame(NamedTuple):
    kind: Kind
    body: bytes

    def message(self) -> dict[str, Any]:
        """The body of a COMMAND or EVENT. Raises `WireError` when it is no message."""
        try:
            value = msgpack.unpackb(self.body, strict_map_key=False)
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise WireError(f"a {self.kind.name} frame is not msgpack: {error}") from error
        if not isinstance(value, dict):
            raise WireError(f"a {self.kind.name} frame holds {type(value).__name__}, not a mapping")
        return value


def pack(kind: Kind, body: bytes) -> bytes:
    """One frame as bytes."""
    return _HEAD.pack(kind, len(body)) + body + b"\n"


def unpack_head(head: bytes) -> tuple[Kind, int]:
    """Kind and body length. Raises `WireError` for anything that is not our frame."""
    number, length = _HEAD.unpack(head)
    try:
        kind = Kind(number)
    except ValueError:
        raise WireError(f"unknown frame kind {number} on the launcher's pipe") from None
    if length > LIMIT:
        raise WireError(f"a frame of {length} bytes on the launcher's pipe; at most {LIMIT}")
    return kind, length


class Frames(Protocol):
    """What frames go through: a `Channel`, or one that another agent's channel carries."""

    @property
    def pids(self) -> Sequence[int]:
        """Local processes that carry other links, which live as long as those."""

    @property
    def held(self) -> bool:
        """Whether what the other side said waits behind what is not read here."""

    def send(self, kind: Kind, body: bytes) -> None: ...
    def send_message(self, kind: Kind, message: dict[str, Any]) -> None: ...
    async def drain(self) -> None: ...
    async def receive(self) -> Frame | None: ...
    async def close(self, timeout: float = 1.0) -> None: ...


class Channel:
    """Frames over two file descriptors, which it owns from `open` on. Used on one event loop."""

    held = False

    def __init__(
        self,
        reader: asyncio.StreamReader,
        read_transport: asyncio.ReadTransport,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.pids: Sequence[int] = ()
        self._reader, self._read_transport, self._writer = reader, read_transport, writer

    @classmethod
    async def open(cls, read_fd: int, write_fd: int) -> Channel:
        """Take over both ends; they must be pipes or sockets."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_PIPE_BYTES)
        read_transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_fd, "rb", 0)
        )
        nothing = asyncio.StreamReader()  # a pipe has one direction, a protocol of streams has two
        transport, protocol = await loop.connect_write_pipe(
            lambda: asyncio.StreamReaderProtocol(nothing), os.fdopen(write_fd, "wb", 0)
        )
        transport.set_write_buffer_limits(high=_HIGH_WATER)
        writer = asyncio.StreamWriter(transport, protocol, nothing, loop)
        return cls(reader, read_transport, writer)

    def send(self, kind: Kind, body: bytes) -> None:
        """Queue a frame; it is dropped when the other side is gone (`receive` says so)."""
        if not self._writer.is_closing():
            self._writer.write(pack(kind, body))

    def send_message(self, kind: Kind, message: dict[str, Any]) -> None:
        self.send(kind, msgpack.packb(message))

    async def drain(self) -> None:
        """Return when little is queued, or when the other side is gone."""
        with suppress(ConnectionError):
            await self._writer.drain()

    async def receive(self) -> Frame | None:
        """The next frame; None when the other side has ended (in whatever way)."""
        try:
            kind, length = unpack_head(await self._reader.readexactly(_HEAD.size))
            return Frame(kind, (await self._reader.readexactly(length + 1))[:-1])
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def line(self) -> bytes:
        """The next line of what comes before the first frame; b"" at the end. Raises `WireError`."""
        try:
            return await self._reader.readline()
        except ValueError:
            raise WireError("a line without an end before the first frame") from None

    async def close(self, timeout: float = 1.0) -> None:
        """Flush for at most `timeout` seconds, then close both directions. Idempotent."""
        self._writer.close()  # closes when the buffer is empty
        try:
            async with asyncio.timeout(timeout):
                await self._writer.wait_closed()
        except TimeoutError:
            self._writer.transport.abort()
        except OSError:  # the other side was gone first
            pass
        self._read_transport.close()
        await asyncio.sleep(0)  # lets the transports close their descriptors
