"""What the agent takes back when a member has died."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator

import pytest

from runtime.errors import WireError
from runtime.transport.arena import Arena
from runtime.transport.arena_keeper import Keeper, Statistics, default_size, make_keeper
from runtime.transport.arena_table import EXTENT, MEMBERS

DATA = bytes(range(256)) * 2048
NOTHING = Statistics(0, 0, 0)


class Host(Keeper):
    """With those that use its arena."""

    def __init__(self, size: int, members: int) -> None:
        super().__init__(size, members)
        self.arenas: list[Arena] = []

    def close(self) -> None:
        for arena in self.arenas:
            arena.close()
        super().close()


@pytest.fixture
def keeper() -> Iterator[Host]:
    keeper = Host(8 * EXTENT, 4)
    yield keeper
    keeper.close()


def member(keeper: Host, place: int) -> Arena:
    keeper.arenas.append(Arena(keeper.spec(place)))
    return keeper.arenas[-1]


def shared(sender: Arena, receiver: Arena) -> bytes:
    handle = sender.share(DATA, receiver.index)
    assert handle is not None
    return handle


def die(keeper: Host, place: int, arena: Arena) -> None:
    """What is left of a process that was killed: its part of the table."""
    arena.close()
    arena._pool._thread.join()
    arena._pid = 0  # no finalizer of it runs any more
    keeper.reclaim(place)


def settled(keeper: Host, within: float = 1.0) -> bool:
    until = time.monotonic() + within
    while left := keeper.poll():
        if time.monotonic() > until:
            break
        time.sleep(0.02)
    return not left


def memory(keeper: Keeper) -> int:
    """Bytes that the file takes, beyond its table."""
    found = os.stat(keeper.spec(0).path).st_blocks * 512
    return found - keeper._table.data_start


def test_what_a_dead_member_had_staged_is_free_at_once(keeper: Host) -> None:
    one = member(keeper, 0)
    view = one.stage(DATA)
    assert view is not None
    assert memory(keeper) == len(DATA)
    die(keeper, 0, one)
    assert settled(keeper, 0.0)
    assert (keeper.statistics(), memory(keeper)) == (NOTHING, 0)


def test_what_a_dead_member_held_is_held_no_more(keeper: Host) -> None:
    one, other = member(keeper, 0), member(keeper, 1)
    held = other.open(shared(one, other))
    waiting = shared(one, other)
    die(keeper, 1, other)
    assert keeper.statistics().rows == 2, "the owner lives, and frees them when it needs room"
    one.stage(DATA)
    assert keeper.statistics().rows == 0
    with pytest.raises(WireError):
        member(keeper, 1).open(waiting)
    del held


def test_what_a_dead_member_has_sent_stays_until_its_receivers_are_done(keeper: Host) -> None:
    one, other = member(keeper, 0), member(keeper, 1)
    held, waiting = other.open(shared(one, other)), shared(one, other)
    die(keeper, 0, one)
    assert keeper.poll()
    late = other.open(waiting)
    again = member(keeper, 0)
    assert again.stage(DATA) is not None, "its place has a new process meanwhile"
    assert not settled(keeper, 0.5)
    assert held == late == DATA
    del held
    assert not settled(keeper, 0.0)
    del late
    assert settled(keeper)
    assert keeper.statistics() == Statistics(1, 0, 0)
    die(keeper, 0, again)


def test_handles_that_never_arrived_are_called_back(keeper: Host) -> None:
    one, other, third = (member(keeper, place) for place in range(3))
    view = one.open(shared(other, one))
    forwarded, own = one.share(view, third.index), shared(one, third)
    die(keeper, 0, one)
    assert keeper.poll(), "they may be on their way"
    assert settled(keeper)
    for handle in (forwarded, own):
        assert handle is not None
        with pytest.raises(WireError, match="stale"):
            third.open(handle)
    other.stage(DATA)
    assert keeper.statistics().rows == 0
    for arena in (other, third):
        arena.close()


def test_a_view_that_was_forwarded_outlives_both_who_sent_it(keeper: Host) -> None:
    one, other, third = (member(keeper, place) for place in range(3))
    middle = other.open(shared(one, other))
    handle = other.share(middle, third.index)
    assert handle is not None
    view = third.open(handle)
    die(keeper, 1, other)
    die(keeper, 0, one)
    assert not settled(keeper, 0.5)
    assert view == DATA
    del view
    assert settled(keeper)
    assert keeper.statistics() == NOTHING


def test_members_die_one_after_the_other_in_the_same_place(keeper: Host) -> None:
    other = member(keeper, 1)
    views = []
    for _ in range(5):
        one = member(keeper, 0)
        views.append(other.open(shared(one, other)))
        die(keeper, 0, one)
    assert not settled(keeper, 0.4)
    assert keeper.statistics() == Statistics(5, 5, 5)
    assert all(view == DATA for view in views)
    views.clear()
    assert settled(keeper)
    assert (keeper.statistics(), memory(keeper)) == (NOTHING, 0)


async def test_settle_ends_when_all_is_free_and_takes_in_later_deaths(keeper: Host) -> None:
    one, other = member(keeper, 0), member(keeper, 1)
    shared(one, other)
    die(keeper, 0, one)
    first = asyncio.create_task(keeper.settle())
    await asyncio.sleep(0.1)
    die(keeper, 1, other)
    await keeper.settle()
    assert not first.done(), "one of them is enough"
    async with asyncio.timeout(1.0):
        await first
    assert keeper.statistics() == NOTHING


def test_who_has_the_lock_and_does_not_run_stops_nobody_else(
    keeper: Host, caplog: pytest.LogCaptureFixture
) -> None:
    one, other, third = (member(keeper, place) for place in range(3))
    view = one.stage(DATA)
    assert view is not None
    with third._table.lock(0.0) as locked:
        assert locked
        began = time.monotonic()
        assert one.share(view, other.index) is None
        assert one.stage(bytes(EXTENT)) is None
        assert time.monotonic() - began < 0.1
        keeper.reclaim(3)
    assert "lock" in caplog.text
    assert one.share(view, other.index) is not None


def test_the_default_is_a_part_of_the_memory() -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert EXTENT < default_size() <= whole // 4


@pytest.mark.parametrize(("size", "members"), [(0, 2), (EXTENT - 1, 2), (EXTENT, MEMBERS + 1)])
def test_there_may_be_none(size: int, members: int) -> None:
    assert make_keeper(size, members) is None


def test_an_arena_costs_its_table_until_it_is_used() -> None:
    keeper = make_keeper(None, 8)
    assert keeper is not None
    arenas = [Arena(keeper.spec(place)) for place in range(8)]
    assert memory(keeper) == 0
    assert keeper._table.data_start < 2 * 1024 * 1024
    for arena in arenas:
        arena.close()
    keeper.close()
