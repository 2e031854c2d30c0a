"""What the measured processes share: how calls are timed, and how figures get to the measurement.

Both sides of a comparison are timed by this code. It knows nothing of the runtime, and neither does what
is measured as a limit. `BENCH_SCALE` in the environment (`--scale`) makes every count and duration smaller
or larger; the figures of a small scale say only that a measurement works.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PAYLOAD = bytes(range(64))
OUTSTANDING = 1000
MIB = 1 << 20

P50, P99 = "sequential p50, µs", "sequential p99, µs"
CALLS = "calls/s, 1,000 outstanding"
COPIES = "copies of the payload"
BEAT_P99 = "heartbeats delayed, p99, ms"
IDLE_P99 = "when idle, p99, ms"

Starter = Callable[[], "asyncio.Future[Any]"]
"""Starts one call; the future is done with its answer."""


def scaled(amount: float, least: int = 1) -> int:
    """`amount` of anything that is repeated, at the scale of this run."""
    return max(least, int(amount * float(os.environ.get("BENCH_SCALE", "1"))))


def scaled_s(seconds: float) -> float:
    """A duration at the scale of this run."""
    return max(0.1, seconds * float(os.environ.get("BENCH_SCALE", "1")))


async def one_by_one(start: Callable[[], Awaitable[Any]], count: int) -> list[float]:
    """Seconds that each of `count` calls took, one after the other, after a tenth as many unmeasured."""
    for _ in range(count // 10 + 1):
        assert await start() == PAYLOAD
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        await start()
        seconds.append(time.perf_counter() - began)
    return seconds


async def timed(start: Starter) -> dict[str, float]:
    """p50 and p99 of calls one after the other; calls a second with 1,000 outstanding all the time."""
    found = percentiles(await one_by_one(start, scaled(3000, 20)))
    await in_flight(start, scaled_s(0.3))
    return found | {CALLS: await in_flight(start, scaled_s(2.0))}


def percentiles(seconds: Sequence[float], p50: str = P50, p99: str = P99) -> dict[str, float]:
    """Median and 99th percentile in µs, under these names."""
    ordered = sorted(seconds)
    return {
        p50: statistics.median(ordered) * 1e6,
        p99: ordered[len(ordered) * 99 // 100] * 1e6,
    }


async def in_flight(start: Starter, for_s: float) -> float:
    """Calls a second while each answer starts the next call, `OUTSTANDING` at any time."""
    answered, open_calls = 0, OUTSTANDING
    began = time.perf_counter()
    until = began + for_s
    done = asyncio.get_running_loop().create_future()

    def next_one(call: asyncio.Future[Any]) -> None:
        nonlocal answered, open_calls
        call.result()
        answered += 1
        if time.perf_counter() < until:
            start().add_done_callback(next_one)
            return
        open_calls -= 1
        if not open_calls:
            done.set_result(time.perf_counter() - began)

    for _ in range(OUTSTANDING):
        start().add_done_callback(next_one)
    seconds: float = await done
    return answered / seconds


def rate(size: int, seconds: Sequence[float]) -> float:
    """GB/s (1e9) of `size` bytes in the median time."""
    return size / statistics.median(seconds) / 1e9


def spin() -> None:
    """Pure Python for ever: what a training loop without a GPU looks like to the interpreter."""
    while True:
        sum(range(1000))


def write_figures(found: Mapping[str, Any], directory: Path | str = ".") -> None:
    """Hand the figures of this turn to the measurement, whole or not at all."""
    (Path(directory) / "figures.new").write_text(json.dumps(found))
    os.rename(Path(directory) / "figures.new", Path(directory) / "figures.json")


async def until_figures(directory: Path) -> None:
    """Say that a server is up; return when whoever measures is done."""
    (directory / f"up-{os.getpid()}").touch()
    while not (directory / "figures.json").exists():  # noqa: ASYNC110 - another process writes it
        await asyncio.sleep(0.02)
