"""The program of the jobs that `bench.overload` launches. The role "producer" is `produce`; the role
"consumer" is `Consumer`, or `QueueConsumer` where a queue lies between them.

`BENCH_KIND` says how items travel, `BENCH_ITEM_KIB` how large they are, `BENCH_SECONDS` for how long. Every
item has its number, and the consumer counts those that do not come next. The event loops of both
processes ask the control plane something every 20 ms, as heartbeats do, first idle and then under load.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import timing
from runtime import DataQueue, RoleGroup, kv, rpc
from runtime.peer import context

KIND = os.environ.get("BENCH_KIND", "cast")
ITEM = int(os.environ.get("BENCH_ITEM_KIB", "32")) * 1024
SECONDS = float(os.environ.get("BENCH_SECONDS", "60"))
CONSUMED_PER_S = 500 if ITEM < 1 << 20 else 50
PRODUCED_PER_S = 10 * CONSUMED_PER_S
WARM = 0.2
"""The part of the time after which memory should not grow any more."""
BEAT_S = 0.02
HANDED = "items/s handed over"
_QUEUED_BYTES = 16 << 20


def queue(owner: bool) -> DataQueue[Any]:
    return DataQueue("overload", owner, 100_000, max_bytes=_QUEUED_BYTES)


class Beats:
    """Questions to the control plane. A delay is counted from when the question should have been asked."""

    def __init__(self) -> None:
        self.delays: list[float] = []
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.delays = []
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> list[float]:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        return self.delays

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        planned = loop.time()
        while True:
            planned += BEAT_S
            await asyncio.sleep(planned - loop.time())
            await kv.get_async("beat")
            self.delays.append(loop.time() - planned)


class Consumer:
    """Takes `CONSUMED_PER_S` items at most, one at a time."""

    def __init__(self) -> None:
        self._next = self._wrong = 0
        self._beats = Beats()

    @rpc
    def take(self, number: int, load: bytes) -> None:
        self._wrong += number != self._next or len(load) != ITEM
        self._next = number + 1
        time.sleep(1 / CONSUMED_PER_S)

    @rpc
    async def taken(self) -> tuple[int, int]:
        """How many so far, and how many of them were not the next one."""
        return self._next, self._wrong

    @rpc
    async def begin(self) -> None:
        await self._beats.start()

    @rpc
    async def end(self) -> list[float]:
        return await self._beats.stop()


class QueueConsumer(Consumer):
    def setup(self) -> None:
        self._queue = queue(owner=True)

    def run(self) -> None:
        while True:
            for number, load in self._queue.get():
                self.take(number, load)


def produce() -> None:
    consumer = RoleGroup("consumer")[0]
    beats = Beats()
    loop = context.current().loop

    def measured(work: Callable[[], Any]) -> tuple[Any, list[float], list[float]]:
        consumer.call("begin").result(timeout=30)
        asyncio.run_coroutine_threadsafe(beats.start(), loop).result(30)
        found = work()
        mine = asyncio.run_coroutine_threadsafe(beats.stop(), loop).result(30)
        return found, mine, consumer.call("end").result(timeout=60)

    _, *idle = measured(lambda: time.sleep(timing.scaled_s(2.0)))
    sent, *loaded = measured(lambda: overrun(consumer))
    began = time.monotonic()
    while (came := consumer.call("taken").result(timeout=60)) != (sent, 0):
        assert not came[1], f"{came[1]} of {came[0]} items came out of order"
        assert time.monotonic() - began < 60, f"{sent} items were sent, {came[0]} came"
        time.sleep(0.1)
    usual = [statistics.median(quiet) for quiet in idle]
    found = {timing.BEAT_P99: worst(loaded, usual), timing.IDLE_P99: worst(idle, usual)}
    timing.write_figures(found | {HANDED: sent / SECONDS})


def worst(delays: list[list[float]], usual: list[float]) -> float:
    """The 99th percentile above what is usual in a process, of the process where that is most; in ms."""
    pairs = zip(delays, usual, strict=True)
    return 1e3 * max(statistics.quantiles(late, n=100)[98] - least for late, least in pairs)


def overrun(consumer: Any) -> int:
    """Offer items ten times faster than they are taken; how many it became."""
    give = giver(consumer)
    load = os.urandom(ITEM)
    began = time.monotonic()
    sent, warm = 0, False
    while (now := time.monotonic() - began) < SECONDS:
        give(sent, load)
        sent += 1
        if not warm and now > SECONDS * WARM:
            warm = True
            Path("warm").touch()
        time.sleep(max(0.0, sent / PRODUCED_PER_S - (time.monotonic() - began)))
    Path("produced").touch()
    return sent


def giver(consumer: Any) -> Callable[[int, bytes], None]:
    """What hands one item over."""
    if KIND == "queue":
        found = queue(owner=False)
        return lambda number, load: found.put((number, load))
    if KIND == "cast":
        return lambda number, load: consumer.cast("take", number, load)
    calls: deque[Any] = deque()

    def call(number: int, load: bytes) -> None:
        calls.append(consumer.call("take", number, load))
        while calls[0].done():
            calls.popleft().result()

    return call
