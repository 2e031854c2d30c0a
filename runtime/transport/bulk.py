"""Large buffers: how they leave a record, travel in pieces on a bulk link, and come back together.

A record with large buffers is *split*: on the RPC link goes what is left of it, with a list of what was cut out
(`encode_split`); the buffers follow as *transfers*, in pieces, on the bulk link of the same two peers. Each
direction of an RPC link numbers its transfers, and both the lists and the pieces come in the order of those numbers,
on two connections: either may be first. So whole records are put together by counting.

An ordered record that is not whole yet holds the ordered ones behind it. This module keeps the books of both
directions and checks all that comes in; which links there are, and when they send, is `transport.router`'s business.
"""

from __future__ import annotations

import mmap
import struct
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from runtime.errors import WireError
from runtime.wire import frames
from runtime.wire.frames import Buffer, Limits, Record

_SPLIT = struct.Struct("<?Q")  # is it ordered; the number of the first transfer
_CUT = struct.Struct("<IQ")  # which buffer of the record, its size
_PIECE = struct.Struct("<QQQ")  # the transfer's number and size, the piece's offset

_HUGE_BYTES = 2 * 1024 * 1024


class Message(NamedTuple):
    """What leaves a link in one go: the parts, how many records and bytes they are."""

    parts: list[Buffer]
    records: int
    size: int


class Split(NamedTuple):
    """A record that is to leave, without its large buffers; those, by place."""

    rest: Record
    large: list[tuple[int, memoryview]]

    @property
    def size(self) -> int:
        """Bytes of the large buffers."""
        return sum(len(view) for _, view in self.large)


def split(record: Record, threshold: int) -> Split | None:
    """Cut out the buffers of `threshold` bytes and more; None when there are none."""
    views = [memoryview(buffer) for buffer in record.buffers]
    large = [(at, view.cast("B")) for at, view in enumerate(views) if view.nbytes >= threshold]
    if not large:
        return None
    small = [b for b, view in zip(record.buffers, views, strict=True) if view.nbytes < threshold]
    return Split(Record(record.header, small), large)


class Departures:
    """The transfers of one direction of a link that have not left yet. Emptied piece by piece, as an `Outbox` is."""

    def __init__(self, piece_bytes: int) -> None:
        self.queued = 0
        """Bytes that may leave: their record has left."""
        self.total = 0
        """Bytes that may leave or wait for their record to do so."""
        self._piece_bytes = piece_bytes
        self._views: deque[memoryview] = deque()
        self._number = 0
        self._offset = 0

    def announce(self, item: Split, ordered: bool) -> list[Buffer]:
        """The record leaves: its message. The transfers may follow."""
        number = self._number + len(self._views)
        text = _SPLIT.pack(ordered, number)
        text += b"".join(_CUT.pack(at, len(view)) for at, view in item.large)
        self._views.extend(view for _, view in item.large)
        self.queued += item.size
        return frames.encode_batch([Record(text), item.rest], frames.SPLIT)

    def message(self) -> Message:
        """The next piece, as it leaves."""
        view = self._views[0]
        at, size = self._offset, len(view)
        piece = view[at : at + self._piece_bytes]
        text = _PIECE.pack(self._number, size, at)
        self._offset = at + len(piece)
        if self._offset == size:
            self._views.popleft()
            self._number += 1
            self._offset = 0
        self.queued -= len(piece)
        self.total -= len(piece)
        parts = frames.encode_batch([Record(text, [piece])], frames.PIECE)
        return Message(parts, 0, len(piece))

    def clear(self) -> None:
        self._views.clear()
        self.queued = self.total = 0


class _Incomplete(NamedTuple):
    """A record that waits for its large buffers: their places and sizes, and the number of the first."""

    rest: Record
    cuts: list[tuple[int, int]]
    number: int


