"""The table of a host's arena: what lies where in it, who owns what, who holds what.

One memfd holds it all: this table, then the data, which is a pool of extents. The agent makes the file; a
process opens it through the agent's entry in /proc when it first needs it, so each has a lock of its own on it
and nobody inherits anything. `create` and `Table` are for both sides; what workers do with it is in `arena.py`,
what the agent does when one of them dies in `arena_keeper.py`.

A *row* is one slot of data, owned by one member. For each member of the host a row has a *cell* of four
bytes, in four arrays. `sent` counts the handles that were sent to the member, `opened` those that it opened
(or threw away), `done` those whose view is gone, each modulo 256: nobody holds the row when `done` is `sent`
in all of its cells. `opened` and `done` are written by that member alone; `sent` by whoever sends, under the
lock, which a process that dies lets go of by dying. `sender` is who sent last: handles that are on their way to one
member always have one sender, so that they can be called back when that one dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import secrets
import struct
import time
import weakref
from collections.abc import Iterator
from typing import NamedTuple

PAGE = mmap.PAGESIZE
EXTENT = 8 * 1024 * 1024
"""Bytes of one extent: the unit in which members take data and give it back."""
MEMBERS = 254
"""The most members of one arena: a byte names one, and two of its values mean something else."""
BUDGETS = {"rpc": 0.6, "queue": 0.6, "checkpoint": 0.5}
"""The part of the data that each use may have, all members together."""
FREE, USED, ORPHAN = 0, 1, 2
"""States of a row. An orphan's owner is dead; the agent waits for those who hold it."""
KEEPER = 255
"""Owner of extents whose member is dead."""

_MAGIC = b"arena\x00\x00\x01"
_HEADER = struct.Struct("=8s8sIII")
_HEADER_BYTES = 64
_CELL_BYTES = 4 * 1024 * 1024
_MIN_SLOTS, _MAX_SLOTS = 32, 2048
_PUNCH_HOLE = 3  # with FALLOC_FL_KEEP_SIZE
_libc = ctypes.CDLL(None)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class ArenaSpec(NamedTuple):
    """What the agent tells a worker. `path` opens the file; `place`: the worker among the members."""

    path: str
    place: int


class Shape(NamedTuple):
    """How large an arena is: `slots` rows for each of `members`, `extents` of data."""

    members: int
    slots: int
    extents: int

    @classmethod
    def of(cls, size: int, members: int) -> Shape:
        slots = _CELL_BYTES // (4 * members * members)
        return cls(members, min(_MAX_SLOTS, max(_MIN_SLOTS, slots)), size // EXTENT)

    @property
    def rows(self) -> int:
        return self.members * self.slots

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """The table's arrays in their order: bytes of an item, number of items."""
        members, rows = self.members, self.rows
        by_member = ((8, members * len(BUDGETS)), (4, members), (4, members))
        by_row = ((8, rows), (8, rows), (4, rows), (1, rows))
        return (*by_member, *by_row, *((1, rows * members),) * 4, (1, self.extents), (4, 1))

    @property
    def table_bytes(self) -> int:
        used = _HEADER_BYTES + sum(_aligned(size * number) for size, number in self.parts)
        return -(-used // PAGE) * PAGE


def create(size: int, members: int) -> int:
    """A new arena of at most `size` bytes of data (0 is too few) for so many members: its file descriptor.

    Only the table has memory by then. Raises `OSError` where there is none, `ValueError` where the numbers
    make no arena."""
    if size < EXTENT or not 0 < members <= MEMBERS:
        raise ValueError(f"no arena of {size} bytes for {members} members")
    shape = Shape.of(size, members)
    fd = os.memfd_create("arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, shape.table_bytes + shape.extents * EXTENT)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)  # nobody's access can become a SIGBUS
        os.posix_fallocate(fd, 0, shape.table_bytes)
        os.pwrite(fd, _HEADER.pack(_MAGIC, secrets.token_bytes(8), *shape), 0)
    except OSError:
        os.close(fd)
        raise
    return fd


class Table:
    """The table in shared memory, and the file's lock. Data is not mapped here.

    `fd` is ours from here on, and must be an open file description of this process alone: the lock belongs
    to it. It is closed with the table. Raises `OSError` when it is no arena.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._inode = os.fstat(fd).st_ino
        weakref.finalize(self, _close, fd, self._inode).atexit = False
        header = os.pread(fd, _HEADER.size, 0)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise OSError("not an arena")
        _, self.id, *shape = _HEADER.unpack(header)
        self.shape = Shape(*shape)
        self.data_start = self.shape.table_bytes
        self.data_bytes = self.shape.extents * EXTENT
        whole = memoryview(mmap.mmap(fd, self.data_start))
        views: list[memoryview] = []
        position = _HEADER_BYTES
        for size, number in self.shape.parts:
            part = whole[position : position + size * number]
            views.append(part.cast("Q") if size == 8 else part.cast("I") if size == 4 else part)
            position += _aligned(size * number)
        self.used, self.life, self.high = views[:3]
        """By member: bytes in each budget; how many of its processes have died; how many of its rows have
        ever been in use."""
        self.start, self.length, self.generation, self.state = views[3:7]
        """By row: offset in the data, bytes, how often it was used, whether it is."""
        self.sent, self.opened, self.done, self.sender = views[7:11]
        """By row and member."""
        self.owner, self.wishes = views[11:]
        """By extent: member + 1, 0 or `KEEPER`. Alone: how often somebody found no room."""

    def intact(self) -> bool:
        """Whether `fd` is the file still: a program may close descriptors that it does not know."""
        return _is_file(self.fd, self._inode)

    def rows_of(self, member: int) -> range:
        """All rows of a member that have ever been in use."""
        first = member * self.shape.slots
        return range(first, first + self.high[member])

    def held(self, row: int) -> bool:
        """Whether some member holds the row or is about to. Its owner's own hold does not count."""
        first = row * self.shape.members
        last = first + self.shape.members
        # In this order: who forwards a handle sends first and is done after that.
        done = bytes(self.done[first:last])
        return done != bytes(self.sent[first:last])

    def on_way(self, cell: int) -> int:
        """Handles that were sent to the cell's member and not opened; more than 127: they were called back."""
        return (self.sent[cell] - self.opened[cell]) & 255

    @contextlib.contextmanager
    def lock(self, timeout: float) -> Iterator[bool]:
        """The lock between processes, for a few instructions. Gives False when it is not to be had within
        `timeout` seconds: a process that has it was stopped. Threads have a lock of their own before it."""
        limit = time.monotonic() + timeout
        while not (got := _try_lock(self.fd)) and time.monotonic() < limit:
            time.sleep(0.0001)
        try:
            yield got
        finally:
            if got:
                fcntl.flock(self.fd, fcntl.LOCK_UN)

    def punch(self, start: int, size: int) -> None:
        """Give the memory of this part of the data back to the system."""
        _libc.fallocate(self.fd, _PUNCH_HOLE, self.data_start + start, size)


def _aligned(size: int) -> int:
    return -(-size // 8) * 8


def _is_file(fd: int, inode: int) -> bool:
    try:
        return os.fstat(fd).st_ino == inode
    except OSError:
        return False


def _close(fd: int, inode: int) -> None:
    if _is_file(fd, inode):
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
