"""A job's log files, read back a piece at a time: the last lines, and then what is added.

The files are `attempt_<n>/<role>/<rank>/{stdout,stderr}.log` below the job's folder. Nothing is kept between two
reads: how far each file was read (`positions`) is the reader's to remember, so an agent serves any number of
followers without holding a thing for them, and who was away goes on where it stopped. What bytes mean
(lines, progress bars) is seen to where they are shown.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

STREAMS = ("stdout", "stderr")
BATCH_BYTES = 512 * 1024
_PIECE = 64 * 1024
_SOUGHT_BYTES = 64 * 1024 * 1024
"""So far back the beginning of the last lines is looked for."""


class Query(NamedTuple):
    """Whose output: None means everybody's. `lines`: the last so many of each stream of each rank to begin
    with; None: all of it."""

    role: str | None = None
    rank: int | None = None
    streams: tuple[str, ...] = STREAMS
    lines: int | None = 10


class Piece(NamedTuple):
    """Bytes of one file, next to those read before."""

    role: str
    rank: int
    attempt: int
    stream: str
    data: bytes


class Batch(NamedTuple):
    """What one read gave. `more`: there was more than fits."""

    pieces: list[Piece]
    positions: dict[str, int]
    more: bool


class _File(NamedTuple):
    path: str
    role: str
    rank: int
    attempt: int
    stream: str
    size: int
    changed: float


def read(
    folder: str,
    query: Query,
    positions: Mapping[str, int] | None = None,
    ranks: Collection[tuple[str, int]] | None = None,
) -> Batch:
    """Read on from `positions` (None: from where the last lines begin), at most `BATCH_BYTES`. Blocks.

    `ranks`: only the output of these (role, rank), where others write to the same folder.
    """
    files = sorted(_files(folder, query, ranks), key=lambda file: (file.attempt, file.changed))
    after = _last_lines(folder, files, query.lines) if positions is None else dict(positions)
    pieces: list[Piece] = []
    room, more = BATCH_BYTES, False
    for file in files:
        start = after.get(file.path, 0)
        size = min(file.size - start, _PIECE, room)
        more = more or size < file.size - start
        if size <= 0 or not (data := _bytes_at(os.path.join(folder, file.path), start, size)):
            continue
        room -= len(data)
        after[file.path] = start + len(data)
        pieces.append(Piece(file.role, file.rank, file.attempt, file.stream, data))
    return Batch(pieces, after, more)


def ranks(folder: str) -> set[tuple[str, int]]:
    """Of whom there is output in that folder, whose path may begin with "~"."""
    found = _files(os.path.expanduser(folder), Query(), None)
    return {(file.role, file.rank) for file in found}


def _files(folder: str, query: Query, ranks: Collection[tuple[str, int]] | None) -> Iterator[_File]:
    role = "*" if query.role is None else glob.escape(query.role)
    rank = "*" if query.rank is None else str(query.rank)
    for path in glob.iglob(f"attempt_*/{role}/{rank}/*.log", root_dir=folder):
        match = re.fullmatch(r"attempt_(\d+)/([^/]+)/(\d+)/(\w+)\.log", path)
        if match is None or match[4] not in query.streams:
            continue
        found = _File(path, match[2], int(match[3]), int(match[1]), match[4], 0, 0.0)
        if ranks is not None and (found.role, found.rank) not in ranks:
            continue
        try:
            about = os.stat(os.path.join(folder, path))
        except OSError:  # removed since it was found
            continue
        yield found._replace(size=about.st_size, changed=about.st_mtime)


def _last_lines(folder: str, files: list[_File], lines: int | None) -> dict[str, int]:
    """Where the last lines of each stream of each rank begin; of its latest attempts, if one has too few."""
    wanted: dict[tuple[str, int, str], int] = {}
    positions: dict[str, int] = {}
    for file in reversed(files):
        key = file.role, file.rank, file.stream
        left = wanted.setdefault(key, lines) if lines is not None else None
        if left is None:
            positions[file.path] = 0
            continue
        positions[file.path], found = _line_start(os.path.join(folder, file.path), file.size, left)
        wanted[key] = left - found
    return positions


def _line_start(path: str, size: int, count: int) -> tuple[int, int]:
    """Where the last `count` lines of a file begin, and how many lines that are."""
    if count <= 0 or not size:
        return size, 0
    end, found = size, 0
    while end > 0 and size - end < _SOUGHT_BYTES:
        begin = max(0, end - _PIECE)
        data = _bytes_at(path, begin, end - begin)
        if end == size and data.endswith(b"\n"):
            data = data[:-1]
        at = len(data)
        while (at := data.rfind(b"\n", 0, at)) >= 0:
            found += 1
            if found == count:
                return begin + at + 1, found
        end = begin
    return end, found + 1


def _bytes_at(path: str, start: int, size: int) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, start)
    except OSError:  # removed since it was found
        return b""
