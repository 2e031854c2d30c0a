"""The program of the jobs that `bench.queue` launches: `-m bench.queue_job producer|consumer MODE PLACE`.

MODE: `blocking` is a plain script; `async` a coroutine on the loop of its own node, which awaits each put;
`ahead` makes up to 100 puts before it awaits the first of them. PLACE of the owner of
the queues: `consumer`, or `apart`, in a third process (`Owner`). The consumer writes the figures.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple

import numpy

from bench import timing
from bench.raw_queue import BATCH, LARGE, ONE, POOL, WAKE_P50, WAKE_P99, item_pool
from bench.timing import MIB
from runtime import DataQueue, Node, rpc

AHEAD = 100


class Phase(NamedTuple):
    """One queue, and what goes through it: `puts` times `batch` items, `size` of them in it at most."""

    name: str
    size: int
    puts: int
    batch: int = 1


PHASES = (
    Phase(ONE, 1000, timing.scaled(30_000, 100)),
    Phase(BATCH, 10_000, timing.scaled(5000, 20), 100),
    Phase(WAKE_P50, 1000, timing.scaled(500, 20)),
    Phase(LARGE, 16, timing.scaled(800, 20)),
)


def queue(phase: Phase, owner: bool) -> DataQueue[Any]:
    return DataQueue(f"bench-{PHASES.index(phase)}", is_master=owner, size=phase.size)


class Owner:
    """Holds the queues in a process of its own."""

    def setup(self) -> None:
        self._queues = [queue(phase, owner=True) for phase in PHASES]

    @rpc
    def depths(self) -> list[int]:
        return [queue.qsize() for queue in self._queues]


class End(NamedTuple):
    """A queue as one of the two programs uses it."""

    put: Callable[..., Awaitable[Any]]
    get: Callable[[int], Awaitable[list[Any]]]
    pause: Callable[[float], Awaitable[None]]
    flush: Callable[[], Awaitable[None]] | None = None
    """Waits for puts that were not waited for."""


def blocking_end(found: DataQueue[Any]) -> End:
    async def put(*items: Any) -> None:
        found.put(*items)

    async def get(most: int) -> list[Any]:
        return found.get(most)

    async def pause(seconds: float) -> None:
        threading.Event().wait(seconds)

    return End(put, get, pause)


def async_end(found: DataQueue[Any]) -> End:
    return End(found.put_async, found.get_async, asyncio.sleep)


def ahead_end(found: DataQueue[Any]) -> End:
    waiting: deque[Awaitable[None]] = deque()

    async def put(*items: Any) -> None:
        waiting.append(found.put_async(*items))
        if len(waiting) > AHEAD:
            await waiting.popleft()

    async def flush() -> None:
        while waiting:
            await waiting.popleft()

    return End(put, found.get_async, asyncio.sleep, flush)


async def produce(phase: Phase, end: End) -> None:
    if phase.name == WAKE_P50:
        await end.put(0.0)
        await end.pause(0.3)
        for _ in range(phase.puts):
            await end.pause(0.003)
            await end.put(time.perf_counter())
    elif phase.name == LARGE:
        arrays = [numpy.full(MIB, value, dtype=numpy.uint8) for value in range(128)]
        for number in range(phase.puts):
            await end.put(arrays[number % 128])
    else:
        pool, batch = item_pool(), phase.batch
        for number in range(phase.puts):
            at = number * batch % POOL
            await end.put(*pool[at : at + batch])


async def consume(phase: Phase, end: End) -> dict[str, float]:
    total = phase.puts * phase.batch
    if phase.name == WAKE_P50:
        waits = []
        await end.get(1)
        for _ in range(total):
            (put_at,) = await end.get(1)
            waits.append(time.perf_counter() - put_at)
        return timing.percentiles(waits, WAKE_P50, WAKE_P99)
    got = len(await end.get(1))
    while phase.name == LARGE and got < total // 4:  # as for arguments: what a warm arena does
        got += len(await end.get(1))
    unmeasured, began = got, time.perf_counter()
    while got < total:
        items = await end.get(phase.batch)
        first = items[0]
        number = first[0] if phase.name == LARGE else int.from_bytes(first[:8], "little")
        assert number == got % (128 if phase.name == LARGE else POOL), f"item {number} at {got}"
        got += len(items)
    rate = (got - unmeasured) / (time.perf_counter() - began)
    return {phase.name: rate * MIB / 1e9 if phase.name == LARGE else rate}


async def work(role: str, owner: bool, end_of: Callable[[DataQueue[Any]], End]) -> None:
    queues = [queue(phase, owner) for phase in PHASES]
    found: dict[str, float] = {}
    for phase, made in zip(PHASES, queues, strict=True):
        if role == "producer":
            end = end_of(made)
            await produce(phase, end)
            if end.flush is not None:
                await end.flush()
        else:
            found |= await consume(phase, end_of(made))
    if role == "consumer":
        timing.write_figures(found)


async def on_own_node(role: str, owner: bool, end_of: Callable[[DataQueue[Any]], End]) -> None:
    async with Node.from_env():
        await work(role, owner, end_of)


def run_blocking(program: Coroutine[Any, Any, None]) -> None:
    """No loop: nothing in it suspends, every wait blocks the thread."""
    try:
        program.send(None)
    except StopIteration:
        return
    raise AssertionError("plain code has suspended")


def main(role: str, mode: str, place: str) -> None:
    owner = role == place
    if mode == "blocking":
        run_blocking(work(role, owner, blocking_end))
    else:
        asyncio.run(on_own_node(role, owner, ahead_end if mode == "ahead" else async_end))


if __name__ == "__main__":
    main(*sys.argv[1:4])
