"""Large buffers between the processes of a host, copied once: by their sender, into memory that all share.

`stage` copies a buffer into a slot of ours; `share` makes a handle for one other member, a few bytes that
travel in the buffer's place; `open` makes a view of the slot's pages of it, private to the receiver, who may
write to it without anybody seeing that. Nobody sends a release: a view that is garbage counts itself off in
the table (`arena_table.py`), and the owner finds free slots when it needs one. No room is never an error.

A view that was written to is not what the slot holds any more: to be sent on, it is copied like any buffer.
A process that was forked from this one neither uses the arena nor lets go of what this one holds.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import struct
import weakref
from bisect import bisect_right, insort
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, NoReturn

from runtime.errors import WireError
from runtime.transport.arena_pool import MAP_NORESERVE, Guard, Pool, Slot
from runtime.transport.arena_table import FREE, PAGE, ArenaSpec, Table
from runtime.wire.frames import Buffer

logger = logging.getLogger(__name__)

__all__ = ["LEAST_BYTES", "Arena", "ArenaSpec"]

LEAST_BYTES = 64 * 1024
"""Smaller buffers are not worth a handle."""

_REFUSED: Final = "@B"
"""Format of views of what a budget had no room for; to all others it is the same as "B"."""
_HANDLE = struct.Struct("<8sIIQQ")
_LOCK_S = 0.005
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_WITH_GIL_BYTES = 1024 * 1024
"""Up to that, a copy takes less than getting the interpreter lock back may."""
_MOST_ON_WAY = 127
_MOST_HELD = 255


@dataclass(frozen=True, slots=True, eq=False)
class _Region:
    """What a view shows: our own slot, or pages of a slot that are mapped for it alone (`slot` None)."""

    address: int
    size: int
    row: int
    start: int
    slot: Slot | None


class Arena:
    """One process's access to the arena of its host. `share`, `open` and `discard` are for the event loop's
    thread, `stage` for any."""

    def __init__(self, spec: ArenaSpec) -> None:
        """Raises `OSError` where there is no such arena (any more)."""
        table = self._table = Table(os.open(spec.path, os.O_RDWR | os.O_CLOEXEC))
        self._me = spec.place
        self.id = table.id
        self.index = spec.place | table.life[spec.place] << 8
        """Who we are to others who `share`: our place among the members, and which process in it."""
        self._pid = os.getpid()
        self._guard = Guard(self._take_in)
        self._pool = Pool(table, self._me, self._guard)
        self._block = ctypes.c_char * table.data_bytes
        """Of an address: the object whose life is that of the views there."""
        self._regions: dict[int, _Region] = {}
        self._addresses: list[int] = []
        self._closed = False

    @classmethod
    def attach(cls, spec: tuple[str, int] | None) -> Arena | None:
        """The arena that an agent told of; None where there is none or it cannot be opened."""
        if spec is None:
            return None
        try:
            return cls(ArenaSpec(*spec))
        except OSError as error:
            logger.debug("no arena: %s", error)
            return None

    # -- sending ------------------------------------------------------------------------------

    def stage(self, buffer: Buffer, budget: str = "rpc") -> memoryview | None:
        """A copy of `buffer` in a slot of ours, as a writable view; the slot is ours until the view and all
        that was made of it is garbage. None: no room within `budget`, or not worth it."""
        source = memoryview(buffer)
        if source.nbytes < LEAST_BYTES or source.format == _REFUSED or not self._usable():
            return None
        slot = self._pool.take(source.nbytes, budget)
        if slot is None:
            return None
        copied = False
        try:
            copied = self._copy(slot, source)
        finally:
            if not copied:
                with self._guard:
                    self._pool.drop(slot)
        if not copied:
            return None
        region = _Region(self._pool.base + slot.start, slot.size, slot.row, slot.start, slot)
        return self._view(region)[: source.nbytes]

    def staged(self, buffer: Buffer, budget: str) -> Buffer:
        """As `stage`. Without room the buffer itself, marked: it is not staged later, under another budget."""
        if memoryview(buffer).nbytes < LEAST_BYTES:
            return buffer
        return self.stage(buffer, budget) or memoryview(buffer).cast("B").cast(_REFUSED)

    def share(self, buffer: Buffer, member: int) -> bytes | None:
        """A handle by which that member (its `index`) can open the bytes of `buffer`, once. Buffers that are
        in the arena are not copied. None: no room, or that process is gone; send them otherwise.
        """
        if not self._usable():
            return None
        with _pointer(buffer) as address:
            region = self._shared_region(address, memoryview(buffer).nbytes)
            if region is not None:
                return self._send(region, address - region.address, buffer, member)
        staged = self.stage(buffer)
        return None if staged is None else self.share(staged, member)

    def is_staged(self, buffer: Buffer) -> bool:
        """Whether `share` would not have to copy it."""
        with _pointer(buffer) as address:
            return self._shared_region(address, memoryview(buffer).nbytes) is not None

    def revoke(self, handle: bytes, member: int) -> None:
        """This handle was never sent, and will not be."""
        row = _HANDLE.unpack(handle)[1]
        cell = row * self._table.shape.members + (member & 255)
        with self._guard, self._table.lock(_LOCK_S) as locked:
            if (
                locked
                and self._table.life[member & 255] == member >> 8
                and self._table.on_way(cell)
            ):
                self._table.sent[cell] = (self._table.sent[cell] - 1) & 255

    # -- receiving ----------------------------------------------------------------------------

    def open(self, handle: bytes) -> memoryview:
        """The bytes that a handle stands for, as a view of our own that may be written to. They stay until it,
        and all that was made of it, is garbage. Raises `WireError` for a handle that is none, or not
        ours, or older than what is there now."""
        row, start, length = self._receive(handle)
        try:
            return self._map(row, start, length)
        except OSError:  # the process may have no more mappings: it gets a copy
            try:
                return self._read(start, length)
            finally:
                with self._guard:
                    self._count_off(row)

    def discard(self, handle: bytes) -> None:
        """Let go of a handle that is not to be opened. Raises `WireError` as `open` does."""
        row, _, _ = self._receive(handle)
        with self._guard:
            self._count_off(row)

    def close(self) -> None:
        """No more handles or slots. What was opened stays readable; what others hold, they hold."""
        if not self._closed and os.getpid() == self._pid:
            self._closed = True
            self._pool.close()

    # -- parts --------------------------------------------------------------------------------

    def _usable(self) -> bool:
        if self._closed or os.getpid() != self._pid:
            return False
        if not self._table.intact():
            logger.debug(
                "the arena's file descriptor was closed by somebody: it is not used any more"
            )
            self.close()
            return False
        return True

    def _copy(self, slot: Slot, source: memoryview) -> bool:
        """False: there is no memory."""
        pool, start, size = self._pool, slot.start, source.nbytes
        if size <= _WITH_GIL_BYTES:
            flat = source if source.format == "B" and source.ndim == 1 else source.cast("B")
            if slot.bare < slot.end:
                return pool.write(slot, flat)
            pool.data[start : start + size] = flat
            return True
        if slot.bare < slot.end and not pool.back(slot):
            return False
        with _pointer(source) as address:  # in one go: the interpreter lock is got once
            ctypes.memmove(pool.base + start, address, size)
        return True

    def _map(self, row: int, start: int, length: int) -> memoryview:
        """A private view. Raises `OSError`."""
        first = start - start % PAGE
        size = start + length - first
        flags = mmap.MAP_PRIVATE | MAP_NORESERVE
        at = self._table.data_start + first
        address = _libc.mmap(None, size, _READ_WRITE, flags, self._table.fd, at)
        if address == _MAP_FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        view = self._view(_Region(address, size, row, first, None))
        return view[start - first : start - first + length]

    def _view(self, region: _Region) -> memoryview:
        """From the region's address on; what is made of it keeps the region."""
        block = self._block.from_address(region.address)
        with self._guard:
            insort(self._addresses, region.address)
            self._regions[region.address] = region
        weakref.finalize(block, self._dropped, region).atexit = False
        return memoryview(block).cast("B")

    def _read(self, start: int, length: int) -> memoryview:
        copy = memoryview(bytearray(length))
        at, left = self._table.data_start + start, copy
        while left and (count := os.preadv(self._table.fd, [left], at)):  # at most 2 GiB at a time
            at, left = at + count, left[count:]
        if left:
            _stale(f"{len(left)} of {length} bytes are missing")
        return copy

    def _shared_region(self, address: int, size: int) -> _Region | None:
        """The region that these bytes lie in, if they are what the slot holds."""
        with self._guard:
            place = bisect_right(self._addresses, address) - 1
            region = self._regions[self._addresses[place]] if place >= 0 else None
        if region is None or address + size > region.address + region.size:
            return None
        if region.slot is None and _written_to(address, size):
            return None
        return region

    def _send(self, region: _Region, skip: int, buffer: Buffer, member: int) -> bytes | None:
        table, row = self._table, region.row
        index, life = member & 255, member >> 8
        if index >= table.shape.members:
            return None
        cell = row * table.shape.members + index
        with self._guard, table.lock(_LOCK_S) as locked:
            on_way = table.on_way(cell)
            held = (table.sent[cell] - table.done[cell]) & 255
            others = on_way and table.sender[cell] != self._me + 1
            full = on_way >= _MOST_ON_WAY or held >= _MOST_HELD
            if not locked or table.life[index] != life or others or full:
                return None
            table.sender[cell] = self._me + 1
            table.sent[cell] = (table.sent[cell] + 1) & 255
            generation = table.generation[row]
        start = region.start + skip
        return _HANDLE.pack(table.id, row, generation, start, memoryview(buffer).nbytes)

    def _receive(self, handle: bytes) -> tuple[int, int, int]:
        """Check a handle and count it as opened: its row, and where its bytes are."""
        table, shape = self._table, self._table.shape
        if not self._usable():
            _stale("the arena is closed")
        if len(handle) != _HANDLE.size:
            _stale(f"{len(handle)} bytes")
        identity, row, generation, start, length = _HANDLE.unpack(handle)
        if identity != table.id or row >= shape.rows:
            _stale(f"of another arena, row {row}")
        first, size = table.start[row], table.length[row]
        inside = first <= start and length > 0 and start + length <= first + size
        cell = row * shape.members + self._me
        with self._guard:
            known = table.generation[row] == generation and table.state[row] != FREE
            if not known or not inside or not 0 < table.on_way(cell) <= _MOST_ON_WAY:
                _stale(f"row {row}, generation {generation}")
            table.opened[cell] = (table.opened[cell] + 1) & 255
            if table.generation[row] != generation or table.on_way(cell) > _MOST_ON_WAY:
                self._count_off(row)  # the agent has called it back meanwhile
                _stale(f"row {row}, generation {generation}")
        return row, start, length

    def _count_off(self, row: int) -> None:
        cell = row * self._table.shape.members + self._me
        self._table.done[cell] = (self._table.done[cell] + 1) & 255

    # -- garbage ------------------------------------------------------------------------------

    def _dropped(self, region: _Region) -> None:
        """A view is gone. Runs wherever the collector does: under our own lock, too."""
        if os.getpid() == self._pid:
            self._guard.drop(region)

    def _take_in(self, region: _Region) -> None:
        del self._regions[region.address]
        self._addresses.pop(bisect_right(self._addresses, region.address) - 1)
        if region.slot is not None:
            self._pool.drop(region.slot)
        else:
            _libc.munmap(region.address, region.size)
            self._count_off(region.row)


