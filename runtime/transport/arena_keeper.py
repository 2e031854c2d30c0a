"""The agent's side of its host's arena: makes it, and takes back what dead workers held and owned.

A death has two parts. `reclaim` is done at once, before the same place has a new process: what the dead one held
is held no more, nobody can send to it, its rows are orphans. `settle` goes on until nothing of it is left:
handles that it sent and that nobody has opened after a moment are called back, orphans that nobody
holds any more are free, and the memory of extents without orphans goes back to the system.

Nothing here maps or reads data.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import NamedTuple

from runtime.transport.arena_table import (
    BUDGETS,
    EXTENT,
    FREE,
    KEEPER,
    MEMBERS,
    ORPHAN,
    USED,
    ArenaSpec,
    Table,
    create,
)

logger = logging.getLogger(__name__)

_LOCK_S = 0.1
_GRACE_S = 0.3
_POLL_S = 0.05
_SLOW_POLL_S = 0.5
_PART = 4
"""By default an arena is this part of the memory that the host's processes may use."""


class Statistics(NamedTuple):
    """`extents` that somebody owns, those of the dead among them, and `rows` in use or held."""

    extents: int
    of_dead: int
    rows: int


class _OnWay(NamedTuple):
    """Handles that a dead process had sent to the member of a cell. `until`: they may still arrive."""

    cell: int
    until: float


class Keeper:
    """The agent's arena for `members` workers. `settle` may run in one task at a time (others return)."""

    def __init__(self, size: int, members: int) -> None:
        """Raises `OSError` or `ValueError` as `arena_table.create` does."""
        self._file = create(size, members)
        try:
            self._table = Table(os.open(f"/proc/self/fd/{self._file}", os.O_RDWR | os.O_CLOEXEC))
        except OSError:
            os.close(self._file)
            raise
        self._on_way: list[_OnWay] = []
        self._lock = threading.Lock()
        self._settling = False
        self._news = False

    def spec(self, place: int) -> ArenaSpec:
        """What the worker at that place among the members is to be told."""
        return ArenaSpec(f"/proc/{os.getpid()}/fd/{self._file}", place)

    def reclaim(self, place: int) -> None:
        """The worker there is dead. To be called before its place is given to another; `settle` follows."""
        table, members = self._table, self._table.shape.members
        self._news = True
        with self._locked() as locked:
            if not locked:
                logger.warning("a process holds the lock of the arena and does not run")
            table.life[place] += 1
            for member in range(members):
                rows = table.rows_of(member)
                column = slice(rows.start * members + place, rows.stop * members, members)
                table.opened[column] = table.done[column] = table.sent[column]
            mine = table.rows_of(place)
            states = bytes(table.state[mine.start : mine.stop])
            table.state[mine.start : mine.stop] = states.replace(bytes((USED,)), bytes((ORPHAN,)))
            owners = bytes(table.owner)
            table.owner[:] = owners.replace(bytes((place + 1,)), bytes((KEEPER,)))
            for budget in range(len(BUDGETS)):
                table.used[place * len(BUDGETS) + budget] = 0
            self._find_on_way(place + 1)

    async def settle(self) -> None:
        """Until nothing of the dead is left."""
        if self._settling:
            return
        self._settling = True
        try:
            left, began = True, time.monotonic()
            while left or self._news:
                if self._news:
                    self._news, began = False, time.monotonic()
                left = await asyncio.to_thread(self.poll)  # freeing much memory takes its time
                patient = time.monotonic() - began > 2 * _GRACE_S
                await asyncio.sleep(_SLOW_POLL_S if patient else _POLL_S)
        finally:
            self._settling = False

    def poll(self) -> bool:
        """Take back what can be taken by now. Whether anything is left to wait for."""
        self._call_back()
        table = self._table
        owners = bytes(table.owner)  # before the orphans: these have their rows among them
        kept: set[int] = set()
        for row in self._orphans():
            if table.held(row):
                end = table.start[row] + table.length[row]
                kept.update(range(table.start[row] // EXTENT, -(-end // EXTENT)))
            else:
                table.generation[row] = (table.generation[row] + 1) & 0xFFFFFFFF
                table.state[row] = FREE
        extent = owners.find(KEEPER)
        while extent >= 0:
            if extent not in kept:
                table.punch(extent * EXTENT, EXTENT)
                table.owner[extent] = 0
            extent = owners.find(KEEPER, extent + 1)
        return bool(kept or self._on_way)

    def statistics(self) -> Statistics:
        """What is in use now."""
        table = self._table
        owners = bytes(table.owner)
        rows = sum(
            len(rows) - bytes(table.state[rows.start : rows.stop]).count(FREE)
            for rows in map(table.rows_of, range(table.shape.members))
        )
        return Statistics(len(owners) - owners.count(0), owners.count(KEEPER), rows)

    def close(self) -> None:
        """The last of the workers is gone."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _orphans(self) -> list[int]:
        table = self._table
        found: list[int] = []
        for rows in map(table.rows_of, range(table.shape.members)):
            states = bytes(table.state[rows.start : rows.stop])
            found += [rows.start + n for n, state in enumerate(states) if state == ORPHAN]
        return found

    def _find_on_way(self, sender: int) -> None:
        table, members = self._table, self._table.shape.members
        until = time.monotonic() + _GRACE_S
        for rows in map(table.rows_of, range(members)):
            first = rows.start * members
            senders = bytes(table.sender[first : rows.stop * members])
            place = senders.find(sender)
            while place >= 0:
                if table.on_way(first + place):
                    table.sender[first + place] = KEEPER  # nobody sends more of them meanwhile
                    self._on_way.append(_OnWay(first + place, until))
                place = senders.find(sender, place + 1)

    def _call_back(self) -> None:
        """Handles of dead senders that have not been opened in time: from now on they are stale."""
        now, table = time.monotonic(), self._table
        with self._locked() as locked:
            for item in [item for item in self._on_way if locked and item.until <= now]:
                if table.on_way(item.cell):
                    # Looked at again by the next poll: one that was just being opened has counted itself then.
                    table.sent[item.cell] = table.opened[item.cell]
                else:
                    self._on_way.remove(item)

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        with self._lock, self._table.lock(_LOCK_S) as locked:
            yield locked


def default_size() -> int:
    """A part of the memory that this host's processes may use: the least limit of our cgroups, or all."""
    limits: list[int | None] = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        with open("/proc/self/cgroup") as file:
            groups = [line.rstrip().split(":", 2) for line in file]
    except (OSError, ValueError):
        groups = []
    for _, controllers, path in groups:
        root, name = "/sys/fs/cgroup", "memory.max"
        if controllers == "memory":  # version 1
            root, name = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
        elif controllers:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        limits += [_number(f"{root}/{above}/{name}") for above in (inside, *inside.parents)]
    return min(limit for limit in limits if limit is not None) // _PART


def _number(path: str) -> int | None:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def make_keeper(size: int | None, members: int) -> Keeper | None:
    """The arena of a host with so many workers; None when there is to be none, or cannot be. `size` None:
    the default."""
    size = default_size() if size is None else size
    if size < EXTENT or not 0 < members <= MEMBERS:
        return None
    try:
        return Keeper(size, members)
    except OSError as error:
        logger.warning("no arena for large buffers between workers: %s", error)
        return None
