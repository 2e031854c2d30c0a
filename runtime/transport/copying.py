"""Large buffers of a link by the arena: copied into it on a thread, while their records wait in order, and handles in
their place."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from runtime.errors import WireError
from runtime.transport.base import Buffer, Record
from runtime.transport.stream import LARGE

if TYPE_CHECKING:
    from runtime.transport.arena import Arena

_log = logging.getLogger(__name__)

_SLOW_BYTES = 1024 * 1024
"""A larger copy is not made on the loop's thread: up to that it keeps the interpreter lock on any other, too."""

_Copies = dict[int, asyncio.Future[memoryview | None]]


class Entry(NamedTuple):
    """A record on its way out; `descriptors` are closed when they have left."""

    record: Record
    size: int
    descriptors: Sequence[int] = ()


class Copier:
    """Copies into the arena, on one thread: what was asked for first is ready first."""

    def __init__(self, arena: Arena, name: str) -> None:
        self._arena = arena
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, name)

    def copies(self, record: Record) -> _Copies:
        """Of the record's buffers that are large and not in the arena yet, by their places."""
        loop, arena = self._loop, self._arena
        return {
            index: loop.run_in_executor(self._thread, arena.stage, buffer)
            for index, buffer in enumerate(record.buffers)
            if memoryview(buffer).nbytes > _SLOW_BYTES and not arena.is_staged(buffer)
        }

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)


class Waiting:
    """The records of one link that wait for copies, and the ordered ones behind them."""

    def __init__(self, copier: Copier | None, release: Callable[[list[Entry]], None]) -> None:
        self.queued = 0
        """Bytes of the records here."""
        self.copier = copier
        """None: the other end has no arena in common with us."""
        self._ordered: deque[tuple[Entry, _Copies]] = deque()
        self._unordered: list[tuple[Entry, _Copies]] = []
        self._release = release

    def keep(self, entry: Entry, ordered: bool) -> bool:
        """False when it need not wait."""
        copies = self.copier.copies(entry.record) if self.copier and entry.record.buffers else {}
        if not copies and not (ordered and self._ordered):
            return False
        self.queued += entry.size
        (self._ordered if ordered else self._unordered).append((entry, copies))
        for copy in copies.values():
            copy.add_done_callback(self._copied)
        return True

    def _copied(self, done: asyncio.Future[memoryview | None]) -> None:
        if done.cancelled():
            return
        ready = [item for item in self._unordered if _all_done(item[1])]
        self._unordered = [item for item in self._unordered if not _all_done(item[1])]
        while self._ordered and _all_done(self._ordered[0][1]):
            ready.append(self._ordered.popleft())
        self.queued -= sum(entry.size for entry, _ in ready)
        if ready:
            self._release([entry._replace(record=_copied(entry.record, c)) for entry, c in ready])

    def clear(self) -> list[Entry]:
        """Wait no longer; gives what was here, as it is."""
        entries = [entry for entry, _ in (*self._ordered, *self._unordered)]
        self._ordered.clear()
        self._unordered = []
        self.queued = 0
        return entries


def _all_done(copies: _Copies) -> bool:
    return all(copy.done() for copy in copies.values())


def _copied(record: Record, copies: _Copies) -> Record:
    """With the copies that there was room for."""
    if not copies:
        return record
    buffers = list(record.buffers)
    for index, copy in copies.items():
        if error := copy.exception():
            _log.error("a buffer is sent without the arena: %r", error)
            continue
        staged = copy.result()
        buffers[index] = buffers[index] if staged is None else staged
    return Record(record.header, buffers)


class Handles:
    """What stands in messages in the place of large buffers. Without an arena in common (`member`: what the
    other end is called in it): nothing does."""

    def __init__(self, arena: Arena | None) -> None:
        self.member: int | None = None
        self._arena = arena
        self._unsent: list[bytes] = []

    def share(self, parts: list[Buffer]) -> frozenset[int]:
        """Put handles in the place of large parts; gives which."""
        arena, member = self._arena, self.member
        if arena is None or member is None:
            return frozenset()
        shared = []
        for index, part in enumerate(parts):
            if index and memoryview(part).nbytes >= LARGE:
                handle = arena.share(part, member)
                if handle is not None:
                    parts[index] = handle
                    self._unsent.append(handle)
                    shared.append(index)
        return frozenset(shared)

    def sent(self) -> None:
        """All messages have left."""
        if self._unsent:
            self._unsent = []

    def revoke(self) -> None:
        """What has not left never will."""
        handles, self._unsent = self._unsent, []
        if self._arena is not None and self.member is not None:
            for handle in handles:
                self._arena.revoke(handle, self.member)

    def open(self, parts: list[Buffer], shared: Sequence[int], *, wanted: bool) -> None:
        """Put what they stand for in the place of handles, or only let go of them. Raises `WireError`."""
        arena = self._arena
        if arena is None or self.member is None:
            raise WireError("stale arena handle", "there is no arena in common")
        wrong: WireError | None = None
        for index in shared:
            handle = bytes(parts[index])
            try:
                if wanted and wrong is None:
                    parts[index] = arena.open(handle)
                else:
                    arena.discard(handle)
            except WireError as error:
                wrong = error
        if wrong is not None:
            raise wrong