# Python's own `mmap` would keep a file descriptor for each view. These keep the interpreter lock: they are short.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_size_t
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_size_t(-1).value


def _stale(detail: str) -> NoReturn:
    raise WireError("stale arena handle", detail)


class _PyBuffer(ctypes.Structure):
    """`Py_buffer` of the C API."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("rest", ctypes.c_void_p * 16),
    )


@contextmanager
def _pointer(buffer: Buffer) -> Iterator[int]:
    """Where the bytes of a contiguous buffer are; they stay there inside of the block."""
    found = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(buffer), ctypes.byref(found), 0)
    try:
        yield found.buf or 0
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(found))


_PAGEMAP_ENTRY = 8
_UNWRITTEN = bytes(byte for byte in range(256) if not byte & 0xC0 or byte & 0x20)
"""Top bytes of /proc's entries for pages that are not there, or are the file's. Others are copies of our own."""


def _written_to(address: int, size: int) -> bool:
    """Whether a page of this private mapping is a copy of our own by now; True when that cannot be seen."""
    first = address // PAGE
    last = -(-(address + size) // PAGE)
    wanted = (last - first) * _PAGEMAP_ENTRY
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        entries = os.pread(fd, wanted, first * _PAGEMAP_ENTRY)
    except OSError:
        return True
    finally:
        os.close(fd)
    own = entries[_PAGEMAP_ENTRY - 1 :: _PAGEMAP_ENTRY].translate(None, _UNWRITTEN)
    return len(entries) < wanted or bool(own)
