"""Threads that send more than a callee takes wait; who must not wait does not. Real threads and time."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest

from runtime.errors import Timeout
from runtime.peer import admission
from runtime.peer.endpoint import Endpoint
from runtime.peer.flow import RECORD_BYTES, WINDOW_BYTES
from runtime.wire import codec
from tests.peer.support import echo, until, world

MIB = 1024**2


class Receiver:
    """A plain handler that does one call each time it is let."""

    def __init__(self) -> None:
        self.turns = threading.Semaphore(0)
        self.seen: list[int] = []

    def take(self, number: int, data: bytes) -> None:
        assert self.turns.acquire(timeout=10)
        self.seen.append(number)


def send(endpoint: Endpoint, count: int, size: int, sent: list[int]) -> None:
    """On a thread: what a cast of a group does."""
    for number in range(count):
        parcel = codec.encode_arguments((number, bytes(size)))
        endpoint.admit(["b-0"], size, 10)
        endpoint.mailbox.post(endpoint.caller.cast, "b-0", "take", parcel)
        sent.append(number)


@pytest.mark.parametrize("size", [16_000, MIB])
async def test_a_quick_thread_waits_for_a_slow_receiver_and_nothing_is_lost(size: int) -> None:
    count = 40 * MIB // size
    async with world(a=1, b=1) as job:
        receiver = Receiver()
        a, b = await job.start("a-0"), await job.start("b-0", take=receiver.take, echo=echo)
        await a.call("b-0", "echo", (1,))
        sent: list[int] = []
        work = asyncio.get_running_loop().run_in_executor(None, send, a, count, size, sent)
        window = a.caller._channels[b.peer].window
        await until(lambda: window.full(size))
        stuck = -1
        while len(sent) != stuck:
            stuck = len(sent)
            await asyncio.sleep(0.1)
        assert stuck < count, "it goes on and on"
        ahead = admission.AHEAD_BYTES + 2 * (size + RECORD_BYTES)
        assert window.in_flight + window.waiting <= WINDOW_BYTES + ahead
        for _ in range(count):
            receiver.turns.release()
        await work
        await until(lambda: len(receiver.seen) == count)
        assert receiver.seen == list(range(count))
        await until(lambda: not window.in_flight)


async def test_waiting_for_room_ends_with_its_time_and_says_for_whom(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(admission, "SAY_AFTER_S", 0.05)
    async with world(a=1, b=1) as job:
        receiver = Receiver()
        a, _ = await job.start("a-0"), await job.start("b-0", take=receiver.take)
        for number in range(20):
            a.caller.call("b-0", "take", codec.encode_arguments((number, bytes(MIB))), _Nobody())
        with (
            caplog.at_level(logging.WARNING),
            pytest.raises(Timeout, match=r"within 0\.2 s: no room for 5 bytes: b-0 behind"),
        ):
            await asyncio.to_thread(a.admit, ["b-0"], 5, 0.2)
        assert caplog.text.count("room for 5 bytes") == 1
        for _ in range(20):
            receiver.turns.release()
        await asyncio.to_thread(a.admit, ["b-0"], 5, 10)


async def test_a_thread_that_waits_goes_on_when_its_callee_dies() -> None:
    async with world(a=1, b=1) as job:
        receiver = Receiver()
        a, b = await job.start("a-0"), await job.start("b-0", take=receiver.take)
        for number in range(20):
            a.caller.call("b-0", "take", codec.encode_arguments((number, bytes(MIB))), _Nobody())
        waiting = asyncio.get_running_loop().run_in_executor(None, a.admit, ["b-0"], MIB, 10)
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await job.kill(b)
        await job.start("b-0", take=receiver.take)
        receiver.turns.release(100)
        async with asyncio.timeout(5):
            await waiting


async def test_handlers_and_threads_with_a_loop_of_their_own_never_wait() -> None:
    async with world(a=1, b=1) as job:
        receiver = Receiver()
        a, _ = await job.start("a-0"), await job.start("b-0", take=receiver.take)
        for number in range(20):
            a.caller.call("b-0", "take", codec.encode_arguments((number, bytes(MIB))), _Nobody())

        def plain() -> str:
            a.admit(["b-0"], MIB, 10)
            return "went on"

        async def in_a_loop() -> None:
            a.admit(["b-0"], MIB, 10)

        a.export("plain", plain)
        async with asyncio.timeout(5):
            assert await a.call("a-0", "plain") == "went on"
            await asyncio.to_thread(asyncio.run, in_a_loop())
            a.admit(["b-0"], MIB, 10)
        receiver.turns.release(20)


class _Nobody:
    def answered(self, call: Any, value: Any) -> None: ...

    def failed(self, call: Any, error: Exception) -> None: ...
