"""Who may send how much: credits in bytes per peer, and in items per stream. Pure bookkeeping.

A caller counts what it has sent to a peer and what has not been started there (`Window`): an answer says
that its call has, a CREDIT record says so of calls that run for long, of those that were dropped, and of casts
(`Credits` gathers what such a record says). What would go beyond the window waits at the caller. So what
queues at a receiver is bounded by the window, for each caller, however slow its handlers are.

A stream's producer is not asked for the next item while `ITEMS` items, or `ITEM_BYTES`, of it have not been
used up (`ItemWindow` there, `ItemsUsed` at the consumer).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from runtime.wire.frames import Buffer

WINDOW_BYTES = 16 * 1024**2
"""In flight to one peer at most, or else one single larger record."""
RECORD_BYTES = 256
"""What a record counts beside its body: what a queued call costs its receiver."""
TELL_BYTES = 1024**2
"""Credit is told at once when it comes to so much; less of it may wait a little."""

ITEMS = 16
ITEM_BYTES = 8 * 1024**2
_TELL_ITEMS = ITEMS // 4
_TELL_ITEM_BYTES = ITEM_BYTES // 4


def nbytes(buffer: Buffer) -> int:
    """The size of a buffer in bytes."""
    return buffer.nbytes if type(buffer) is memoryview else len(buffer)


def size_of(body: Buffer, buffers: Sequence[Buffer]) -> int:
    """What a call or cast counts in the window."""
    size = RECORD_BYTES + len(body)
    return size + sum(map(nbytes, buffers)) if buffers else size


class Window:
    """What is under way to one peer, in bytes. `waiting`: of what is held back here.

    Only the loop's thread changes it; any thread may read it.
    """

    __slots__ = ("_cast_bytes", "_casts_over", "_debts", "in_flight", "limit", "waiting")

    def __init__(self, limit: float = WINDOW_BYTES) -> None:
        self.limit = limit
        self.in_flight = 0
        self.waiting = 0
        self._cast_bytes = self._casts_over = 0
        self._debts: dict[int, int] = {}

    def __str__(self) -> str:
        return f"{self.in_flight} bytes are under way and {self.waiting} wait"

    def admits(self, size: int) -> bool:
        """May a record of `size` leave now? A larger one than the window, when nothing is under way."""
        return self.in_flight + size <= self.limit or not self.in_flight

    def full(self, size: int) -> bool:
        """Would a record of `size` have to wait?"""
        return self.waiting > 0 or not self.admits(size)

    def cast(self, size: int) -> None:
        """A cast has left."""
        self.in_flight += size
        self._cast_bytes += size

    def casts_over(self, total: int) -> None:
        """So many bytes of casts in all wait there no longer."""
        self.in_flight -= min(total, self._cast_bytes) - self._casts_over
        self._casts_over = min(total, self._cast_bytes)

    def owe(self, id: int, size: int) -> None:
        """Call `id` was given up here. It takes its place until the peer has noticed."""
        if size:
            self._debts[id] = size

    def settled(self, id: int) -> None:
        """The peer has noticed, or had answered before."""
        self.in_flight -= self._debts.pop(id, 0)

    def restart(self, in_flight: int) -> None:
        """A new link: casts and calls given up are not under way any more."""
        self.in_flight = in_flight
        self._cast_bytes = self._casts_over = 0
        self._debts.clear()


class Credits:
    """What a caller is still to be told of: its calls and casts that wait here no longer."""

    __slots__ = ("_bytes", "cast_bytes", "ids")

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.cast_bytes = self._bytes = 0

    def add(self, id: int, size: int) -> bool:
        """The call `id` (0: a cast) waits no longer. True when that is to be told at once."""
        if id:
            self.ids.append(id)
        else:
            self.cast_bytes += size
        self._bytes += size
        return self._bytes >= TELL_BYTES

    def take(self) -> tuple[int, list[int]] | None:
        """What to tell now: bytes of casts in all, and ids of calls. None: nothing new."""
        if not self._bytes:
            return None
        ids, self.ids = self.ids, []
        self._bytes = 0
        return self.cast_bytes, ids

    def restart(self) -> None:
        """A new link."""
        self.ids.clear()
        self.cast_bytes = self._bytes = 0


class ItemWindow:
    """A stream at its producer: what was sent of it and has not been used up."""

    __slots__ = ("_bytes", "_sizes", "_used")

    def __init__(self) -> None:
        self._sizes: deque[int] = deque()
        self._bytes = self._used = 0

    def open(self) -> bool:
        """May the next item be made?"""
        return not self._sizes or (len(self._sizes) < ITEMS and self._bytes < ITEM_BYTES)

    def sent(self, size: int) -> None:
        """An item has left."""
        self._sizes.append(size)
        self._bytes += size

    def used(self, total: int) -> None:
        """So many items in all have been used up, says the consumer."""
        while self._used < total and self._sizes:
            self._used += 1
            self._bytes -= self._sizes.popleft()


class ItemsUsed:
    """A stream at its consumer: which items the producer is to hear of."""

    __slots__ = ("_sizes", "_told", "_untold_bytes", "_used")

    def __init__(self) -> None:
        self._sizes: deque[int] = deque()
        self._used = self._told = self._untold_bytes = 0

    def came(self, size: int) -> None:
        """An item came in."""
        self._sizes.append(size)

    def use(self, items: int) -> int | None:
        """`items` more were used up: the total to tell the producer now, or None while it can wait."""
        for _ in range(min(items, len(self._sizes))):
            self._used += 1
            self._untold_bytes += self._sizes.popleft()
        if self._used - self._told < _TELL_ITEMS and self._untold_bytes < _TELL_ITEM_BYTES:
            return None
        self._told, self._untold_bytes = self._used, 0
        return self._used