class Arrivals:
    """The records of one direction of a link that came in parts or behind such, and their transfers."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held: deque[Record | _Incomplete] = deque()
        self._loose: deque[_Incomplete] = deque()
        self._announced = 0
        """Transfers that were listed so far."""
        self._finished = 0
        """Transfers that came in whole so far, also the number of the one that comes in now."""
        self._whole: dict[int, memoryview] = {}
        self._view: memoryview | None = None
        self._got = 0

    @property
    def waiting(self) -> bool:
        """Is there a record that is not whole, or one behind such?"""
        return bool(self._held or self._loose)

    def behind(self, records: list[Record]) -> list[Record]:
        """Ordered records came in: those that may be delivered now."""
        if not self._held:
            return records
        self._held.extend(records)
        return []

    def announced(self, records: Sequence[Record]) -> list[Record]:
        """The message of a split record came in: what may be delivered now. Raises `WireError`."""
        if len(records) != 2 or records[0].buffers:
            raise WireError("malformed split", f"{len(records)} records")
        text, rest = records[0].header, records[1]
        size, odd = divmod(len(text) - _SPLIT.size, _CUT.size)
        if odd or not 0 < size <= self._limits.record_buffers:
            raise WireError("malformed split", f"{len(text)} bytes")
        ordered, number = _SPLIT.unpack_from(text)
        cuts = list(_CUT.iter_unpack(text[_SPLIT.size :]))
        if number != self._announced:
            raise WireError("transfer number", f"{number}, {self._announced} is next")
        places = [at for at, _ in cuts]
        if places != sorted(set(places)) or places[-1] >= len(rest.buffers) + len(cuts):
            raise WireError("malformed split", f"buffers {places[:9]}")
        for _, length in cuts:
            self._check_size(length)
        self._announced += len(cuts)
        (self._held if ordered else self._loose).append(_Incomplete(rest, cuts, number))
        return self._deliverable()

    def piece(self, records: Sequence[Record]) -> list[Record]:
        """A piece came in: what may be delivered now. Raises `WireError`."""
        if len(records) != 1 or len(records[0].buffers) != 1 or len(records[0].header) != 24:
            raise WireError("malformed piece", f"{len(records)} records")
        (data,) = records[0].buffers
        number, size, offset = _PIECE.unpack(records[0].header)
        if number != self._finished:
            known = "truncated transfer" if self._view is not None else "unknown transfer"
            raise WireError(known, f"{number}, {self._finished} is to come")
        length, end = len(data), offset + len(data)
        if offset != self._got:
            raise WireError("piece out of place", f"at {offset}, {self._got} is next")
        if not length or end > size or (self._view is not None and size != len(self._view)):
            raise WireError("piece out of range", f"{length} bytes at {offset} of {size}")
        if self._view is None:
            self._check_ahead(number, size)
            # A transfer of one piece is where it should be.
            self._view = memoryview(data) if length == size else allocate(size)
        if length != size:
            self._view[offset:end] = data
        self._got = end
        if end < size:
            return []
        self._whole[number], self._view, self._got = self._view, None, 0
        self._finished += 1
        return self._deliverable() if number < self._announced else []

    def _check_size(self, size: int) -> None:
        if not 0 < size <= self._limits.buffer_bytes:
            raise WireError(
                "oversized buffer", f"{size} bytes, at most {self._limits.buffer_bytes}"
            )

    def _check_ahead(self, number: int, size: int) -> None:
        """Transfers may be quicker than their record, but not without end."""
        if number >= self._announced:
            size += sum(len(v) for n, v in self._whole.items() if n >= self._announced)
        self._check_size(size)

    def _deliverable(self) -> list[Record]:
        found: list[Record] = []
        loose, held = self._loose, self._held
        while loose and self._is_whole(loose[0]):
            found.append(self._join(loose.popleft()))
        while held:
            first = held[0]
            if isinstance(first, Record):
                found.append(first)
            elif self._is_whole(first):
                found.append(self._join(first))
            else:
                break
            held.popleft()
        return found

    def _is_whole(self, record: _Incomplete) -> bool:
        return record.number + len(record.cuts) <= self._finished

    def _join(self, record: _Incomplete) -> Record:
        buffers = list(record.rest.buffers)
        for number, (at, size) in enumerate(record.cuts, record.number):
            view = self._whole.pop(number)
            if len(view) != size:
                raise WireError("transfer size", f"{len(view)} bytes came, {size} were announced")
            buffers.insert(at, view)
        return Record(record.rest.header, buffers)


def allocate(size: int) -> memoryview:
    """Writable memory. Large: pages that nobody has written to, since a bytearray's zeros are written first and
    small pages cost a fault each (together 5 times slower); small: from the heap, whose pages are warm."""
    if size < _HUGE_BYTES:
        return memoryview(bytearray(size))
    try:
        made = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise WireError("no memory", f"for a buffer of {size} bytes: {error}") from None
    made.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(made)
