"""`DataQueue` as users see it, by its owner and by another process of the job."""

from __future__ import annotations

import asyncio
import gc
import pickle
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from runtime.data.queue import DataQueue
from runtime.errors import Closed, LeaseLost, MisuseError, RuntimeFault, Timeout
from runtime.peer import context
from tests.control import cluster

pytestmark = pytest.mark.looptime


def _queue(worker: cluster.Worker, **settings: Any) -> DataQueue[Any]:
    loop = asyncio.get_running_loop()
    context.install(context.Context(loop, worker.endpoint, worker.client, worker.client))
    try:
        return DataQueue("q", **settings)
    finally:
        context.install(None)


@asynccontextmanager
async def _pair(**settings: Any) -> AsyncIterator[tuple[DataQueue[Any], DataQueue[Any]]]:
    """The owner's queue, and that of another process."""
    async with cluster.running(cluster.actors(("a", 2))) as (_, (one, other)):
        yield _queue(one, is_master=True, **settings), _queue(other)


async def test_items_of_any_type_arrive_as_they_were() -> None:
    async with _pair() as (owner, other):
        items = [b"x", b"y" * 300, "text", None, (1, 2), {"k": [1.5]}, bytes(100_000), bytearray(9)]
        await other.put_async(*items)
        assert await owner.get_async(3) == items[:3]
        assert await other.get_async(20) == items[3:]


async def test_plain_and_other_items_of_several_puts_come_out_of_one_get() -> None:
    async with _pair() as (owner, other):
        for queue in (owner, other):
            await other.put_async(b"plain", b"too")
            await other.put_async("text", b"y" * 300)
            await owner.put_async(bytes(100_000), b"small")
            assert sorted(await queue.get_async(9), key=len) == sorted(
                [b"plain", b"too", "text", b"y" * 300, bytes(100_000), b"small"], key=len
            )


