"""Generators as handlers: items, credit, ends, errors, and all the ways to give one up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from runtime.errors import (
    ArgumentError,
    MisuseError,
    NotExposedError,
    PeerLostError,
    RemoteError,
    Timeout,
)
from runtime.peer.calls import CallOptions, Outgoing
from runtime.peer.endpoint import Endpoint, current_call
from runtime.peer.flow import ITEM_BYTES, ITEMS
from runtime.transport.memory import NetworkSettings
from runtime.wire import codec
from tests.peer.support import InlineRunner, echo, settle, until, world


class Sink:
    """Collects a stream; grants credit for what it has taken when `eager`."""

    def __init__(self, endpoint: Endpoint, eager: bool = True) -> None:
        self.endpoint = endpoint
        self.eager = eager
        self.items: list[Any] = []
        self.ended = asyncio.Event()
        self.error: Exception | None = None
        self.call: Outgoing

    def item(self, call: Outgoing, value: Any) -> None:
        assert not self.ended.is_set()
        self.items.append(value)
        if self.eager:
            self.endpoint.caller.more(call, 1)

    def answered(self, call: Outgoing, value: Any) -> None:
        assert value is None
        self.ended.set()

    def failed(self, call: Outgoing, error: Exception) -> None:
        self.error = error
        self.ended.set()


def open_stream(
    endpoint: Endpoint,
    method: str,
    *args: Any,
    eager: bool = True,
    target: str = "b-0",
    timeout: float | None = None,
) -> Sink:
    sink = Sink(endpoint, eager)
    sink.call = endpoint.caller.stream(
        target, method, codec.encode_arguments(args), sink, CallOptions(timeout)
    )
    return sink


class Source:
    """Generators that note how far they were asked to go, and that they were closed."""

    def __init__(self) -> None:
        self.made = 0
        self.closed = 0

    async def numbers(self, count: int, size: int = 0) -> AsyncIterator[Any]:
        try:
            for n in range(count):
                self.made = n + 1
                yield bytes(size) if size else n
        finally:
            self.closed += 1

    def plain(self, count: int, size: int = 0) -> Iterator[Any]:
        try:
            for n in range(count):
                self.made = n + 1
                yield bytes(size) if size else n
        finally:
            self.closed += 1

    async def slow(self, count: int) -> AsyncIterator[int]:
        try:
            for n in range(count):
                await asyncio.sleep(1)
                yield n
        finally:
            self.closed += 1

    async def breaks(self) -> AsyncIterator[int]:
        yield 1
        yield 2
        raise KeyError("third")

    def plain_breaks(self) -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("third")


METHODS = ["numbers", "plain"]


async def start(job: Any) -> tuple[Endpoint, Endpoint, Source]:
    source = Source()
    handlers = {
        name: getattr(source, name)
        for name in ("numbers", "plain", "slow", "breaks", "plain_breaks")
    }
    a = await job.start("a-0")
    b = await job.start("b-0", runner=InlineRunner(), echo=echo, **handlers)
    return a, b, source


@pytest.mark.looptime
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [0, 1, ITEMS, 1000])
async def test_items_arrive_in_order_and_then_the_end(method: str, count: int) -> None:
    async with world(NetworkSettings(delay_s=(0.0, 0.01)), a=1, b=1) as job:
        a, b, source = await start(job)
        sink = open_stream(a, method, count)
        await sink.ended.wait()
        assert sink.items == list(range(count))
        assert sink.error is None
        assert source.closed == 1
        assert a.statistics().outstanding == b.statistics().running == 0


@pytest.mark.looptime
@pytest.mark.parametrize("method", METHODS)
async def test_a_generator_is_not_asked_for_more_than_there_is_credit_for(method: str) -> None:
    async with world(a=1, b=1) as job:
        a, _, source = await start(job)
        sink = open_stream(a, method, 1000, eager=False)
        await asyncio.sleep(10)
        assert len(sink.items) == source.made == ITEMS
        assert await a.call("b-0", "echo", (1,)) == 1
        a.caller.more(sink.call, 10)
        await asyncio.sleep(10)
        assert len(sink.items) == source.made == ITEMS + 10
        sink.eager = True
        a.caller.more(sink.call, ITEMS)
        await sink.ended.wait()
        assert sink.items == list(range(1000))


@pytest.mark.looptime
@pytest.mark.parametrize("method", METHODS)
async def test_large_items_have_their_credit_in_bytes(method: str) -> None:
    async with world(a=1, b=1) as job:
        a, _, source = await start(job)
        sink = open_stream(a, method, 20, ITEM_BYTES // 2, eager=False)
        await asyncio.sleep(1)
        assert source.made == 2
        a.caller.more(sink.call, 1)
        await asyncio.sleep(1)
        assert source.made == 3
        larger = open_stream(a, method, 5, ITEM_BYTES * 2)
        await larger.ended.wait()
        assert len(larger.items) == 5, "one that is larger than all credit goes alone"
        a.caller.abandon(sink.call)


@pytest.mark.looptime
@pytest.mark.parametrize("method", METHODS)
async def test_a_stream_that_is_given_up_closes_its_generator(method: str) -> None:
    async with world(a=1, b=1) as job:
        a, b, source = await start(job)
        sink = open_stream(a, method, 1000, eager=False)
        await asyncio.sleep(1)
        a.caller.abandon(sink.call)
        await settle()
        assert source.closed == 1
        assert source.made == ITEMS
        assert b.statistics().running == b.statistics().queued == 0


@pytest.mark.looptime
async def test_a_generator_that_is_in_an_await_is_closed_too() -> None:
    async with world(a=1, b=1) as job:
        a, _, source = await start(job)
        sink = open_stream(a, "slow", 10, timeout=3.5)
        await sink.ended.wait()
        assert isinstance(sink.error, Timeout)
        assert sink.items == [0, 1, 2]
        await settle()
        assert source.closed == 1


@pytest.mark.looptime
@pytest.mark.parametrize("method", METHODS)
async def test_a_stream_ends_when_its_consumer_dies(method: str) -> None:
    async with world(a=1, b=1) as job:
        a, b, source = await start(job)
        open_stream(a, method, 1000, eager=False)
        await asyncio.sleep(1)
        await job.kill(a)
        await asyncio.sleep(0.1)
        assert source.closed == 1
        assert b.statistics().running == 0


@pytest.mark.looptime
@pytest.mark.parametrize("method", METHODS)
async def test_a_stream_fails_when_its_producer_dies(method: str) -> None:
    async with world(a=1, b=1) as job:
        a, b, _ = await start(job)
        sink = open_stream(a, method, 1000, eager=False)
        await asyncio.sleep(1)
        await job.kill(b)
        await sink.ended.wait()
        assert isinstance(sink.error, PeerLostError)
        assert sink.error.cause == "SIGKILL"
        assert sink.items == list(range(ITEMS))


@pytest.mark.looptime
@pytest.mark.parametrize("method", METHODS)
async def test_a_stream_ends_with_its_link_and_calls_beside_it_do_not(method: str) -> None:
    async with world(a=1, b=1) as job:
        a, b, source = await start(job)

        async def nap() -> str:
            await asyncio.sleep(10)
            return "rested"

        b.export("nap", nap)
        sink, call = open_stream(a, method, 1000, eager=False), a.call("b-0", "nap")
        await asyncio.sleep(1)
        job.network.part([a.peer], [b.peer])
        job.network.heal()
        await sink.ended.wait()
        assert isinstance(sink.error, PeerLostError)
        assert sink.error.cause == "connection lost"
        assert source.closed == 1
        assert await call == "rested"
        again = open_stream(a, method, 100)
        await again.ended.wait()
        assert again.items == list(range(100))


@pytest.mark.looptime
@pytest.mark.parametrize("method", ["breaks", "plain_breaks"])
async def test_an_error_in_mid_stream_comes_after_the_items_before_it(method: str) -> None:
    async with world(NetworkSettings(delay_s=(0.0, 0.05)), a=1, b=1) as job:
        a, _, _ = await start(job)
        sink = open_stream(a, method)
        await sink.ended.wait()
        assert sink.items == [1, 2]
        assert isinstance(sink.error, KeyError)
        assert isinstance(sink.error, RemoteError)


@pytest.mark.looptime
async def test_an_item_that_cannot_be_sent_fails_the_stream() -> None:
    async def locks() -> AsyncIterator[Any]:
        yield 1
        yield threading.Lock()

    async with world(a=1, b=1) as job:
        a, b, _ = await start(job)
        b.export("locks", locks)
        sink = open_stream(a, "locks")
        await sink.ended.wait()
        assert sink.items == [1]
        assert "lock" in str(sink.error)


@pytest.mark.looptime
async def test_what_cannot_be_streamed_is_refused() -> None:
    async with world(a=1, b=1) as job:
        a, _, _ = await start(job)
        for method, args, kind in (
            ("nothing", (), NotExposedError),
            ("numbers", (), ArgumentError),
            ("plain", ("x", "y", "z"), ArgumentError),
        ):
            sink = open_stream(a, method, *args)
            await sink.ended.wait()
            assert isinstance(sink.error, kind)
            assert sink.items == []


@pytest.mark.looptime
@pytest.mark.parametrize("method", METHODS)
async def test_a_generator_cannot_be_called_like_a_function(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(a=1, b=1) as job:
        a, _, source = await start(job)
        with pytest.raises(MisuseError, match=rf"b-0\.{method}\(\) is a generator"):
            await a.call("b-0", method, (3,))
        a.cast("b-0", method, (3,))
        await settle()
        assert source.made == 0
    assert f"b-0.{method}() is a generator" in caplog.text


@pytest.mark.looptime
async def test_a_function_that_is_streamed_gives_its_result_as_the_only_item() -> None:
    def twice(x: int) -> int:
        return 2 * x

    async with world(a=1, b=1) as job:
        a, b, _ = await start(job)
        b.export("twice", twice)
        for method, expected in (("echo", 4), ("twice", 8)):
            sink = open_stream(a, method, 4)
            await sink.ended.wait()
            assert (sink.items, sink.error) == ([expected], None)


@pytest.mark.looptime
async def test_a_process_streams_to_itself() -> None:
    async with world(b=1) as job:
        source = Source()
        b = await job.start(
            "b-0", runner=InlineRunner(), numbers=source.numbers, plain=source.plain
        )
        for method in METHODS:
            sink = open_stream(b, method, 100)
            await sink.ended.wait()
            assert sink.items == list(range(100))


# plain generators on their thread; real time


async def test_other_plain_handlers_have_their_turn_between_the_items_of_a_plain_generator() -> (
    None
):
    threads: set[int] = set()
    seen: list[str] = []

    def numbers() -> Iterator[int]:
        for n in range(ITEMS * 2):
            threads.add(threading.get_ident())
            seen.append(f"item {n}")
            yield n

    def note(name: str) -> str:
        threads.add(threading.get_ident())
        seen.append(name)
        return name

    async with world(a=1, b=1) as job:
        a, _ = await job.start("a-0"), await job.start("b-0", numbers=numbers, note=note)
        sink = open_stream(a, "numbers", eager=False)
        await until(lambda: len(sink.items) == ITEMS)
        assert await a.call("b-0", "note", ("between",)) == "between"
        sink.eager = True
        a.caller.more(sink.call, ITEMS)
        await sink.ended.wait()
        assert sink.items == list(range(ITEMS * 2))
        assert seen.index("between") == ITEMS
        assert len(threads) == 1
        assert threads != {threading.get_ident()}


async def test_a_plain_generator_knows_who_calls_in_each_step_and_is_closed_on_its_thread() -> None:
    closed: list[int] = []
    callers: list[str] = []

    def numbers() -> Iterator[int]:
        try:
            while True:
                callers.append(current_call().peer)
                yield threading.get_ident()
        finally:
            callers.append(current_call().peer)
            closed.append(threading.get_ident())

    async with world(a=1, b=1) as job:
        a, _ = await job.start("a-0"), await job.start("b-0", numbers=numbers)
        sink = open_stream(a, "numbers", eager=False)
        await until(lambda: len(sink.items) == ITEMS)
        a.caller.abandon(sink.call)
        await until(lambda: bool(closed))
        assert closed == sink.items[:1]
        assert callers == [a.peer] * (ITEMS + 1)


async def test_a_plain_generator_that_is_given_up_while_it_runs_is_closed_after_its_step() -> None:
    gate, running, closed = threading.Event(), threading.Event(), threading.Event()

    def stuck() -> Iterator[int]:
        try:
            running.set()
            assert gate.wait(10)
            yield 1
        finally:
            closed.set()

    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", stuck=stuck)
        sink = open_stream(a, "stuck")
        assert await asyncio.to_thread(running.wait, 10)
        a.caller.abandon(sink.call)
        await settle()
        assert b.statistics().running == 0
        gate.set()
        assert await asyncio.to_thread(closed.wait, 10)
        assert sink.items == []


async def test_a_generator_that_fails_when_it_is_closed_is_told_to_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def bad() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            raise OSError("cannot let go")

    async with world(a=1, b=1) as job:
        a, _ = await job.start("a-0"), await job.start("b-0", bad=bad)
        sink = open_stream(a, "bad", eager=False)
        await until(lambda: len(sink.items) == ITEMS)
        a.caller.abandon(sink.call)
        await until(lambda: "cannot let go" in caplog.text)
    assert "closing the generator of b-0.bad failed" in caplog.text


async def test_many_streams_share_one_process() -> None:
    def make(rank: int) -> Callable[[], Iterator[int]]:
        def numbers() -> Iterator[int]:
            yield from range(rank, rank + 50)

        return numbers

    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0")
        for rank in range(20):
            b.export(f"n{rank}", make(rank), concurrency=2 if rank % 2 else None)
        sinks = [open_stream(a, f"n{rank}") for rank in range(20)]
        for rank, sink in enumerate(sinks):
            async with asyncio.timeout(10):
                await sink.ended.wait()
            assert sink.items == list(range(rank, rank + 50))
