"""Which memory the slots of a process have: what they were given, and no more of it than they need."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from runtime.transport.arena import Arena
from runtime.transport.arena_keeper import Keeper
from runtime.transport.arena_pool import Pool, Slot
from runtime.transport.arena_table import EXTENT, PAGE

EXTENTS = 12
MIB = 1024 * 1024


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    keeper = Keeper(EXTENTS * EXTENT, 2)
    yield keeper
    keeper.close()


@pytest.fixture
def arena(keeper: Keeper) -> Iterator[Arena]:
    arena = Arena(keeper.spec(0))
    yield arena
    arena.close()


def memory(arena: Arena) -> int:
    """Bytes that the file takes, beyond its table."""
    return os.stat(arena._table.fd).st_blocks * 512 - arena._table.data_start


@pytest.mark.parametrize("size", [128 * 1024, MIB, 3 * MIB, EXTENT + PAGE, 3 * EXTENT])
def test_a_slot_takes_the_memory_that_it_needs(arena: Arena, size: int) -> None:
    first = arena.stage(b"1" * size)
    assert memory(arena) == size
    second = arena.stage(b"2" * (size - 1))
    assert memory(arena) == 2 * size
    assert first == b"1" * size
    assert second == b"2" * (size - 1)
    del first
    third = arena.stage(b"3" * size)
    assert memory(arena) == 2 * size, "it is used again"
    assert third == b"3" * size


@pytest.mark.parametrize("size", [MIB, 2 * EXTENT])
def test_without_memory_there_is_no_room_and_no_error(
    arena: Arena, keeper: Keeper, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    def full(fd: int, *_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = arena.stage(b"k" * MIB)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        patch.setattr(os, "pwrite", full)
        assert arena.stage(b"x" * size) is None
        assert arena.staged(b"x" * size, "queue") == b"x" * size
        patch.setattr(os, "pwrite", lambda fd, data, at: len(data) - 1)  # the last page had none
        assert size > MIB or arena.stage(b"x" * size) is None
        assert keeper.statistics().rows == 1
    assert arena.stage(b"x" * size) == b"x" * size
    assert kept == b"k" * MIB


def test_what_interrupts_a_copy_leaves_nothing(
    arena: Arena, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    for name, size in (("pwrite", MIB), ("posix_fallocate", EXTENT)):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                arena.stage(bytes(size))
        assert keeper.statistics().rows == 0
        assert arena.stage(b"y" * size) == b"y" * size


class _System:
    """Which pages of the data have memory."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.backed = bytearray(EXTENTS * EXTENT // PAGE)

    def ask(self, slot: Slot, gives: bool) -> bool:
        if slot.bare == slot.end:
            return True
        if gives:
            pages = slice(slot.bare // PAGE, slot.end // PAGE)
            self.backed[pages] = b"\1" * (pages.stop - pages.start)
        return self.pool._ask(slot, lambda: gives, True)

    def has(self, slot: Slot) -> bool:
        return 0 not in self.backed[slot.start // PAGE : slot.end // PAGE]

    def punch(self, start: int, size: int) -> None:
        self.backed[start // PAGE : (start + size) // PAGE] = bytes(size // PAGE)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(1, 40)),
        st.tuples(st.sampled_from(["give", "refuse", "drop"]), st.integers(0, 9)),
        st.tuples(st.just("give back"), st.just(0)),
    ),
    max_size=40,
)


def behind_a_failure(halves: int) -> list[tuple[str, int]]:
    """The first of two slots gets no memory, one of so many half MiB behind both does: the first place has none yet."""
    first = [("take", 2), ("take", 2), ("refuse", 0), ("give", 0)]
    return [*first, ("take", halves), ("give", 0), ("take", 2), ("give", 0)]


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(STEPS)
@example(behind_a_failure(3))
@example(behind_a_failure(12))
def test_no_slot_is_used_without_memory(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, steps: list[tuple[str, int]]
) -> None:
    pool = arena._pool
    system = _System(pool)
    taken: list[Slot] = []
    used: list[Slot] = []

    def drop(slot: Slot) -> None:
        with arena._guard:
            pool.drop(slot)

    with monkeypatch.context() as patch:
        patch.setattr(pool._table, "punch", system.punch)
        for kind, number in steps:
            if kind == "take":
                if (slot := pool.take(number * MIB // 2, "rpc")) is not None:
                    taken.append(slot)
            elif kind in ("give", "refuse") and taken:
                slot = taken.pop(number % len(taken))
                if system.ask(slot, kind == "give"):
                    used.append(slot)
                else:
                    drop(slot)
            elif kind == "drop" and used:
                drop(used.pop(number % len(used)))
            elif kind == "give back":
                pool._give_back(0)
            assert all(map(system.has, used))
        for slot in taken + used:
            drop(slot)
        pool._give_back(0)
    assert not any(system.backed)