async def test_large_items_are_staged_within_the_budget_of_queues(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with _pair() as (owner, other):
        asked: list[tuple[int, str]] = []

        def stage(buffer: Any, budget: str) -> Any:
            asked.append((len(buffer), budget))
            return buffer  # there is no room: that is no error

        for queue in (owner, other):
            monkeypatch.setattr(queue._context.endpoint._transport, "stage", stage)
            await queue.put_async(bytes(100_000), b"small")
        assert await owner.get_async(4) == [bytes(100_000), b"small"] * 2
    assert asked == [(100_000, "queue")] * 2


async def test_an_answered_put_holds_on_to_no_item_though_its_future_is_kept() -> None:
    async with _pair() as queues:
        for queue in queues:
            future = queue.put_async(bytes(100))
            await future
            await asyncio.sleep(1)
            gc.disable()
            try:
                watched = weakref.ref(future)
                del future
                assert watched() is None  # no circle keeps it until the next collection
            finally:
                gc.enable()
            await queue.get_async()


async def test_a_put_that_timed_out_says_how_many_went_in() -> None:
    async with _pair(size=3) as queues:
        for queue in queues:
            with pytest.raises(Timeout) as caught:
                await queue.put_async(*range(5), timeout=1)
            assert caught.value.taken == 3
            assert "3 of 5 went in" in str(caught.value)
            assert await queue.get_async(9) == [0, 1, 2]


async def test_a_get_that_timed_out_or_was_cancelled_takes_nothing() -> None:
    async with _pair() as queues:
        for queue in queues:
            with pytest.raises(Timeout, match="waiting for 1 item; 0 there"):
                await queue.get_async(timeout=0.5)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await queue.get_async()
            await queue.put_async("still there")
            await asyncio.sleep(1)
            assert await queue.get_async() == ["still there"]


async def test_a_lease_is_kept_by_ack_and_given_back_by_nack() -> None:
    async with _pair(lease_s=2.0) as (owner, other):
        await owner.put_async(*"abc")
        first, second, third = await other.get_async(3, lease=True)
        await first.ack_async()
        await second.nack_async()
        await asyncio.sleep(3)
        with pytest.raises(LeaseLost):
            await third.ack_async()
        assert await owner.get_async(9) == ["b", "c"]


async def test_iteration_ends_when_the_queue_is_closed_and_empty() -> None:
    async with _pair() as (owner, other):
        await other.put_async(1, 2, 3)
        await other.close_async()
        with pytest.raises(Closed):
            await owner.put_async(4)
        assert [item async for item in other] == [1, 2, 3]
        assert (await other.statistics_async()).closed


async def test_blocking_forms_on_the_peer_loop_name_the_async_ones() -> None:
    async with _pair() as (owner, other):
        for queue in (owner, other):
            with pytest.raises(MisuseError, match=r"await queue\.put_async"):
                queue.put(1)
            with pytest.raises(MisuseError, match=r"await queue\.get_async"):
                queue.get()
            with pytest.raises(MisuseError, match=r"await queue\.qsize_async"):
                queue.qsize()
            assert await queue.qsize_async() == 0


async def test_a_get_whose_owner_has_died_still_ends_at_its_timeout() -> None:
    async with cluster.running(cluster.actors(("a", 2))) as (job, (one, other)):
        owner, queue = _queue(one, is_master=True), _queue(other)
        await owner.put_async(1)
        assert await queue.get_async() == [1]
        begun = asyncio.get_running_loop().time()
        waiting = asyncio.get_running_loop().create_task(queue.get_async(timeout=3))
        await asyncio.sleep(1)
        await one.endpoint.close()
        await job.exited(one, "SIGKILL", -9, final=True)
        with pytest.raises(Timeout, match="has no owner"):
            await waiting
        assert asyncio.get_running_loop().time() - begun == pytest.approx(3, abs=0.1)


async def test_asking_without_waiting_takes_a_moment_where_nobody_owns_the_queue() -> None:
    async with cluster.running(cluster.actors(("a", 1))) as (_, (one,)):
        begun = asyncio.get_running_loop().time()
        with pytest.raises(Timeout, match="has no owner"):
            await _queue(one).get_async(timeout=0)
        assert asyncio.get_running_loop().time() - begun == pytest.approx(2, abs=0.1)


async def test_wrong_settings_are_named() -> None:
    async with _pair() as (owner, other):
        with pytest.raises(MisuseError, match="min_size=3 is more than batch_size=2"):
            await owner.get_async(2, min_size=3)
        with pytest.raises(MisuseError, match="timeout=-1"):
            await other.get_async(timeout=-1)
        with pytest.raises(MisuseError, match="item 1"):
            other.put_async(1, asyncio.get_running_loop())


async def test_a_large_item_beyond_the_bytes_is_refused_to_other_processes_too() -> None:
    async with _pair(max_bytes=1000) as (_, other):
        with pytest.raises(MisuseError, match="an item of 2000 bytes never fits"):
            await other.put_async(bytes(2000))


async def test_a_second_owner_of_a_living_name_is_refused() -> None:
    async with cluster.running(cluster.actors(("a", 2))) as (_, (one, other)):
        queue = _queue(one, is_master=True)
        await queue.put_async(1)
        await asyncio.sleep(0.1)
        for _ in range(2):  # it may be tried again, for when the owner is dead
            second = _queue(other, is_master=True)
            await asyncio.sleep(0.1)
            with pytest.raises(MisuseError, match=r"owned by a-0\."):
                await second.get_async()
        with pytest.raises(MisuseError, match="queue 'q' is owned by this process already"):
            _queue(one, is_master=True)


async def test_an_owner_that_cannot_register_says_so_and_the_process_goes_on() -> None:
    async with cluster.running(cluster.actors(("a", 2))) as (job, (one, other)):
        await job.service.close()
        queue = _queue(one, is_master=True)
        await asyncio.sleep(60)
        with pytest.raises(RuntimeFault, match="closed"):
            await queue.get_async()
        other.endpoint.export("echo", lambda text: text)
        assert await one.endpoint.call(other.endpoint.address, "echo", ("here",)) == "here"


async def test_a_queue_that_is_sent_is_the_receivers_way_to_it() -> None:
    async with cluster.running(cluster.actors(("a", 2))) as (_, (one, other)):
        owner = _queue(one, is_master=True)
        letter = pickle.dumps(owner)
        loop = asyncio.get_running_loop()
        context.install(context.Context(loop, other.endpoint, other.client, other.client))
        try:
            there = pickle.loads(letter)
        finally:
            context.install(None)
        await there.put_async("x")
        assert await owner.get_async() == ["x"]
        with pytest.raises(MisuseError):
            pickle.loads(letter)  # no job here
