"""`barrier`, `kv`, `members` and `master` as users call them: on the loop, beside it, and from threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from runtime.control.public import (
    barrier,
    barrier_async,
    kv,
    master,
    master_async,
    members,
    members_async,
)
from runtime.errors import MisuseError, Timeout, VersionConflict
from runtime.peer import context
from tests.control.cluster import Job, Worker, actors, running


@pytest.fixture
async def worker() -> AsyncIterator[tuple[Job, Worker]]:
    """This process is trainer-0 of two."""
    async with running(actors(("trainer", 2))) as (job, (one, _two)):
        loop = asyncio.get_running_loop()
        context.install(context.Context(loop, one.endpoint, one.client, one.client))
        try:
            yield job, one
        finally:
            context.install(None)


async def _in_thread(work: Callable[[], Any]) -> Any:
    """Run `work` in a thread that has ended when this returns."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def run() -> None:
        try:
            result = work()
        except Exception as error:
            loop.call_soon_threadsafe(done.set_exception, error)
        else:
            loop.call_soon_threadsafe(done.set_result, result)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        return await done
    finally:
        thread.join()


async def test_values_come_back_as_they_were_put(worker: tuple[Job, Worker]) -> None:
    for value in [1, "x", [1, 2], {"a": None}, (1, b"2"), {3.5}]:
        version = await kv.put_async("k", value)
        assert await kv.get_async("k") == value
        entry = await kv.get_entry_async("k")
        assert (entry.value, entry.version, entry.lease) == (value, version, None)


async def test_keys_that_are_not_there(worker: tuple[Job, Worker]) -> None:
    assert await kv.get_async("no") is None
    assert await kv.get_async("no", 7) == 7
    assert (await kv.get_entry_async("no")).version == 0
    assert await kv.delete_async("no") is False


async def test_a_condition_that_does_not_hold_names_both_versions(
    worker: tuple[Job, Worker],
) -> None:
    version = await kv.put_async("k", 1, if_version=0)
    with pytest.raises(VersionConflict, match="that it does not exist") as caught:
        await kv.put_async("k", 2, if_version=0)
    assert (caught.value.key, caught.value.expected, caught.value.found) == ("k", 0, version)
    assert await kv.delete_async("k", if_version=version)


async def test_a_watch_sees_what_is_and_what_changes_and_what_goes(
    worker: tuple[Job, Worker],
) -> None:
    await kv.put_async("k", 1)
    watch = kv.watch_async("k", timeout=5)
    assert (await anext(watch)).value == 1
    await kv.put_async("k", 2)
    assert (await anext(watch)).value == 2
    await kv.delete_async("k")
    assert (await anext(watch)).version == 0


async def test_a_watch_that_sees_nothing_times_out_in_words(worker: tuple[Job, Worker]) -> None:
    with pytest.raises(Timeout, match="waiting for key 'k' to appear"):
        await anext(kv.watch_async("k", timeout=0.05))


async def test_large_values_are_turned_away(worker: tuple[Job, Worker]) -> None:
    with pytest.raises(MisuseError, match="1048576 are allowed"):
        await kv.put_async("k", b"x" * (1 << 21))


async def test_everything_works_from_a_training_loops_thread(worker: tuple[Job, Worker]) -> None:
    def train() -> list[Any]:
        version = kv.put("k", "v", ttl_s=60)
        entry = kv.get_entry("k")
        with pytest.raises(Timeout, match="waiting for trainer-1"):
            barrier("alone", timeout=0.05)
        first = next(iter(kv.watch("k")))
        return [
            entry.version == version and 50 < (entry.lease or 0) <= 60,
            kv.get("k"),
            first.value,
            kv.delete("k"),
            [member.id for member in members()],
            master().id,
        ]

    assert await _in_thread(train) == [True, "v", "v", True, ["trainer-0", "trainer-1"], "agent-0"]


async def test_blocking_the_loop_is_refused_and_the_twin_named(
    worker: tuple[Job, Worker],
) -> None:
    for call, twin in [
        (lambda: barrier("x"), "barrier_async"),
        (lambda: kv.get("k"), "kv.get_async"),
        (members, "members_async"),
    ]:
        with pytest.raises(MisuseError, match=f"await {twin}"):
            call()


async def test_the_async_ones_work_on_another_loop(worker: tuple[Job, Worker]) -> None:
    async def other() -> Any:
        await kv.put_async("k", 5)
        with pytest.raises(Timeout):
            await barrier_async("x", timeout=0.05)
        return await kv.get_async("k"), (await master_async()).role

    assert await _in_thread(lambda: asyncio.run(other())) == (5, "agent")


async def test_members_say_who_they_are(worker: tuple[Job, Worker]) -> None:
    _, me = worker
    first, _ = await members_async()
    assert (first.id, first.role, first.rank, first.host) == ("trainer-0", "trainer", 0, "h")
    assert (first.state, first.incarnation) == ("running", 0)
    assert first.address == me.endpoint.address.address


async def test_a_barrier_of_another_role_is_refused(worker: tuple[Job, Worker]) -> None:
    with pytest.raises(MisuseError, match="no role 'actor'; the job has trainer"):
        await barrier_async("x", role="actor")


async def test_a_timeout_below_zero_is_refused(worker: tuple[Job, Worker]) -> None:
    with pytest.raises(MisuseError, match="allowed are seconds from 0 on"):
        await barrier_async("x", timeout=-1)


def test_outside_of_a_job_it_says_how_to_start_one() -> None:
    with pytest.raises(MisuseError, match="not part of a job"):
        barrier("x")
