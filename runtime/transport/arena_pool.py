"""The part of an arena's data that this process owns: slots in extents that it takes and gives back.

Extents are taken when nothing that is owned has room, and their memory is asked for then, so that a lack of it
is an answer and no signal. They are given back when they have not been needed for some seconds, and soon
after another member has found no room. A thread does that, and touches new extents ahead of the copy that
they were taken for; it runs only while extents are owned.

What is written into slots and who is told of them is decided in `arena.py`.
"""

from __future__ import annotations

import ctypes
import heapq
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple, TypeVar

from runtime.transport.arena_table import BUDGETS, EXTENT, FREE, PAGE, USED, Table
from runtime.transport.ranges import Ranges

T = TypeVar("T")

MAP_NORESERVE = 0x4000  # `mmap` has no name for it
_POPULATE_WRITE = 23
_PIECE = 16 * 1024 * 1024
"""Touched at once: the process can map nothing else meanwhile."""
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
    """One row of ours with its data: `start` and `size` are whole pages. `claimed`: the extents from there on
    were taken for it, and have no memory yet."""

    row: int
    start: int
    size: int
    budget: int
    claimed: bool = False


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
        self._rows: list[int] = []
        self._waiting: dict[int, Slot] = {}
        self._cold: set[int] = set()
        self._touched = -1
        """The extent that the thread is just touching."""
        self._populates = True
        self._peak = 0
        self._peak_since = time.monotonic()
        self._wishes = table.wishes[0]
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False

    def take(self, size: int, budget: str) -> Slot | None:
        """Room for `size` bytes, or None. May have to ask the system for memory: not for the event loop
        where `size` is large."""
        size = -(-size // PAGE) * PAGE
        wishes = self._wishes
        slot = self._reserve(size, budget)
        if slot is None and wishes != self._wishes and self._give_back(0):
            # What is free here in pieces may be in a row with what others have given back.
            slot = self._reserve(size, budget)
        if slot is None or (slot.claimed and not self._back(slot)):
            return None
        return slot

    def drop(self, slot: Slot) -> None:
        """Its view is gone: free once nobody else holds it. Under the guard."""
        if self._table.held(slot.row):
            self._waiting[slot.row] = slot
        else:
            self._free(slot)

    def touch(self, start: int, size: int) -> None:
        """Have the system map those of these pages now that are new: quicker than one by one."""
        end = start + size
        while start < end and self._populates:
            part = min(_PIECE, end - start)
            extents = range(start // EXTENT, (start + part - 1) // EXTENT + 1)
            if not self._cold.isdisjoint(extents):
                self._populates = _libc.madvise(self.base + start, part, _POPULATE_WRITE) == 0
            start += part

    def close(self) -> None:
        """No more slots; the thread ends soon."""
        self._closed = True
        self._wake.set()

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
            claimed = start is None
            if start is None:
                start = self._claim(-(-size // EXTENT))
            if start is None:
                heapq.heappush(self._rows, row)
                return None
            slot = Slot(row, start, size, kind, claimed)
            self._account(slot, size)
            table.start[row], table.length[row] = start, size
            table.generation[row] = (table.generation[row] + 1) & 0xFFFFFFFF
            table.state[row] = USED
            return slot

    def _row(self) -> int | None:
        table, slots = self._table, self._table.shape.slots
        if not self._rows:
            first = self._me * slots
            states = bytes(table.state[first : first + slots])
            self._rows = [first + n for n, state in enumerate(states) if state == FREE]
        if not self._rows:
            return None
        row = heapq.heappop(self._rows)
        table.high[self._me] = max(table.high[self._me], row % slots + 1)
        return row

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
        heapq.heappush(self._rows, slot.row)

    # -- extents ------------------------------------------------------------------------------

    def _claim(self, number: int) -> int | None:
        """Own that many more extents in a row: where they start, or None. Under the guard."""
        table = self._table
        with table.lock(_LOCK_S) as locked:
            first = bytes(table.owner).find(bytes(number)) if locked else -1
            if first >= 0:
                table.owner[first : first + number] = bytes((self._me + 1,)) * number
                return first * EXTENT
        table.wishes[0] = self._wishes = (table.wishes[0] + 1) & 0xFFFFFFFF
        return None

    def _back(self, slot: Slot) -> bool:
        """Get the memory of the extents that were claimed for a slot. False: there is none, all is undone."""
        table, first = self._table, slot.start // EXTENT
        number = -(-slot.size // EXTENT)
        backed = False
        try:
            os.posix_fallocate(table.fd, table.data_start + slot.start, number * EXTENT)
            backed = True
        except OSError:  # none left here or in our cgroup, or interrupted
            pass
        finally:
            with self._guard:
                if rest := number * EXTENT - slot.size:
                    self._ranges.add(slot.start + slot.size, rest)
                if backed:
                    self._cold.update(range(first, first + number))
                    self._tend_soon()
                else:
                    self._free(slot)
                    self._ranges.remove(slot.start, number * EXTENT)
            if not backed:
                self._release(range(first, first + number))
        return backed

    def _give_back(self, above: int) -> bool:
        """Give back the extents from that address on in which nothing is."""
        with self._guard:
            owners = bytes(self._table.owner)
            mine, given = self._me + 1, []
            extent = owners.find(mine, -(-above // EXTENT))
            while extent >= 0:
                if extent != self._touched and self._ranges.remove(extent * EXTENT, EXTENT):
                    self._cold.discard(extent)
                    given.append(extent)
                extent = owners.find(mine, extent + 1)
        self._release(given)
        return bool(given)

    def _release(self, extents: Iterable[int]) -> None:
        for extent in extents:
            self._table.punch(extent * EXTENT, EXTENT)
            self._table.owner[extent] = 0

    # -- the thread ---------------------------------------------------------------------------

    def _tend_soon(self) -> None:
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._tend, name="arena", daemon=True)
            self._thread.start()
        self._wake.set()

    def _tend(self) -> None:
        while True:
            self._wake.wait(_TICK_S)
            self._wake.clear()
            while self._touch_last():
                pass
            with self._guard:
                self._sweep(len(self._waiting))
            self._give_back_idle()
            with self._guard:
                if self._closed or bytes(self._table.owner).find(self._me + 1) < 0:
                    self._thread = None
                    return

    def _touch_last(self) -> bool:
        """Touch the last of the new extents, while a copy goes on from the first."""
        with self._guard:
            extent = max(self._cold, default=-1) if self._populates and not self._closed else -1
            self._touched = extent
        if extent < 0:
            return False
        self.touch(extent * EXTENT, EXTENT)
        with self._guard:
            self._touched = -1
            self._cold.discard(extent)
        return True

    def _give_back_idle(self) -> None:
        wished, self._wishes = self._wishes != self._table.wishes[0], self._table.wishes[0]
        if wished or time.monotonic() - self._peak_since > _IDLE_S:
            self._give_back(0 if wished else self._peak)
            self._peak, self._peak_since = 0, time.monotonic()
