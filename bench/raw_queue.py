"""What queues are compared with: `python -m bench.raw_queue SIDE KIND DIRECTORY`.

`stream`: a server that holds the items, asyncio streams on a unix socket, each put awaited until the
server has it, each get a question of its own: `serve stream`, `serve produce` and `call stream` are its
three processes. `mp`: `multiprocessing.Queue`, whose put returns before the item has left the process.
Items are `ITEM` bytes, all different; pickle sends an object that is repeated only once.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import struct
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from bench import timing

ONE, BATCH = "items/s, one by one", "items/s, batches of 100"
WAKE_P50, WAKE_P99 = "put to get p50, µs", "put to get p99, µs"
LARGE = "1 MiB items, GB/s"
ITEM, POOL = 1024, 4000

_HEAD = struct.Struct("<cI")
_BOUND = 1000


def item_pool() -> list[bytes]:
    """`POOL` different items, numbered."""
    return [number.to_bytes(8, "little") + os.urandom(ITEM - 8) for number in range(POOL)]


PHASES = ((ONE, 1, timing.scaled(30_000, 100)), (BATCH, 100, timing.scaled(5000, 20)))
"""Name, items a put, puts."""


async def produce(put: Callable[[bytes], Awaitable[Any]]) -> None:
    pool = item_pool()
    for _, batch, puts in PHASES:
        for number in range(puts):
            at = number * batch % POOL
            await put(pickle.dumps(pool[at : at + batch], -1))


async def consume(get: Callable[[], Awaitable[bytes]]) -> dict[str, float]:
    """From the first item to the last."""
    found = {}
    for name, batch, puts in PHASES:
        pickle.loads(await get())
        began = time.perf_counter()
        for _ in range(puts - 1):
            assert len(pickle.loads(await get())) == batch
        found[name] = (puts - 1) * batch / (time.perf_counter() - began)
    return found


# -- a server of streams -------------------------------------------------------------------------


class Server:
    """Bodies in order; a getter waits while there are none, a putter while there are too many."""

    def __init__(self) -> None:
        self._bodies: deque[bytes] = deque()
        self._changed = asyncio.Condition()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                kind, size = _HEAD.unpack(await reader.readexactly(_HEAD.size))
                if kind == b"P":
                    await self._put(await reader.readexactly(size))
                    body = b""
                else:
                    body = await self._get()
                writer.write(_HEAD.pack(b"A", len(body)) + body)
        except asyncio.IncompleteReadError:
            writer.close()

    async def _put(self, body: bytes) -> None:
        async with self._changed:
            while len(self._bodies) >= _BOUND:
                await self._changed.wait()
            self._bodies.append(body)
            self._changed.notify_all()

    async def _get(self) -> bytes:
        async with self._changed:
            while not self._bodies:
                await self._changed.wait()
            self._changed.notify_all()
            return self._bodies.popleft()


async def serve_stream(directory: Path) -> None:
    server = await asyncio.start_unix_server(Server().serve, directory / "queue")
    await timing.until_figures(directory)
    server.close()


async def client(directory: Path) -> Callable[[bytes, bytes], Awaitable[bytes]]:
    """Asks the server: (kind, body) -> body."""
    while not (directory / "queue").exists():  # noqa: ASYNC110 - another process makes it
        await asyncio.sleep(0.01)
    reader, writer = await asyncio.open_unix_connection(directory / "queue")

    async def ask(kind: bytes, body: bytes) -> bytes:
        writer.write(_HEAD.pack(kind, len(body)) + body)
        _, size = _HEAD.unpack(await reader.readexactly(_HEAD.size))
        return await reader.readexactly(size)

    return ask


async def produce_stream(directory: Path) -> None:
    ask = await client(directory)
    (directory / f"up-{os.getpid()}").touch()
    await produce(lambda body: ask(b"P", body))
    await timing.until_figures(directory)


async def call_stream(directory: Path) -> dict[str, float]:
    ask = await client(directory)
    return await consume(lambda: ask(b"G", b""))


# -- multiprocessing -----------------------------------------------------------------------------


def produce_mp(queue: Any) -> None:
    pool = item_pool()
    for _, batch, puts in PHASES:
        for number in range(puts):
            at = number * batch % POOL
            queue.put(pool[at : at + batch])


def call_mp() -> dict[str, float]:
    queue: Any = multiprocessing.Queue(_BOUND)
    producer = multiprocessing.Process(target=produce_mp, args=(queue,))
    producer.start()
    found = {}
    for name, batch, puts in PHASES:
        queue.get()
        began = time.perf_counter()
        for _ in range(puts - 1):
            assert len(queue.get()) == batch
        found[name] = (puts - 1) * batch / (time.perf_counter() - began)
    producer.join()
    return found


def main(side: str, kind: str, directory: Path) -> None:
    if side == "serve":
        asyncio.run(serve_stream(directory) if kind == "stream" else produce_stream(directory))
        return
    found = call_mp() if kind == "mp" else asyncio.run(call_stream(directory))
    timing.write_figures(found, directory)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
