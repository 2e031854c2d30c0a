"""The pipe between the launcher and an agent: framed, ordered, with back-pressure.

A frame is five bytes of head (kind, length) and a body. Down (launcher to agent) go the job and then
stop and kill; up go events (msgpack) and the workers' console output (bytes as they are to be written).
End of input means "the other side is gone" to both. The same frames are to travel over ssh's standard
input and output, so bodies that come *up* are never unpickled.
"""

from __future__ import annotations

import asyncio
import os
import struct
from enum import IntEnum
from typing import Any, NamedTuple

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
    return _HEAD.pack(kind, len(body)) + body


def pack_message(kind: Kind, message: dict[str, Any]) -> bytes:
    return pack(kind, msgpack.packb(message))


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


class Channel:
    """Frames over two file descriptors, which it owns from `open` on. Used on one event loop."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        read_transport: asyncio.ReadTransport,
        write_transport: asyncio.WriteTransport,
        flow: _Flow,
    ) -> None:
        self._reader = reader
        self._read_transport = read_transport
        self._write_transport = write_transport
        self._flow = flow

    @classmethod
    async def open(cls, read_fd: int, write_fd: int) -> Channel:
        """Take over both ends; they must be pipes or sockets."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_PIPE_BYTES)
        read_transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_fd, "rb", 0)
        )
        write_transport, flow = await loop.connect_write_pipe(_Flow, os.fdopen(write_fd, "wb", 0))
        write_transport.set_write_buffer_limits(high=_HIGH_WATER)
        return cls(reader, read_transport, write_transport, flow)

    def send(self, kind: Kind, body: bytes) -> None:
        """Queue a frame; it is dropped when the other side is gone (`receive` says so)."""
        if not self._write_transport.is_closing():
            self._write_transport.write(pack(kind, body))

    def send_message(self, kind: Kind, message: dict[str, Any]) -> None:
        self.send(kind, msgpack.packb(message))

    async def drain(self) -> None:
        """Return when little is queued, or when the other side is gone."""
        await self._flow.writable()

    async def receive(self) -> Frame | None:
        """The next frame; None when the other side has ended (in whatever way)."""
        try:
            kind, length = unpack_head(await self._reader.readexactly(_HEAD.size))
            return Frame(kind, await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def close(self, timeout: float = 1.0) -> None:
        """Flush for at most `timeout` seconds, then close both directions. Idempotent."""
        if not self._write_transport.is_closing():
            self._write_transport.close()  # closes when the buffer is empty
            try:
                async with asyncio.timeout(timeout):
                    await self._flow.closed.wait()
            except TimeoutError:
                self._write_transport.abort()
        self._read_transport.close()
        await asyncio.sleep(0)  # lets the transports close their descriptors


class _Flow(asyncio.BaseProtocol):
    """Flow control of the writing side: asyncio has a ready one only for its own streams."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self._may_write = asyncio.Event()
        self._may_write.set()

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()
        self._may_write.set()

    async def writable(self) -> None:
        await self._may_write.wait()
