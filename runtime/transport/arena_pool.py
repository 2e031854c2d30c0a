"""The part of an arena's data that this process owns: slots in extents that it takes and gives back.

Extents are taken when nothing that is owned has room. Their memory is asked for slot by slot, before anything
touches it, so that a lack of it is an answer and no signal. They are given back when they have not been needed for
some seconds, and soon after another member has found no room. A thread does that, and helps to touch the new
memory of large slots; it sleeps while no extents are owned.

What is written into slots and who is told of them is decided in `arena.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import Generic, NamedTuple, TypeVar

from runtime.transport.arena_table import BUDGETS, EXTENT, FREE, PAGE, USED, Table
from runtime.transport.ranges import Ranges

T = TypeVar("T")

MAP_NORESERVE = 0x4000  # `mmap` has no name for it
_POPULATE_WRITE = 23
_PIECE = 2 * 1024 * 1024
"""Touched at once: the process can map nothing else meanwhile."""
_PIECES_ALONE = 4
"""For more, the thread helps."""
_LOCK_S = 0.005
_TICK_S = 1.0
_IDLE_S = 5.0
_SWEPT_AT_ONCE = 32

_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Guard(Generic[T]):
    """A lock between threads. What is garbage is taken in by whoever has it: finalizers run anywhere, under this
    very lock, too, so they may not wait for it."""

    def __init__(self, take_in: Callable[[T], None]) -> None:
        self._lock = threading.Lock()
        self._take_in = take_in
        self._garbage: deque[T] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()
        self.drain()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self._tidy()

    def drop(self, item: T) -> None:
        """Never waits."""
        self._garbage.append(item)
        self._tidy()

    def drain(self) -> None:
        """Under the lock."""
        while self._garbage:
            self._take_in(self._garbage.popleft())

    def _tidy(self) -> None:
        while self._garbage and self._lock.acquire(blocking=False):
            try:
                self.drain()
            finally:
                self._lock.release()


class Slot(NamedTuple):
    """One row of ours with its data: `start` and `size` are whole pages. `bare`: from there on it has had no
    memory yet, its end if it had."""

    row: int
    start: int
    size: int
    budget: int
    bare: int

    @property
    def end(self) -> int:
        return self.start + self.size


class Pool:
    """Slots of the member `me`. Methods take `guard` themselves unless they say otherwise."""

    def __init__(self, table: Table, me: int, guard: Guard[T]) -> None:
        self._table, self._me, self._guard = table, me, guard
        self._map = mmap.mmap(
            table.fd,
            table.data_bytes,
            flags=mmap.MAP_SHARED | MAP_NORESERVE,
            offset=table.data_start,
        )
        self.data = memoryview(self._map)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._ranges = Ranges()
        self._waiting: dict[int, Slot] = {}
        self._bare: dict[int, int] = {}
        """Extents of ours that lack memory, and from where on: below that they have it, or a slot gets it."""
        self._untouched: deque[tuple[int, int]] = deque()
        """Starts and sizes of new memory that somebody is just touching, from the first on."""
        self._touched = -1
        """The extent that the thread is just touching."""
        self._peak = 0
        self._peak_since = time.monotonic()
        self._wishes = table.wishes[0]
        self._ticks = False
        """The thread looks for what can be given back: from the first slot that is dropped until nothing is owned."""
        self._wake: SimpleQueue[None] = SimpleQueue()
        """For the thread. Finalizers may put into it wherever they run, under its own lock, too."""
        self._closed = False
        # From the start: it takes longer to start than the copy of a megabyte does.
        self._thread = threading.Thread(target=self._tend, name="arena", daemon=True)
        self._thread.start()

    def take(self, size: int, budget: str) -> Slot | None:
        """Room for `size` bytes, or None. What is `bare` of it needs `write` or `back` first of all."""
        size = -(-size // PAGE) * PAGE
        wishes = self._wishes
        slot = self._reserve(size, budget)
        if slot is None and wishes != self._wishes and self._give_back(0):
            # What is free here in pieces may be in a row with what others have given back.
            slot = self._reserve(size, budget)
        return slot

    def drop(self, slot: Slot) -> None:
        """Its view is gone: free once nobody else holds it. Under the guard."""
        if not self._ticks:
            self._ticks = True
            self._wake.put(None)
        if self._table.held(slot.row):
            self._waiting[slot.row] = slot
        else:
            self._free(slot)

    def write(self, slot: Slot, data: memoryview) -> bool:
        """Copy into a slot that lacks memory, which the system finds meanwhile. False: there is none."""
        at = self._table.data_start + slot.start
        return self._ask(slot, lambda: os.pwrite(self._table.fd, data, at), data.nbytes)

    def back(self, slot: Slot) -> bool:
        """Get the memory that a large slot lacks, and have the system map it: two threads do so from both ends,
        quicker than page by page. False: there is none."""
        at, size = self._table.data_start + slot.bare, slot.end - slot.bare
        if not self._ask(slot, lambda: os.posix_fallocate(self._table.fd, at, size), None):
            return False
        starts = range(slot.bare, slot.end, _PIECE)
        pieces = deque((start, min(_PIECE, slot.end - start)) for start in starts)
        if len(pieces) > _PIECES_ALONE:
            self._untouched = pieces
            self._wake.put(None)
        try:
            while pieces:
                with contextlib.suppress(IndexError):  # the thread was quicker
                    self._populate(*pieces.popleft())
        finally:
            pieces.clear()
        return True

    def close(self) -> None:
        """No more slots; the thread ends soon."""
        self._closed = True
        self._wake.put(None)

    # -- slots, under the guard ---------------------------------------------------------------

    def _reserve(self, size: int, budget: str) -> Slot | None:
        kind = list(BUDGETS).index(budget)
        with self._guard:
            self._sweep(_SWEPT_AT_ONCE)
            table = self._table
            used = sum(table.used[kind :: len(BUDGETS)])
            if self._closed or used + size > BUDGETS[budget] * table.data_bytes:
                return None
            row = self._row()
            if row is None:
                return None
            start = self._ranges.take(size)
            if start is None and self._sweep(len(self._waiting)):
                start = self._ranges.take(size)
            if start is None:
                start = self._claim(-(-size // EXTENT), size)
            if start is None:
                return None
            slot = Slot(row, start, size, kind, self._clothe(start, start + size))
            self._account(slot, size)
            table.start[row], table.length[row] = start, size
            table.generation[row] = (table.generation[row] + 1) & 0xFFFFFFFF
            table.state[row] = USED
            return slot

    def _row(self) -> int | None:
        table, slots = self._table, self._table.shape.slots
        first = self._me * slots
        place = bytes(table.state[first : first + slots]).find(FREE)
        if place < 0:
            return None
        table.high[self._me] = max(table.high[self._me], place + 1)
        return first + place

    def _account(self, slot: Slot, size: int) -> None:
        self._table.used[self._me * len(BUDGETS) + slot.budget] += size
        self._peak = max(self._peak, slot.start + slot.size)

    def _sweep(self, most: int) -> bool:
        """Look at slots that had holders, the oldest first: is one free now?"""
        found = False
        for row in list(self._waiting)[:most]:
            slot = self._waiting.pop(row)
            if self._table.held(row):
                self._waiting[row] = slot
            else:
                self._free(slot)
                found = True
        return found

    def _free(self, slot: Slot) -> None:
        self._table.state[slot.row] = FREE
        self._account(slot, -slot.size)
        self._ranges.add(slot.start, slot.size)

    # -- extents ------------------------------------------------------------------------------

    def _claim(self, number: int, size: int) -> int | None:
        """Own that many more extents in a row, `size` bytes of which are used at once: where they start, or
        None. Under the guard."""
        table = self._table
        with table.lock(_LOCK_S) as locked:
            first = bytes(table.owner).find(bytes(number)) if locked else -1
            if first >= 0:
                table.owner[first : first + number] = bytes((self._me + 1,)) * number
                start = first * EXTENT
                self._bare.update((e, e * EXTENT) for e in range(first, first + number))
                if rest := number * EXTENT - size:
                    self._ranges.add(start + size, rest)
                return start
        table.wishes[0] = self._wishes = (table.wishes[0] + 1) & 0xFFFFFFFF
        return None

    def _clothe(self, start: int, end: int) -> int:
        """A slot takes these bytes and sees to their memory: from where on they lack it. Under the guard."""
        bare = end
        for extent in _extents(start, end) if self._bare else ():
            if (mark := self._bare.get(extent, end)) < end:
                bare = min(bare, max(mark, start))
                if end >= (extent + 1) * EXTENT and start <= mark:
                    del self._bare[extent]
                elif start <= mark:  # else what is between stays without
                    self._bare[extent] = end
        return bare

    def _ask(self, slot: Slot, system: Callable[[], object], answer: object) -> bool:
        """Do what gets a slot its memory. Without that answer the slot's extents lack it still."""
        got = False
        try:
            got = system() == answer
        except OSError:  # none left here or in our cgroup
            pass
        finally:
            if not got:
                with self._guard:
                    for extent in _extents(slot.bare, slot.end):
                        mark = self._bare.get(extent, slot.end)
                        self._bare[extent] = min(mark, max(slot.bare, extent * EXTENT))
        return got

    def _give_back(self, above: int) -> bool:
        """Give back the extents from that address on in which nothing is."""
        with self._guard:
            owners = bytes(self._table.owner)
            mine, given = self._me + 1, []
            extent = owners.find(mine, -(-above // EXTENT))
            while extent >= 0:
                if extent != self._touched and self._ranges.remove(extent * EXTENT, EXTENT):
                    given.append(extent)
                extent = owners.find(mine, extent + 1)
        self._release(given)
        return bool(given)

    def _release(self, extents: Iterable[int]) -> None:
        for extent in extents:
            self._table.punch(extent * EXTENT, EXTENT)
            self._table.owner[extent] = 0

    # -- the thread ---------------------------------------------------------------------------

    def _tend(self) -> None:
        while not self._closed:
            woken = False
            with contextlib.suppress(Empty):
                self._wake.get(timeout=_TICK_S if self._ticks else None)
                woken = True
            while self._touch_last():
                pass
            if not woken:
                with self._guard:
                    self._sweep(len(self._waiting))
                self._give_back_idle()
            with self._guard:
                self._ticks = bytes(self._table.owner).find(self._me + 1) >= 0

    def _touch_last(self) -> bool:
        with self._guard:
            piece = self._untouched.pop() if self._untouched else None
            self._touched = piece[0] // EXTENT if piece else -1
        if piece:
            self._populate(*piece)
        return piece is not None

    def _populate(self, start: int, size: int) -> None:
        _libc.madvise(self.base + start, size, _POPULATE_WRITE)  # before Linux 5.14 it does nothing

    def _give_back_idle(self) -> None:
        wished, self._wishes = self._wishes != self._table.wishes[0], self._table.wishes[0]
        if wished or time.monotonic() - self._peak_since > _IDLE_S:
            self._give_back(0 if wished else self._peak)
            self._peak, self._peak_since = 0, time.monotonic()


def _extents(start: int, end: int) -> range:
    return range(start // EXTENT, -(-end // EXTENT))
