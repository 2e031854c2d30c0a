"""The programs of the jobs that `bench.rpc` and `bench.group` launch.

Run as `-m bench.rpc_job METHOD [all]` it is the caller: a coroutine on the loop of its own node. `block` and
`block_all` are plain callers, whose answers are waited for with `.result()`. They call the role "server":
one member as fast as they can, or all members and gather.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import deque

from bench import timing
from bench.timing import CALLS, OUTSTANDING, PAYLOAD
from runtime import Node, RoleActor, RoleGroup, rpc

LIMIT_S = 30.0
"""The deadline that travels with every call."""


class Server:
    @rpc
    async def echo(self, payload: bytes) -> bytes:
        return payload

    @rpc
    def plain_echo(self, payload: bytes) -> bytes:
        return payload


class BusyServer(Server):
    """A trainer: its main thread runs pure Python, and handlers run beside it."""

    def run(self) -> None:
        timing.spin()


async def call_one(method: str) -> dict[str, float]:
    async with Node.from_env() as node:
        return await timing.timed(
            lambda: node.endpoint.call("server-0", method, (PAYLOAD,), timeout=LIMIT_S)
        )


async def call_all(method: str) -> dict[str, float]:
    async with Node.from_env():
        group = RoleGroup("server").options(timeout=LIMIT_S)

        async def ask_all() -> bytes:
            *_, last = await group.call(method, PAYLOAD)
            return last

        return timing.percentiles(await timing.one_by_one(ask_all, timing.scaled(1000, 20)))


def block() -> None:
    """`BENCH_METHOD` of one member, one call after the other, then 1,000 outstanding."""
    method = os.environ["BENCH_METHOD"]
    actor = RoleGroup("server")[0].options(timeout=LIMIT_S)

    def ask() -> None:
        assert actor.call(method, PAYLOAD).result() == PAYLOAD

    found = timing.percentiles(blocking(ask, timing.scaled(3000, 20)))
    timing.write_figures(found | {CALLS: in_flight(actor, method)})


def block_all() -> None:
    """`echo` of every member, gathered."""
    group = RoleGroup("server").options(timeout=LIMIT_S)

    def ask_all() -> None:
        assert group.call("echo", PAYLOAD).result()[-1] == PAYLOAD

    timing.write_figures(timing.percentiles(blocking(ask_all, timing.scaled(1000, 20))))


def blocking(ask: timing.Callable[[], None], count: int) -> list[float]:
    for _ in range(count // 10 + 1):
        ask()
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        ask()
        seconds.append(time.perf_counter() - began)
    return seconds


def in_flight(actor: RoleActor, method: str) -> float:
    calls = deque(actor.call(method, PAYLOAD) for _ in range(OUTSTANDING))
    answered, began = 0, time.perf_counter()
    for_s = timing.scaled_s(2.0)
    while time.perf_counter() - began < for_s:
        calls.popleft().result()
        answered += 1
        calls.append(actor.call(method, PAYLOAD))
    rate = answered / (time.perf_counter() - began)
    for call in calls:
        call.result()
    return rate


if __name__ == "__main__":
    calls = call_all if "all" in sys.argv[2:] else call_one
    timing.write_figures(asyncio.run(calls(sys.argv[1])))
