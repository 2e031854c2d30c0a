"""Messages on a byte stream: what the local lane writes, and how it is taken apart again. No I/O.

    12 bytes    three little-endian numbers: bytes of part 0, count of the other parts, file descriptors
    8 each      the size of every other part; `SHARED` is set where a handle of the arena stands in its place
    the rest    part 0, then the other parts, as they are

The parts are those of `wire.frames`. Small messages are received many at a time into one space that all links of
a process share. A message that holds a large part, or more than the space, is received into memory of its own:
nothing of it is copied again, and nothing of it is more than was announced.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence

from runtime.errors import WireError
from runtime.transport.bulk import allocate
from runtime.wire.frames import Buffer, Limits

PREFIX = struct.Struct("<III")
SHARED = 1 << 63
"""In the size of a part: it is a handle."""
LARGE = 64 * 1024
"""From that size on a part is written from where it lies and received into memory of its own."""
SPACE = 1024 * 1024
"""Bytes of the shared space; more than any table of sizes."""
HANDLE_BYTES = 64

_TURN = 64 * 1024
"""Small messages are received so much at a time: others have their turn."""


def new_space() -> memoryview:
    """Not resident until it is used."""
    return memoryview(mmap.mmap(-1, SPACE))


def encode(parts: Sequence[Buffer], shared: frozenset[int], descriptors: int) -> list[Buffer]:
    """What to write for the parts of one message, the small ones joined. `shared`: which are handles."""
    views = [memoryview(part).cast("B") for part in parts]
    sizes = [
        view.nbytes | SHARED if index in shared else view.nbytes for index, view in enumerate(views)
    ]
    count = len(parts) - 1
    small: list[Buffer] = [
        PREFIX.pack(sizes[0], count, descriptors),
        struct.pack(f"<{count}Q", *sizes[1:]),
    ]
    chunks: list[Buffer] = []
    for view in views:
        if view.nbytes < LARGE:
            small.append(view)
            continue
        if small:
            chunks.append(b"".join(small))
            small = []
        chunks.append(view)
    if small:
        chunks.append(b"".join(small))
    return chunks


class Decoder:
    """Takes the messages of one stream apart: receive into `room()`, say how much came when asking for the `next`
    message, and ask again until there is none. `space` is shared: all that is done without a pause."""

    def __init__(self, space: memoryview, limits: Limits) -> None:
        self.descriptors = 0
        """That belong to the last message."""
        self.shared: list[int] = []
        """Which parts of the last message are handles."""
        self._space = space
        self._limits = limits
        self._at = self._end = 0
        self._rest = b""
        self._large: _Large | None = None

    @property
    def pending(self) -> bool:
        """Whether a part of a message has come, but not all of it."""
        return self._at < self._end or bool(self._rest) or self._large is not None

    def room(self) -> memoryview:
        """Where the next bytes go."""
        if self._large is not None:
            return self._large.room()
        self._at, self._end = 0, len(self._rest)
        if self._end:
            self._space[: self._end] = self._rest
            self._rest = b""
        return self._space[self._end : self._end + _TURN]

    def next(self, came: int = 0) -> list[Buffer] | None:
        """The parts of the next message; None when there is none yet. `came`: bytes received since the last
        time. Raises `WireError`."""
        if self._large is not None:
            self._large.came(came)
            return self._next_large(self._large)
        at, end = self._at, self._end + came
        self._end = end
        start = at + 12
        if start > end:
            return self._keep() if at < end else None
        head, count, self.descriptors = PREFIX.unpack_from(self._space, at)
        if count == 0 and start + head <= end:
            self._at = start + head
            if self.shared:
                self.shared = []
            return [self._space[start : start + head].tobytes()]
        return self._parts(start, head, count)

    def _keep(self) -> list[Buffer] | None:
        """Wait for more. Others use the space meanwhile."""
        self._rest = self._space[self._at : self._end].tobytes()
        self._at = self._end = 0
        return None

    def _parts(self, start: int, head: int, count: int) -> list[Buffer] | None:
        limits = self._limits
        if not 0 < head <= limits.batch_bytes:
            raise WireError("oversized header", f"{head} bytes, at most {limits.batch_bytes}")
        if count > limits.buffers:
            raise WireError("buffer count", f"{count}, at most {limits.buffers}")
        table = start + 8 * count
        if table > self._end:
            return self._keep()
        sizes = [head, *struct.unpack_from(f"<{count}Q", self._space, start)]
        for size in sizes:
            if size > limits.buffer_bytes and not SHARED < size <= SHARED + HANDLE_BYTES:
                raise WireError("oversized buffer", f"{size} bytes, at most {limits.buffer_bytes}")
        self.shared = [index for index, size in enumerate(sizes) if size & SHARED]
        lengths = [size & ~SHARED for size in sizes]
        stop = table + sum(lengths)
        if max(lengths) < LARGE and stop - self._at < SPACE // 2:
            if stop > self._end:
                return self._keep()
            self._at = stop
            return _carve(lengths, iter([self._space[table:stop]]))
        large = _Large(lengths)
        self._at = table + large.take(self._space[table : self._end])
        return self._next_large(large)

    def _next_large(self, large: _Large) -> list[Buffer] | None:
        if large.done:
            self._large = None
            return _carve(large.lengths, iter(large.filled))
        self._large = large
        return None


class _Large:
    """A message that is being put together: stretches of small parts, and each large part on its own."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.filled: list[memoryview] = []
        self._wanted: list[int] = []
        joins = False
        for length in lengths:
            small = length < LARGE
            if small and joins:
                self._wanted[-1] += length
            else:
                self._wanted.append(length)
            joins = small
        self._used = 0
        self._current = allocate(self._wanted[0])

    @property
    def done(self) -> bool:
        return len(self.filled) == len(self._wanted)

    def room(self) -> memoryview:
        return self._current[self._used :]

    def came(self, count: int) -> None:
        """So much was received into the room."""
        self._used += count
        while self._used == len(self._current) and not self.done:
            self.filled.append(self._current)
            self._used = 0
            if not self.done:
                self._current = allocate(self._wanted[len(self.filled)])

    def take(self, data: memoryview) -> int:
        """Copy what has come already; gives how much of it was ours."""
        at = 0
        while at < len(data) and not self.done:
            room = self.room()
            piece = data[at : at + len(room)]
            room[: len(piece)] = piece
            at += len(piece)
            self.came(len(piece))
        return at


def _carve(lengths: list[int], stretches: Iterator[memoryview]) -> list[Buffer]:
    """The parts. Small ones are copied, lest one of them keeps all its neighbours in memory."""
    made: list[Buffer] = []
    joins, stretch, at = False, memoryview(b""), 0
    for length in lengths:
        if length >= LARGE:
            made.append(next(stretches))
            joins = False
            continue
        if not joins:
            stretch, at, joins = next(stretches), 0, True
        made.append(bytearray(stretch[at : at + length]))
        at += length
    return made
