"""The program of the jobs that `bench.tensor` launches: `-m bench.tensor_job MIB WHAT` is the caller, `Sink` the role
"sink" of two members. "all" also looks whether views are what they should be; "first" is the first use, with a link."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import numpy

from bench import timing
from bench.raw_bulk import ALONE, FIRST, TOUCH, WARM, read, repetitions, sources
from bench.timing import MIB
from runtime import Node, RoleGroup, rpc

Call = Callable[[str, Any], Awaitable[Any]]
"""Starts a call of a method with one array."""


class Sink:
    def __init__(self) -> None:
        self._kept: Any = None

    @rpc
    async def sink(self, array: Any) -> int:
        return len(array)

    @rpc
    async def touch(self, array: Any) -> int:
        return read(array)

    @rpc
    async def keep(self, array: Any) -> None:
        self._kept = array

    @rpc
    async def scribble(self) -> None:
        """Write all over what was kept."""
        self._kept[:] = 7

    @rpc
    async def kept(self) -> int:
        """The sum of what was kept, which is let go."""
        total, self._kept = read(self._kept), None
        return total


async def argument_figures(call: Call, size: int) -> dict[str, float]:
    """The first call with `size` bytes, then many: several in flight, and one by one."""
    arrays, times = sources(size), repetitions(size)
    found = await first_use(call, next(arrays))

    async def one(method: str) -> float:
        array = next(arrays)
        began = time.perf_counter()
        await call(method, array)
        return time.perf_counter() - began

    for name, method in ((ALONE, "sink"), (TOUCH, "touch")):
        found[name] = timing.rate(size, [await one(method) for _ in range(times + 1)][1:])
    at_once = max(1, min(8, 64 * MIB // size))
    if at_once == 1:
        return found | {WARM: found[ALONE]}
    began = time.perf_counter()
    await in_flight((call("sink", next(arrays)) for _ in range(times)), at_once)
    return found | {WARM: size * times / (time.perf_counter() - began) / 1e9}


async def first_use(call: Call, array: Any) -> dict[str, float]:
    began = time.perf_counter()
    assert await call("sink", array) == len(array)
    return {FIRST: len(array) / (time.perf_counter() - began) / 1e9}


async def in_flight(calls: Iterable[Awaitable[Any]], at_once: int) -> None:
    """Await all `calls`, the first `at_once` of which are made before any of them is waited for."""
    waiting: deque[Awaitable[Any]] = deque()
    for call in calls:
        waiting.append(call)
        if len(waiting) == at_once:
            await waiting.popleft()
    for call in waiting:
        await call


async def check_views(size: int) -> None:
    """What one consumer writes into its view, neither the other nor the producer sees."""
    group = RoleGroup("sink")
    array = numpy.ones(size, dtype=numpy.uint8)
    untouched = read(array)
    await group.call("keep", array)
    await group[0].call("scribble")
    seen = await group.call("kept")
    assert seen == [7 * untouched % 2**64, untouched], (
        f"{seen} from {untouched}: views are not apart"
    )
    assert read(array) == untouched, "the producer sees what a consumer wrote"


async def main(size: int, what: str) -> dict[str, float]:
    async with Node.from_env():
        sink = RoleGroup("sink")[0]
        await RoleGroup("sink").wait_ready_async(30)
        if what == "first":
            await sink.call("sink", b"")
            return await first_use(sink.call, next(sources(size)))
        found = await argument_figures(sink.call, size)
        await check_views(size)
        return found


if __name__ == "__main__":
    timing.write_figures(asyncio.run(main(int(sys.argv[1]) * MIB, sys.argv[2])))
