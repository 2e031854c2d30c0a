"""Items as the queue's owner holds them: runs of one put, never touched one by one, and in which order they leave.

A *piece* is a run of items that were put together; taking from it is slicing. `Shelf` holds all pieces of a
queue: what came back goes first, by age; the rest is FIFO per producer, and producers take turns.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence
from typing import Any

Buffer = Any


class Piece:
    """`bodies` from `at` on; `buffers` beside each of them, None where no item has any. `number` is the
    place of the first one among all items of the queue, `whole`: a group, taken as a whole, `plain`: bodies are
    the items, bytes that nothing was done to."""

    __slots__ = ("at", "bodies", "buffers", "number", "plain", "version", "whole")

    def __init__(
        self,
        number: int,
        bodies: list[bytes],
        buffers: list[Sequence[Buffer]] | None = None,
        version: int | None = None,
        whole: bool = False,
        plain: bool = False,
    ) -> None:
        self.number, self.bodies, self.buffers = number, bodies, buffers
        self.version, self.whole, self.plain, self.at = version, whole, plain, 0

    def __len__(self) -> int:
        return len(self.bodies) - self.at

    def size(self, count: int | None = None) -> int:
        """Bytes of the first `count` items."""
        end = len(self.bodies) if count is None else self.at + count
        size = sum(map(len, self.bodies[self.at : end]))
        if self.buffers is not None:
            size += sum(len(part) for parts in self.buffers[self.at : end] for part in parts)
        return size

    def sizes(self) -> list[int]:
        """Bytes of each item."""
        sizes = [len(body) for body in self.bodies[self.at :]]
        for place, parts in enumerate(self.buffers[self.at :] if self.buffers is not None else ()):
            sizes[place] += sum(len(part) for part in parts)
        return sizes

    def fitting(self, count: int, room: int) -> int:
        """How many of the first `count` items have at most `room` bytes together."""
        for place, size in enumerate(self.sizes()[:count]):
            room -= size
            if room < 0:
                return place
        return count

    def cut(self, count: int) -> Piece:
        """The first `count` items, which are no longer in this one; this one, when that is all that it ever had."""
        start, end = self.at, self.at + count
        if start == 0 and end == len(self.bodies):
            return self
        bodies = self.bodies[start:end]
        buffers = None if self.buffers is None else self.buffers[start:end]
        first = Piece(self.number, bodies, buffers, self.version, self.whole, self.plain)
        self.at, self.number = end, self.number + count
        return first

    def items(self) -> list[Piece]:
        """A piece for each item, beside this one."""
        return [
            Piece(
                self.number + place - self.at,
                self.bodies[place : place + 1],
                None if self.buffers is None else self.buffers[place : place + 1],
                self.version,
                plain=self.plain,
            )
            for place in range(self.at, len(self.bodies))
        ]

    def state(self) -> list[Any]:
        """As plain data."""
        buffers = self.buffers and [list(parts) for parts in self.buffers[self.at :]]
        return [
            self.number,
            self.bodies[self.at :],
            buffers,
            self.version,
            self.whole,
            self.plain,
        ]


def _age(piece: Piece) -> int:
    return piece.number


class Shelf:
    """The pieces that wait to be taken. `depth` items of `bytes` bytes."""

    def __init__(self) -> None:
        self.depth = self.bytes = 0
        self._back: list[Piece] = []
        self._lines: dict[str, deque[Piece]] = {}
        self._lowest: int | None = None

    def add(self, producer: str, piece: Piece) -> None:
        """Behind all that the producer put before."""
        line = self._lines.get(producer)
        if line is None:
            line = self._lines[producer] = deque()
        line.append(piece)
        self._count(piece)

    def give_back(self, pieces: Sequence[Piece]) -> None:
        """Before all that was not taken yet."""
        for piece in pieces:
            insort(self._back, piece, key=_age)
            self._count(piece)

    def _count(self, piece: Piece) -> None:
        self.depth += len(piece)
        self.bytes += piece.size()
        if piece.version is not None and (self._lowest is None or piece.version < self._lowest):
            self._lowest = piece.version

    def take(self, most: int, least: int) -> list[Piece]:
        """Up to `most` items. A group that does not fit any more is left, unless fewer than `least` are
        taken by then: rather too many than a part of it."""
        taken: list[Piece] = []
        got = 0
        while self._back and got < most:
            piece = self._back[0]
            if piece.whole and len(piece) > most - got and got >= least:
                break
            got += self._take_from(self._back, most - got, taken)
        moved = True
        while moved and got < most and self._lines:
            # One round: as many of each producer; who was served goes to the end.
            moved, share = False, -(-(most - got) // len(self._lines))
            for producer in list(self._lines):
                room = most - got
                count = self._take_line(producer, min(share, room), room, least - got, taken)
                got += count
                moved = moved or count > 0
                if got >= most:
                    break
        return taken

    def _take_line(
        self, producer: str, share: int, room: int, wanted: int, taken: list[Piece]
    ) -> int:
        """Up to `share` items of one producer; groups as far as there is `room`, or `wanted` more."""
        line, got = self._lines[producer], 0
        while line and got < share:
            piece = line[0]
            if piece.whole and len(piece) > room - got and got >= wanted:
                break
            got += self._take_from(line, share - got, taken)
        if got:
            del self._lines[producer]
            if line:
                self._lines[producer] = line
        return got

    def _take_from(self, line: deque[Piece] | list[Piece], most: int, taken: list[Piece]) -> int:
        piece = line[0]
        count = len(piece)
        if piece.whole or count <= most:
            del line[0]
        else:
            count = most
        piece = piece.cut(count)
        taken.append(piece)
        self.depth -= count
        self.bytes -= piece.size()
        return count

    def drop_older(self, version: int) -> int:
        """Drop the items of versions below this one; how many there were. Items without one stay."""
        if self._lowest is None or self._lowest >= version:
            return 0
        before = self.depth
        self._back = [piece for piece in self._back if self._keeps(piece, version)]
        lines = {
            producer: deque(piece for piece in line if self._keeps(piece, version))
            for producer, line in self._lines.items()
        }
        self._lines = {producer: line for producer, line in lines.items() if line}
        self._lowest = version
        return before - self.depth

    def _keeps(self, piece: Piece, version: int) -> bool:
        if piece.version is None or piece.version >= version:
            return True
        self.depth -= len(piece)
        self.bytes -= piece.size()
        return False

    def dump(self) -> dict[str, Any]:
        return {
            "back": [piece.state() for piece in self._back],
            "lines": [
                [producer, [piece.state() for piece in line]]
                for producer, line in self._lines.items()
            ],
        }

    def load(self, state: dict[str, Any]) -> None:
        self.give_back([Piece(*piece) for piece in state["back"]])
        for producer, line in state["lines"]:
            for piece in line:
                self.add(producer, Piece(*piece))
