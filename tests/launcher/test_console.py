"""The console against readers that are slow, stuck or gone."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from runtime.launcher.console import Console


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        try:
            os.close(fd)
        except OSError:
            pass


async def read(fd: int, count: int) -> bytes:
    """Read on a thread: the writer's thread and the loop go on meanwhile."""

    def collect() -> bytes:
        data = b""
        while len(data) < count:
            data += os.read(fd, 1 << 16)
        return data

    return await asyncio.to_thread(collect)


async def test_both_streams_get_their_own_in_order(pipe: tuple[int, int]) -> None:
    other = os.pipe()
    console = Console(pipe[1], other[1])
    console.write("stdout", b"one\n")
    console.write("stderr", b"two\n")
    console.write("stdout", b"three\n")
    await console.close(asyncio.Event())
    assert os.read(pipe[0], 100) == b"one\nthree\n"
    assert os.read(other[0], 100) == b"two\n"
    for fd in other:
        os.close(fd)


async def test_a_sender_waits_while_nobody_reads_and_nothing_is_lost(
    pipe: tuple[int, int],
) -> None:
    console = Console(pipe[1], pipe[1])
    blocks = [bytes([65 + n]) * 1_000_000 for n in range(8)]
    for block in blocks:
        console.write("stdout", block)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await console.drain()
    reading = asyncio.create_task(read(pipe[0], 8_000_000))
    await console.drain()
    await console.close(asyncio.Event())
    assert await reading == b"".join(blocks)


async def test_closing_waits_for_a_slow_reader(pipe: tuple[int, int]) -> None:
    console = Console(pipe[1], pipe[1])
    console.write("stdout", bytes(500_000))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await console.close(asyncio.Event())
    assert len(await read(pipe[0], 500_000)) == 500_000


async def test_closing_in_a_hurry_drops_what_nobody_takes(pipe: tuple[int, int]) -> None:
    console = Console(pipe[1], pipe[1])
    console.write("stdout", bytes(500_000))
    hurry = asyncio.Event()
    hurry.set()
    async with asyncio.timeout(5):
        await console.close(hurry, grace_s=0.05)
    await read(pipe[0], 500_000)  # lets the thread end


async def test_a_stream_whose_reader_is_gone_is_given_up_and_the_other_is_not(
    pipe: tuple[int, int],
) -> None:
    other = os.pipe()
    os.close(pipe[0])
    console = Console(pipe[1], other[1])
    for _ in range(10):
        console.write("stdout", bytes(1_000_000))
    console.write("stderr", b"still here\n")
    await console.drain()
    await console.close(asyncio.Event())
    assert os.read(other[0], 100) == b"still here\n"
    for fd in other:
        os.close(fd)
