"""The limits of calls: `python -m bench.raw_rpc SIDE KIND DIRECTORY`, SIDE one of serve, call.

KIND is

- `unix`: asyncio's `Protocol` on a unix socket, 64 bytes there and back and nothing else: no ids, no
  encoding; answers come in the order of the questions. `call` asks all servers that there are at once.
- `busy`: the same, where the server's main thread runs pure Python and its loop another one.
- `zmq`: pyzmq's DEALER and ROUTER over TCP as a plain blocking program, with the same message sizes as
  a minimal RPC has (an id and the payload, in msgpack): one by one, and in bursts of 1,000.
- `zmq-loop`: the same, driven by an event loop: the descriptor in `add_reader`, drained until EAGAIN.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import msgpack
import zmq

from bench import timing
from bench.timing import CALLS, OUTSTANDING, P50, P99, PAYLOAD

# -- unix sockets --------------------------------------------------------------------------------


class Echo(asyncio.Protocol):
    """Gives back what comes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


class Asker(asyncio.Protocol):
    """Sends payloads; the futures of their answers are done in order."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[asyncio.Future[bytes]] = deque()
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def ask(self) -> asyncio.Future[bytes]:
        future = self._loop.create_future()
        self._waiting.append(future)
        self.transport.write(PAYLOAD)
        return future

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        whole = len(data) - len(data) % len(PAYLOAD)
        for at in range(0, whole, len(PAYLOAD)):
            self._waiting.popleft().set_result(data[at : at + len(PAYLOAD)])
        self._rest = data[whole:]


async def serve_unix(directory: Path) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_unix_server(Echo, f"{directory}/{os.getpid()}.unix")
    await timing.until_figures(directory)
    server.close()


async def call_unix(paths: list[str]) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    askers = [(await loop.create_unix_connection(Asker, path))[1] for path in paths]
    if len(askers) == 1:
        found = await timing.timed(askers[0].ask)
    else:
        found = await _fan_out(askers)
    for asker in askers:
        asker.transport.close()
    return found


async def _fan_out(askers: list[Asker]) -> dict[str, float]:
    async def ask_all() -> bytes:
        *_, last = await asyncio.gather(*(asker.ask() for asker in askers))
        return last

    return timing.percentiles(await timing.one_by_one(ask_all, timing.scaled(1000, 20)))


def serve_busy(directory: Path) -> None:
    """The switch interval is the runtime's: with Python's own, every call would take 5 ms."""
    sys.setswitchinterval(0.0005)
    loop = threading.Thread(target=lambda: asyncio.run(serve_unix(directory)))
    threading.Thread(target=timing.spin, daemon=True).start()
    loop.start()
    loop.join()
    os._exit(0)


# -- ZeroMQ, no loop -----------------------------------------------------------------------------


@contextlib.contextmanager
def zmq_socket(kind: int, directory: Path) -> Iterator[zmq.Socket[bytes]]:
    """Bound (ROUTER) or connected (DEALER) over TCP loopback."""
    with zmq.Context() as context, context.socket(kind) as socket:
        socket.set(zmq.LINGER, 0)
        socket.set_hwm(0)
        if kind == zmq.ROUTER:
            port = socket.bind_to_random_port("tcp://127.0.0.1")
            (directory / "port").write_text(str(port))
        else:
            socket.connect(f"tcp://127.0.0.1:{(directory / 'port').read_text()}")
        yield socket


def serve_zmq(directory: Path) -> None:
    with zmq_socket(zmq.ROUTER, directory) as socket:
        socket.set(zmq.RCVTIMEO, 50)
        (directory / f"up-{os.getpid()}").touch()
        while True:
            try:
                peer, body = socket.recv_multipart()
            except zmq.Again:
                if (directory / "figures.json").exists():
                    return
            else:
                socket.send_multipart([peer, msgpack.packb(msgpack.unpackb(body))])


def call_zmq(directory: Path) -> dict[str, float]:
    ids = count()
    with zmq_socket(zmq.DEALER, directory) as socket:

        def burst(size: int) -> float:
            began = time.perf_counter()
            for _ in range(size):
                socket.send(msgpack.packb([next(ids), PAYLOAD]))
            for _ in range(size):
                _, payload = msgpack.unpackb(socket.recv())
                assert payload == PAYLOAD
            return time.perf_counter() - began

        sequential = [burst(1) for _ in range(timing.scaled(3300, 20))][timing.scaled(300, 2) :]
        bursts = [burst(OUTSTANDING) for _ in range(timing.scaled(100, 3))][1:]
    return timing.percentiles(sequential, P50, P99) | {
        CALLS: OUTSTANDING * len(bursts) / sum(bursts)
    }


# -- ZeroMQ on a loop ----------------------------------------------------------------------------


class OnLoop:
    """A ZeroMQ socket on the event loop: every wake-up reads until there is nothing more."""

    def __init__(self, socket: zmq.Socket[bytes], received: Callable[[list[bytes]], None]) -> None:
        self._socket, self._received = socket, received
        self._loop = asyncio.get_running_loop()
        self._again = False
        self._loop.add_reader(int(socket.getsockopt(zmq.FD)), self._drain)

    def _drain(self) -> None:
        """The descriptor is edge-triggered: read until EAGAIN, at most 256 at a time."""
        self._again = False
        for _ in range(256):
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._received(parts)
        self._soon()

    def send(self, parts: list[bytes]) -> None:
        """A send can swallow the wake-up of what came in meanwhile: look again afterwards."""
        self._socket.send_multipart(parts, zmq.NOBLOCK)
        self._soon()

    def _soon(self) -> None:
        if not self._again:
            self._again = True
            self._loop.call_soon(self._drain)

    def close(self) -> None:
        self._loop.remove_reader(int(self._socket.getsockopt(zmq.FD)))


async def serve_zmq_loop(directory: Path) -> None:
    def answer(parts: list[bytes]) -> None:
        peer, body = parts
        on_loop.send([peer, msgpack.packb(msgpack.unpackb(body))])

    with zmq_socket(zmq.ROUTER, directory) as socket:
        on_loop = OnLoop(socket, answer)
        await timing.until_figures(directory)
        on_loop.close()


async def call_zmq_loop(directory: Path) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    ids = count()
    calls: dict[int, asyncio.Future[Any]] = {}

    def answered(parts: list[bytes]) -> None:
        call_id, payload = msgpack.unpackb(parts[0])
        calls.pop(call_id).set_result(payload)

    def start() -> asyncio.Future[Any]:
        call_id = next(ids)
        future = calls[call_id] = loop.create_future()
        on_loop.send([msgpack.packb([call_id, PAYLOAD])])
        return future

    with zmq_socket(zmq.DEALER, directory) as socket:
        on_loop = OnLoop(socket, answered)
        found = await timing.timed(start)
        on_loop.close()
    return found


def main(side: str, kind: str, directory: Path) -> None:
    if side == "serve":
        match kind:
            case "busy":
                serve_busy(directory)
            case "zmq":
                serve_zmq(directory)
            case "zmq-loop":
                asyncio.run(serve_zmq_loop(directory))
            case "unix":
                asyncio.run(serve_unix(directory))
        return
    if kind == "zmq":
        found = call_zmq(directory)
    elif kind == "zmq-loop":
        found = asyncio.run(call_zmq_loop(directory))
    else:
        found = asyncio.run(call_unix([str(path) for path in directory.glob("*.unix")]))
    timing.write_figures(found, directory)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
