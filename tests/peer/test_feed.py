"""Streams: items of generator methods and results of groups, as they arrive, and giving them up."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from runtime.errors import CallGroupError, MisuseError, PeerLostError, Timeout
from runtime.peer.group import RoleGroup
from runtime.peer.method import rpc
from runtime.peer.proxy import create_rpc_proxy
from tests.peer.support import World, settle, until
from tests.peer.workers import blocking, worker


class Counting:
    """Generators, and how far they came."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.made = 0
        self.ended: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    @rpc
    async def count(self, upto: int) -> AsyncIterator[int]:
        try:
            for number in range(upto):
                await self.gate.wait()
                self.made += 1
                yield self.rank * 100 + number
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise
        self.ended.append("end")

    @rpc
    def plain_count(self, upto: int) -> Iterator[int]:
        try:
            for number in range(upto):
                self.made += 1
                yield number
        finally:
            self.ended.append("closed")

    @rpc
    async def breaks(self, after: int) -> AsyncIterator[int]:
        for number in range(after):
            yield number
        raise KeyError("needle")


@pytest.fixture
def counting(job: World) -> list[Counting]:
    made = [Counting(rank) for rank in range(3)]
    for rank in range(3):
        worker(job, rank).export_instance(None, made[rank])
    return made


async def collect(stream: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in stream]


@pytest.mark.parametrize("method", ["count", "plain_count"])
async def test_items_come_in_order_to_coroutines_threads_and_other_loops(
    job: World, counting: list[Counting], method: str
) -> None:
    actor = RoleGroup("w")[0]
    assert await collect(actor.stream(method, 100)) == list(range(100))
    assert await blocking(lambda: list(actor.stream(method, 100))) == list(range(100))
    elsewhere = await blocking(lambda: asyncio.run(collect(actor.stream(method, 100))))
    assert elsewhere == list(range(100))
    assert await collect(actor.stream(method, 0)) == []
    assert job._open[0].statistics().outstanding == 0


async def test_a_slow_consumer_holds_the_generator_back(
    job: World, counting: list[Counting]
) -> None:
    stream = RoleGroup("w")[0].stream("count", 1000)
    await asyncio.sleep(0.05)
    first = counting[0].made
    assert 0 < first < 40
    for number in range(100):
        assert await anext(stream) == number
    await asyncio.sleep(0.05)
    assert 100 < counting[0].made < 100 + 40
    stream.close()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    await job.kill(worker(job, 0), for_good=True)
    await settle()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


@pytest.mark.parametrize("how", ["close", "drop", "cancel"])
async def test_a_stream_given_up_closes_its_generator(
    job: World, counting: list[Counting], how: str
) -> None:
    async def consume() -> None:
        async for item in RoleGroup("w")[0].stream("count", 1000):
            if item == 3:
                counting[0].gate.clear()

    if how == "cancel":
        task = asyncio.get_running_loop().create_task(consume())
        await until(lambda: not counting[0].gate.is_set())
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        stream = RoleGroup("w")[0].stream("count", 1000)
        assert await anext(stream) == 0
        if how == "close":
            stream.close()
            stream.close()
        del stream
    gc.collect()
    await until(lambda: bool(counting[0].ended))
    assert counting[0].ended[0] in ("CancelledError", "GeneratorExit")
    await until(lambda: job._open[0].statistics().outstanding == 0)


async def test_a_stream_dropped_in_a_thread_closes_a_plain_generator(
    job: World, counting: list[Counting]
) -> None:
    def look_at_two() -> list[int]:
        stream = RoleGroup("w")[1].stream("plain_count", 1000)
        return [next(stream), next(stream)]

    assert await blocking(look_at_two) == [0, 1]
    gc.collect()
    await until(lambda: counting[1].ended == ["closed"])


async def test_what_a_generator_raises_comes_after_its_items(
    job: World, counting: list[Counting]
) -> None:
    found = []

    def take() -> None:
        for item in RoleGroup("w")[0].stream("breaks", 3):
            found.append(item)

    with pytest.raises(KeyError, match="needle"):
        await blocking(take)
    assert found == [0, 1, 2]


async def test_a_deadline_holds_for_the_whole_stream(job: World, counting: list[Counting]) -> None:
    counting[0].gate.clear()
    with pytest.raises(Timeout, match=r"w-0\.count\(\)"):
        await collect(RoleGroup("w").options(timeout=0.05)[0].stream("count", 3))
    await until(lambda: bool(counting[0].ended))


async def test_a_lost_member_ends_its_stream_with_the_cause(
    job: World, counting: list[Counting]
) -> None:
    stream = RoleGroup("w")[0].stream("count", 5)
    assert await anext(stream) == 0
    counting[0].gate.clear()
    again = RoleGroup("w")[0].stream("count", 5)
    await settle()
    await job.kill(worker(job, 0), "SIGKILL", for_good=True)
    assert await anext(stream) == 1, "what had arrived is still there"
    with pytest.raises(PeerLostError, match="SIGKILL"):
        await anext(again)


