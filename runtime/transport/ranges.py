"""Free ranges of a stretch of memory: first fit, lowest address first, neighbours grow together.

What was used before lies low, so it is used again before anything beyond it is touched for the first time.
"""

from __future__ import annotations

from bisect import bisect_left


class Ranges:
    """Free ranges, disjoint, none touching another. Sizes and addresses in any one unit."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def take(self, size: int) -> int | None:
        """The start of `size` free in a row, which are free no longer; None when there are not so many."""
        for place, (start, end) in enumerate(zip(self._starts, self._ends, strict=True)):
            if end - start >= size:
                if end - start == size:
                    del self._starts[place], self._ends[place]
                else:
                    self._starts[place] = start + size
                return start
        return None

    def add(self, start: int, size: int) -> None:
        """These are free (again). None of them was."""
        end = start + size
        place = bisect_left(self._starts, start)
        after = place < len(self._starts) and self._starts[place] == end
        if place and self._ends[place - 1] == start:
            self._ends[place - 1] = self._ends[place] if after else end
            if after:
                del self._starts[place], self._ends[place]
        elif after:
            self._starts[place] = start
        else:
            self._starts.insert(place, start)
            self._ends.insert(place, end)

    def remove(self, start: int, size: int) -> bool:
        """Take exactly these, if all of them are free."""
        place = bisect_left(self._starts, start + 1) - 1
        if place < 0 or self._ends[place] < start + size:
            return False
        old, end = self._starts[place], self._ends[place]
        del self._starts[place], self._ends[place]
        if old < start:
            self.add(old, start - old)
        if start + size < end:
            self.add(start + size, end - start - size)
        return True
