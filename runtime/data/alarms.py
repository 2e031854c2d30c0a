"""Moments at which something is due, each of them for one thing, and most of them called off in time."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Generic, TypeVar

K = TypeVar("K")


def earlier(one: float | None, other: float | None) -> float | None:
    """The earlier moment of two; None is never."""
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


class Alarms(Generic[K]):
    """A heap of (moment, thing) with cheap cancelling; things must be comparable."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, K]] = []
        self._when: dict[K, float] = {}

    def set(self, when: float | None, thing: K) -> None:
        """`thing` is due at `when`; None: never."""
        if when is None:
            return
        self._when[thing] = when
        if len(self._heap) > 64 + 2 * len(self._when):
            self._heap = [(moment, known) for known, moment in self._when.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (when, thing))

    def call_off(self, thing: K) -> None:
        """`thing` is not due any more; unknown ones are ignored."""
        self._when.pop(thing, None)

    def next(self) -> float | None:
        """The next moment at which something is due."""
        heap = self._heap
        while heap and self._when.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def due(self, now: float) -> Iterator[K]:
        """What is due, by and by, each once."""
        while (when := self.next()) is not None and when <= now:
            thing = heapq.heappop(self._heap)[1]
            del self._when[thing]
            yield thing