async def test_on_the_loop_a_plain_for_names_the_async_form(
    job: World, counting: list[Counting]
) -> None:
    stream = RoleGroup("w")[0].stream("count", 3)
    with pytest.raises(MisuseError, match="use `async for` there"):
        next(stream)
    assert await collect(stream) == [0, 1, 2]


async def test_a_group_streams_results_as_they_arrive(job: World) -> None:
    gates = [asyncio.Event() for _ in range(3)]

    def waits(rank: int) -> Any:
        async def gated() -> str:
            await gates[rank].wait()
            return f"of {rank}"

        return gated

    for rank in range(3):
        worker(job, rank).export("gated", waits(rank))
    stream = RoleGroup("w").stream("gated")
    for rank in (1, 2, 0):
        gates[rank].set()
        assert await anext(stream) == (rank, f"of {rank}")
    assert await collect(stream) == []


async def test_a_group_streams_the_items_of_all_its_generators(
    job: World, counting: list[Counting]
) -> None:
    found = await collect(RoleGroup("w")[1:].stream("count", 50))
    assert sorted(found) == [(place, 100 * (place + 1) + n) for place in (0, 1) for n in range(50)]
    assert [n for place, n in found if place == 1] == list(range(200, 250))
    assert await collect(RoleGroup("w")[3:].stream("count", 5)) == []


async def test_failures_of_a_group_s_stream_come_last_and_together(job: World) -> None:
    found = []

    async def take() -> None:
        async for pair in RoleGroup("w").stream("odd_fails"):
            found.append(pair)

    with pytest.raises(CallGroupError, match=r"in 1 of 3 members: w-1"):
        await take()
    assert sorted(found) == [(0, 0), (2, 2)]
    among = dict(await collect(RoleGroup("w").options(return_exceptions=True).stream("odd_fails")))
    assert isinstance(among[1], KeyError)
    assert (among[0], among[2]) == (0, 2)


async def test_a_member_that_dies_does_not_end_the_stream_of_the_others(
    job: World, counting: list[Counting]
) -> None:
    counting[0].gate.clear()
    stream = RoleGroup("w").stream("count", 20)
    await settle()
    await job.kill(worker(job, 0), "SIGKILL", for_good=True)
    found = []
    with pytest.raises(CallGroupError) as caught:  # noqa: PT012 - the items before it count
        async for pair in stream:
            found.append(pair)
    assert caught.value.failures[0].cause == "SIGKILL"
    assert sorted(found) == [(rank, 100 * rank + n) for rank in (1, 2) for n in range(20)]


async def test_generator_methods_of_a_proxy_stream(job: World, counting: list[Counting]) -> None:
    proxy = create_rpc_proxy("w-1", None, Counting)
    assert await collect(proxy.count(3)) == [100, 101, 102]
    assert await blocking(lambda: list(proxy.plain_count(3))) == [0, 1, 2]


async def test_what_cannot_be_sent_starts_no_stream(job: World) -> None:
    with pytest.raises(MisuseError, match="lock"):
        RoleGroup("w")[0].stream("count", threading.Lock())
    with pytest.raises(MisuseError, match="lock"):
        RoleGroup("w").stream("count", threading.Lock())


async def test_large_items_never_stall_each_other(job: World) -> None:
    def chunks(rank: int) -> Any:
        async def large(count: int) -> AsyncIterator[bytes]:
            for number in range(count):
                yield bytes([rank, number]) * (2 << 20)

        return large

    for rank in range(3):
        worker(job, rank).export("large", chunks(rank))
    found = []
    async for rank, item in RoleGroup("w").stream("large", 6):
        assert len(item) == 4 << 20
        found.append((rank, item[1]))
        await asyncio.sleep(0)
    assert sorted(found) == [(rank, number) for rank in range(3) for number in range(6)]


async def test_streams_given_up_at_any_time_leave_nothing(
    job: World, counting: list[Counting]
) -> None:
    def give_up(taken: int) -> None:
        method = ("count", "plain_count")[taken % 2]
        streams = [RoleGroup("w").stream(method, 1000), RoleGroup("w")[0].stream(method, 1000)]
        for stream in streams:
            for _ in range(taken):
                next(stream)
        streams.pop().close()

    for taken in range(40):
        await blocking(give_up, taken)
    gc.collect()
    await until(lambda: not any(e.statistics().running for e in job._open))
    assert job._open[0].statistics().outstanding == 0
    assert await RoleGroup("w").call("who") == [0, 1, 2]
