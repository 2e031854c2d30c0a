"""The limits of large arguments: `python -m bench.raw_bulk SIDE KIND DIRECTORY`, KIND "NAME-MIB".

`call memcpy-64` copies arrays of 64 MiB within one process, one thread: into memory that was written
before (warm), and once into memory that is new (first use: the kernel finds each page when it is touched).
`serve` and `call` with `tcp-64` or `fresh-64` move them over a TCP connection of the loopback by
`sendall` and `recv_into`, answered by one byte, into one kept buffer or into a new one each time.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy

from bench import timing
from bench.timing import MIB

FIRST, WARM = "first use, GB/s", "warm, GB/s"
ALONE, TOUCH = "warm, one by one, GB/s", "warm, every byte read, GB/s"

Array = Any


def sources(size: int) -> Iterator[Array]:
    """Arrays to be sent, in turn: so many that a small one has left the processor's caches before it
    is used again, as in any real program."""
    arrays = [
        numpy.ones(size, dtype=numpy.uint8) for _ in range(max(1, min(128, 128 * MIB // size)))
    ]
    return cycle(arrays)


def repetitions(size: int) -> int:
    return timing.scaled({1: 300, 64: 12}.get(size // MIB, 5), 2)


def read(array: Array) -> int:
    """Every byte."""
    return int(array.view(numpy.uint64).sum())


def seconds(work: Callable[[], object], times: int) -> list[float]:
    """How long `work` takes each time, after one that is not measured."""
    work()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return found


def memcpy(size: int) -> dict[str, float]:
    source, times = sources(size), repetitions(size)
    fresh = numpy.frombuffer(mmap.mmap(-1, size), dtype=numpy.uint8)
    array = next(source)
    began = time.perf_counter()
    numpy.copyto(fresh, array)
    first = time.perf_counter() - began
    targets = sources(size)

    def copy() -> None:
        numpy.copyto(next(targets), next(source))

    def copy_and_read() -> None:
        numpy.copyto(target := next(targets), next(source))
        read(target)

    warm = timing.rate(size, seconds(copy, times))
    touched = timing.rate(size, seconds(copy_and_read, times))
    return {FIRST: size / first / 1e9, WARM: warm, ALONE: warm, TOUCH: touched}


def serve_tcp(size: int, fresh: bool, directory: Path) -> None:
    kept = numpy.ones(size, dtype=numpy.uint8)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        (directory / "port").write_text(str(listener.getsockname()[1]))
        (directory / f"up-{os.getpid()}").touch()
        connection, _ = listener.accept()
        with connection:
            while question := connection.recv(1):
                array = numpy.empty(size, dtype=numpy.uint8) if fresh else kept
                _receive(connection, memoryview(array.data))
                if question == b"t":
                    read(array)
                connection.sendall(b".")


def _receive(connection: socket.socket, view: memoryview) -> None:
    while view:
        view = view[connection.recv_into(view) :]


def call_tcp(size: int, directory: Path) -> dict[str, float]:
    source, times = sources(size), repetitions(size)
    with socket.create_connection(("127.0.0.1", int((directory / "port").read_text()))) as server:
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def ask(question: bytes) -> None:
            server.sendall(question)
            server.sendall(next(source))
            assert server.recv(1) == b"."

        began = time.perf_counter()
        ask(b"s")
        first = time.perf_counter() - began
        warm = timing.rate(size, seconds(lambda: ask(b"s"), times))
        touched = timing.rate(size, seconds(lambda: ask(b"t"), times))
    return {FIRST: size / first / 1e9, WARM: warm, ALONE: warm, TOUCH: touched}


def main(side: str, kind: str, directory: Path) -> None:
    name, _, mib = kind.partition("-")
    size = int(mib) * MIB
    if side == "serve":
        serve_tcp(size, name == "fresh", directory)
    else:
        found = memcpy(size) if name == "memcpy" else call_tcp(size, directory)
        timing.write_figures(found, directory)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
