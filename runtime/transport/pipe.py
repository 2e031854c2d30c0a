"""A connected unix socket: writes what the kernel takes and keeps the rest, receives, passes file descriptors.

asyncio's own transports would copy what is kept, and receive without the descriptors that come along; so the
socket is driven here.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from runtime.errors import WireError
from runtime.transport.base import Buffer

MAX_DESCRIPTORS = 64
"""Of one message."""

_TURN_WRITES = 64
_PIECES = 64
_ANCILLARY = socket.CMSG_SPACE(4 * MAX_DESCRIPTORS)
_CLOEXEC = socket.MSG_CMSG_CLOEXEC
_CREDENTIALS = struct.Struct("3i")


class Pipe:
    """Both directions of one connection. Owns the socket and every descriptor that is given to it or arrives."""

    def __init__(
        self,
        made: socket.socket,
        *,
        readable: Callable[[], object],
        room: Callable[[], None],
        broken: Callable[[], None],
    ) -> None:
        """`room`: everything has left; `broken`: nothing leaves any more, though something may still come in."""
        made.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._socket = made
        self._send, self._receive = made.send, made.recvmsg_into
        self._room, self._broken = room, broken
        self._backlog: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._arrived: deque[int] = deque()
        self._writes = False
        self.unsent = 0
        """Bytes that the kernel has not taken yet."""
        self._loop.add_reader(made.fileno(), readable)

    def user(self) -> int:
        """Who runs the process at the other end."""
        size = _CREDENTIALS.size
        found = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        return int(_CREDENTIALS.unpack(found)[1])

    # writing

    def write(self, data: bytes) -> None:
        """One small message."""
        if self.unsent:
            self.put([data])
            return
        try:
            sent = self._send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self._break()
            return
        if sent < len(data):
            self._keep(memoryview(data)[sent:], ())
            self._await_room()

    def put(self, chunks: Iterable[Buffer], descriptors: Sequence[int] = ()) -> None:
        """One message; `descriptors` are ours from now on."""
        idle = not self.unsent
        for chunk in chunks:
            self._keep(memoryview(chunk).cast("B"), descriptors)
            descriptors = ()
        if idle and self._drain():
            self._await_room()

    def _keep(self, view: memoryview, descriptors: Sequence[int]) -> None:
        self._backlog.append((view, descriptors))
        self.unsent += len(view)

    def _drain(self) -> bool:
        """Write as much as the kernel takes, within bounds. True when something is left."""
        backlog = self._backlog
        for _ in range(_TURN_WRITES):
            if not backlog:
                return False
            descriptors = backlog[0][1]
            views = [backlog[0][0]]
            for view, others in islice(backlog, 1, _PIECES):
                if others:
                    break
                views.append(view)
            try:
                sent = self._socket.sendmsg(views, _passing(descriptors))
            except (BlockingIOError, InterruptedError):
                return True
            except OSError:
                self._break()
                return False
            _close_all(descriptors)
            self.unsent -= sent
            while backlog and sent >= len(backlog[0][0]):
                sent -= len(backlog.popleft()[0])
            if backlog:
                backlog[0] = (backlog[0][0][sent:], backlog[0][1] if not sent else ())
        return bool(backlog)

    def _await_room(self) -> None:
        if not self._writes:
            self._writes = True
            self._loop.add_writer(self._socket.fileno(), self._writable)

    def _stop_writing(self) -> None:
        if self._writes:
            self._writes = False
            self._loop.remove_writer(self._socket.fileno())

    def _writable(self) -> None:
        if not self._drain():
            self._stop_writing()
            self._room()

    def _break(self) -> None:
        self._drop_backlog()
        self._stop_writing()
        self._broken()

    # receiving

    def receive(self, room: memoryview) -> int:
        """How much came; 0: that was all of it. Raises OSError (BlockingIOError: nothing now) and `WireError`."""
        count, ancillary, flags, _ = self._receive([room], _ANCILLARY, _CLOEXEC)
        if ancillary or flags & socket.MSG_CTRUNC:
            for _, _, data in ancillary:
                numbers = array.array("i")
                numbers.frombytes(data[: len(data) - len(data) % 4])
                self._arrived.extend(numbers)
            if flags & socket.MSG_CTRUNC or len(self._arrived) > 2 * MAX_DESCRIPTORS:
                raise WireError("descriptors", f"more than {MAX_DESCRIPTORS} at once")
        return int(count)

    def refuse_more(self) -> None:
        """The other end can write no more; what it has written can still be received."""
        self._socket.shutdown(socket.SHUT_RD)

    def descriptors(self, count: int) -> list[int]:
        """The oldest `count` that came. Raises `WireError` when there are fewer."""
        if count > len(self._arrived):
            raise WireError("descriptors", f"{count} announced, {len(self._arrived)} came")
        return [self._arrived.popleft() for _ in range(count)]

    # ends

    def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._stop_writing()
        self._drop_backlog()
        _close_all(self._arrived)
        self._arrived.clear()
        self._socket.close()

    def _drop_backlog(self) -> None:
        for _, descriptors in self._backlog:
            _close_all(descriptors)
        self._backlog.clear()
        self.unsent = 0


def _passing(descriptors: Sequence[int]) -> list[tuple[int, int, array.array[int]]]:
    if not descriptors:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]


def _close_all(descriptors: Iterable[int]) -> None:
    for number in descriptors:
        os.close(number)
