"""Free ranges: nothing is handed out twice, nothing is lost, and what is low is used first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtime.transport.ranges import Ranges

SIZE = 40


def total(ranges: Ranges) -> int:
    """How much is free."""
    return sum(ranges._ends) - sum(ranges._starts)


def test_the_lowest_room_that_is_large_enough_is_taken() -> None:
    ranges = Ranges()
    for start, size in ((0, 2), (5, 4), (20, 4)):
        ranges.add(start, size)
    assert [ranges.take(size) for size in (3, 2, 4, 2, 1)] == [5, 0, 20, None, 8]
    assert total(ranges) == 0


def test_neighbours_grow_together() -> None:
    ranges = Ranges()
    for start in (0, 4, 2):
        ranges.add(start, 2)
    assert ranges.take(6) == 0


def test_a_part_is_taken_out_only_if_all_of_it_is_free() -> None:
    ranges = Ranges()
    ranges.add(10, 10)
    assert not ranges.remove(5, 6)
    assert not ranges.remove(15, 6)
    assert ranges.remove(12, 3)
    assert not ranges.remove(14, 2)
    assert (ranges.take(3), ranges.take(2), total(ranges)) == (15, 10, 2)


@given(st.lists(st.tuples(st.sampled_from(["take", "add", "remove"]), st.integers(0, SIZE - 1),
                          st.integers(1, 8)), max_size=60))  # fmt: skip
def test_it_agrees_with_a_set_of_free_places(steps: list[tuple[str, int, int]]) -> None:
    ranges, free = Ranges(), set(range(SIZE))
    ranges.add(0, SIZE)
    for kind, start, size in steps:
        wanted = set(range(start, min(start + size, SIZE)))
        if kind == "take":
            room = [s for s in range(SIZE) if set(range(s, s + size)) <= free]
            assert ranges.take(size) == min(room, default=None)
            free -= set(range(room[0], room[0] + size)) if room else set()
        elif kind == "add" and not wanted & free:
            ranges.add(start, len(wanted))
            free |= wanted
        elif kind == "remove":
            assert ranges.remove(start, len(wanted)) == (wanted <= free)
            free -= wanted if wanted <= free else set()
        assert total(ranges) == len(free)
