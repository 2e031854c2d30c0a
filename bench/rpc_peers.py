"""The two processes of `bench.rpc`: `python -m bench.rpc_peers serve|call KIND DIRECTORY`.

KIND is `raw` (pyzmq DEALER and ROUTER, file descriptors in `add_reader`, drained until EAGAIN, msgpack with
nothing but an id and the payload), `async` or `plain` (our endpoints on the same kind of ipc socket, with a
coroutine or a plain function as the handler). The caller is a coroutine in all of them, and it is timed by
the same code. It writes its figures to `DIRECTORY/figures.json`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

PAYLOAD = bytes(range(64))
OUTSTANDING = 1000
SEQUENTIAL = 3000
BURST_S = 2.0

Starter = Callable[[], "asyncio.Future[Any]"]
"""Starts one call; the future is done with its answer."""


async def timed(start: Starter) -> dict[str, float]:
    """p50 and p99 of calls one after the other; calls a second with 1,000 outstanding all the time."""
    for _ in range(300):
        assert await start() == PAYLOAD
    seconds = []
    for _ in range(SEQUENTIAL):
        began = time.perf_counter()
        await start()
        seconds.append(time.perf_counter() - began)
    await in_flight(start, 0.3)
    return percentiles(seconds) | {"calls/s, 1,000 outstanding": await in_flight(start, BURST_S)}


def percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "sequential p50, µs": ordered[len(ordered) // 2] * 1e6,
        "sequential p99, µs": ordered[len(ordered) * 99 // 100] * 1e6,
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
    seconds = await done
    return answered / seconds


# -- raw ZeroMQ ----------------------------------------------------------------------------------


class Raw:
    """A ZeroMQ socket on the event loop: every wake-up reads until there is nothing more."""

    def __init__(self, kind: str) -> None:
        import zmq

        self.zmq = zmq
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER if kind == "serve" else zmq.DEALER)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set_hwm(0)
        self._loop = asyncio.get_running_loop()
        self._again = False
        self.received: Callable[[list[bytes]], None] = lambda parts: None

    def start(self) -> None:
        self._loop.add_reader(self.socket.getsockopt(self.zmq.FD), self.drain)

    def drain(self) -> None:
        """The descriptor is edge-triggered: read until EAGAIN, at most 256 at a time."""
        self._again = False
        for _ in range(256):
            try:
                parts = self.socket.recv_multipart(self.zmq.NOBLOCK)
            except self.zmq.Again:
                return
            self.received(parts)
        self._soon()

    def send(self, parts: list[bytes]) -> None:
        """A send can swallow the wake-up of what came in meanwhile: look again afterwards."""
        self.socket.send_multipart(parts, self.zmq.NOBLOCK)
        self._soon()

    def _soon(self) -> None:
        if not self._again:
            self._again = True
            self._loop.call_soon(self.drain)

    def close(self) -> None:
        self._loop.remove_reader(self.socket.getsockopt(self.zmq.FD))
        self.socket.close()
        self.context.term()


async def serve_raw(directory: Path) -> None:
    import msgpack

    raw = Raw("serve")

    def answer(parts: list[bytes]) -> None:
        peer, body = parts
        call_id, payload = msgpack.unpackb(body)
        raw.send([peer, msgpack.packb([call_id, payload])])

    raw.received = answer
    raw.socket.bind(f"ipc://{directory}/raw")
    raw.start()
    await served(directory)
    raw.close()


async def call_raw(directory: Path) -> dict[str, float]:
    import msgpack

    raw = Raw("call")
    loop = asyncio.get_running_loop()
    ids = count()
    calls: dict[int, asyncio.Future[Any]] = {}

    def answered(parts: list[bytes]) -> None:
        call_id, payload = msgpack.unpackb(parts[0])
        calls.pop(call_id).set_result(payload)

    def start() -> asyncio.Future[Any]:
        call_id = next(ids)
        future = calls[call_id] = loop.create_future()
        raw.send([msgpack.packb([call_id, PAYLOAD])])
        return future

    raw.received = answered
    raw.socket.connect(f"ipc://{directory}/raw")
    raw.start()
    found = await timed(start)
    raw.close()
    return found


# -- ours ----------------------------------------------------------------------------------------

SERVER = "server-0.00000001"


async def serve_ours(directory: Path, kind: str) -> None:
    from runtime.peer.endpoint import Endpoint
    from runtime.transport.sockets import SocketTransport

    async def echo(payload: bytes) -> bytes:
        return payload

    def plain_echo(payload: bytes) -> bytes:
        return payload

    transport = SocketTransport(SERVER, f"ipc://{directory}/server")
    async with Endpoint(transport, role="server", rank=0) as endpoint:
        endpoint.export("echo", echo if kind == "async" else plain_echo)
        await served(directory)


async def call_ours(directory: Path) -> dict[str, float]:
    from runtime.peer.context import PeerAddress
    from runtime.peer.endpoint import Endpoint
    from runtime.transport.sockets import SocketTransport

    server = PeerAddress(SERVER, f"ipc://{directory}/server", "server", 0)
    transport = SocketTransport("caller-0.00000002", f"ipc://{directory}/caller")
    async with Endpoint(transport, role="caller", rank=0) as endpoint:
        return await timed(lambda: endpoint.call(server, "echo", (PAYLOAD,)))


async def served(directory: Path) -> None:
    """Say that the server is up; return when the caller is done."""
    (directory / "up").touch()
    while not (directory / "figures.json").exists():  # noqa: ASYNC110 - another process writes it
        await asyncio.sleep(0.02)


async def main(side: str, kind: str, directory: Path) -> None:
    if side == "serve":
        await (serve_raw(directory) if kind == "raw" else serve_ours(directory, kind))
        return
    found = await (call_raw(directory) if kind == "raw" else call_ours(directory))
    (directory / "figures.new").write_text(json.dumps(found))
    os.rename(directory / "figures.new", directory / "figures.json")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
