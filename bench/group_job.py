"""The program of the job that `bench.group` launches for its broadcasts: `python -m bench.group_job [WAY]` is the
sender of weights, `Learner` one of those that get them. WAY says that these are on another host: `held` sends the bytes
there once, as any job does, `direct` to each.

A copy is what is written anew: memory that the file which the processes of a host share has more than
before, while all of them keep what they got, and arrays that are not in that file: they came by a socket. Of another
host it is what leaves by TCP.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy

from bench import timing
from bench.raw_bulk import WARM
from bench.timing import COPIES, MIB
from runtime import Node, RoleGroup, rpc
from runtime.peer import context, holding

_PIECES = 16
_PIECE = 4 * MIB
_SIZE = _PIECES * _PIECE


class Learner:
    def __init__(self) -> None:
        self._weights: dict[str, Any] = {}

    @rpc
    async def load_weights(self, weights: dict[str, Any], version: int | None = None) -> None:
        self._weights = weights

    @rpc
    async def loaded(self) -> tuple[int, int]:
        """The sum of the arrays' numbers, and how many bytes of them are memory of this process alone."""
        shared = shared_ranges()
        addresses = [array.ctypes.data for array in self._weights.values()]
        apart = sum(not any(at in found for found in shared) for at in addresses)
        return sum(int(array[-1]) for array in self._weights.values()), apart * _PIECE


async def main(way: str) -> dict[str, float]:
    if way == "direct":
        holding.HELD_BYTES = sys.maxsize
    async with Node.from_env():
        group = RoleGroup("server")
        await group.wait_ready_async(30)
        weights = {str(n): numpy.full(_PIECE, n, dtype=numpy.uint8) for n in range(_PIECES)}
        before = left_bytes() if way else shared_bytes()
        await group.broadcast(weights)
        written = left_bytes() - before if way else shared_bytes() - before
        loaded = await group.call("loaded")
        assert {total for total, _ in loaded} == {sum(range(_PIECES))}
        if not way:
            written += sum(apart for _, apart in loaded)
        seconds = []
        for _ in range(timing.scaled(10, 2)):
            began = time.perf_counter()
            await group.broadcast(weights)
            seconds.append(time.perf_counter() - began)
        return {WARM: timing.rate(_SIZE, seconds), COPIES: written / _SIZE}


def left_bytes() -> int:
    """What has left this process by TCP."""
    transport: Any = context.current().endpoint._transport
    return int(transport._sockets.statistics().bytes_out)


def shared_ranges() -> list[range]:
    """Where this process sees files without a name."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if " /memfd:" in line:
            start, end = line.split(maxsplit=1)[0].split("-")
            found.append(range(int(start, 16), int(end, 16)))
    return found


def shared_bytes() -> int:
    """Memory of the files without a name that this process has open."""
    files = {}
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the directory's own
            if os.readlink(entry.path).startswith("/memfd:"):
                found = os.stat(entry.path)
                files[found.st_ino] = found.st_blocks * 512
    return sum(files.values())


if __name__ == "__main__":
    timing.write_figures(asyncio.run(main("".join(sys.argv[1:]))))
