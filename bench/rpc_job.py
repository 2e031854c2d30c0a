"""The program of the job that `bench.rpc` launches: a plain script's calls, waited for with `.result()`."""

from __future__ import annotations

import json
import os
import time
from collections import deque

from bench.rpc_peers import BURST_S, OUTSTANDING, PAYLOAD, SEQUENTIAL, percentiles
from runtime import RoleActor, RoleGroup, rpc


class Server:
    @rpc
    async def echo(self, payload: bytes) -> bytes:
        return payload

    @rpc
    def plain_echo(self, payload: bytes) -> bytes:
        return payload


def drive() -> None:
    """Times both handlers; the figures go to `figures.json` in the working directory."""
    actor = RoleGroup("server")[0]
    found = {method: timed(actor, method) for method in ("echo", "plain_echo")}
    with open("figures.new", "w") as file:
        json.dump(found, file)
    os.rename("figures.new", "figures.json")


def timed(actor: RoleActor, method: str) -> dict[str, float]:
    for _ in range(300):
        assert actor.call(method, PAYLOAD).result(timeout=20) == PAYLOAD
    seconds = []
    for _ in range(SEQUENTIAL):
        began = time.perf_counter()
        actor.call(method, PAYLOAD).result()
        seconds.append(time.perf_counter() - began)
    return percentiles(seconds) | {"calls/s, 1,000 outstanding": in_flight(actor, method)}


def in_flight(actor: RoleActor, method: str) -> float:
    calls = deque(actor.call(method, PAYLOAD) for _ in range(OUTSTANDING))
    answered, began = 0, time.perf_counter()
    while time.perf_counter() - began < BURST_S:
        calls.popleft().result()
        answered += 1
        calls.append(actor.call(method, PAYLOAD))
    rate = answered / (time.perf_counter() - began)
    for call in calls:
        call.result()
    return rate
