"""Futures: waited for in threads, awaited on any loop, given up, called back."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import Any

import pytest

from runtime.errors import MisuseError, RemoteError, Timeout
from runtime.peer import context
from runtime.peer import future as futures
from runtime.peer.group import RoleGroup
from tests.peer.support import World, settle, until
from tests.peer.workers import FEW_S, blocking


async def test_a_blocking_wait_on_the_loop_names_the_async_form(job: World) -> None:
    future = RoleGroup("w").call("who")
    with pytest.raises(MisuseError, match="`await`"):
        future.result()
    assert await future == [0, 1, 2]
    assert future.result() == [0, 1, 2], "what is done does not block"
    assert future.exception() is None
    assert future.done()
    assert "done" in repr(future)


async def test_giving_up_the_wait_is_not_giving_up_the_call(job: World) -> None:
    gate = asyncio.Event()

    async def gated() -> str:
        await gate.wait()
        return "through"

    job._open[1].export("gated", gated)
    future = RoleGroup("w")[0].call("gated")
    await settle()
    for _ in range(3):
        with pytest.raises(
            Timeout, match=r"no result within 0\.01 s: .*gated\(\) of w-0.*w-0 runs it"
        ):
            await blocking(future.result, 0.01)
    assert future._callbacks == [], "waits that were given up leave nothing"
    with pytest.raises(Timeout):
        await blocking(future.exception, 0)
    gate.set()
    assert await blocking(future.result, FEW_S) == "through"


async def test_cancelling_a_future_cancels_the_calls(job: World) -> None:
    future = RoleGroup("w").call("hang")
    await settle()
    assert job._open[1].statistics().running == 1
    assert await blocking(future.cancel)
    assert not future.cancel()
    assert future.cancelled()
    await until(lambda: not any(endpoint.statistics().running for endpoint in job._open))
    with pytest.raises(concurrent.futures.CancelledError, match="hang"):
        future.result()
    with pytest.raises(concurrent.futures.CancelledError):
        future.exception()
    with pytest.raises(asyncio.CancelledError):
        await future
    assert job._open[0].statistics().outstanding == 0


async def test_a_cancelled_awaiter_cancels_the_call(job: World) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await RoleGroup("w").call("hang")
    await settle()
    assert not any(endpoint.statistics().running for endpoint in job._open)


async def test_a_future_can_be_awaited_on_another_loop(job: World) -> None:
    group = RoleGroup("w")

    async def elsewhere() -> Any:
        first = await group.call("who")
        with pytest.raises(KeyError):
            await group[1].call("odd_fails")
        return first

    assert await blocking(lambda: asyncio.run(elsewhere())) == [0, 1, 2]


async def test_callbacks_are_called_once_also_when_they_come_late(
    job: World, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []
    future = RoleGroup("w").call("who")
    future.add_done_callback(lambda done: seen.append(done.result()))
    future.add_done_callback(lambda done: 1 / 0)
    await future
    future.add_done_callback(lambda done: seen.append("late"))
    assert seen == [[0, 1, 2], "late"]
    assert "a callback of" in caplog.text


async def test_a_long_wait_says_once_what_it_waits_for(
    job: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(futures, "SAY_AFTER_S", 0.02)
    future = RoleGroup("w").call("hang")
    with pytest.raises(Timeout):
        await blocking(future.result, 0.1)
    said = [r for r in caplog.records if "waiting for 0.02 s" in r.getMessage()]
    assert len(said) == 1
    assert "hang() of role w: no answer yet from w-0" in said[0].getMessage()
    future.cancel()


@pytest.mark.looptime
async def test_a_long_await_says_once_what_it_waits_for(
    job: World, caplog: pytest.LogCaptureFixture
) -> None:
    future = RoleGroup("w").call("hang")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(25):
            await future
    (said,) = [r.getMessage() for r in caplog.records if "waiting for" in r.getMessage()]
    assert "waiting for 10 s for the result of hang() of role w: no answer yet from w-0" in said
    caplog.clear()
    assert await RoleGroup("w").call("who") == [0, 1, 2]
    await asyncio.sleep(11)
    assert "waiting for" not in caplog.text


async def test_a_future_can_be_changed(job: World) -> None:
    first = RoleGroup("w").call("who")
    assert await first.then(sum) == 3
    assert await blocking(first.then(len).result, FEW_S) == 3
    with pytest.raises(ZeroDivisionError):
        await first.then(lambda ranks: 1 / ranks[0])
    with pytest.raises(KeyError):
        await RoleGroup("w")[1].call("odd_fails").then(len)
    hanging = RoleGroup("w").call("hang")
    hanging.then(len).cancel()
    await until(hanging.cancelled)


async def test_a_cancel_reaches_a_call_that_is_still_to_be_made(job: World) -> None:
    future = await blocking(RoleGroup("w").call, "hang")
    assert future.cancel()
    await until(lambda: not any(endpoint.statistics().running for endpoint in job._open))
    await settle()
    assert job._open[0].statistics().outstanding == 0


async def test_an_error_that_nobody_asked_for_is_told(
    job: World, caplog: pytest.LogCaptureFixture
) -> None:
    future = RoleGroup("w")[1].call("odd_fails")
    await until(future.done)
    del future
    assert "nobody asked for the error of the result of odd_fails() of w-1" in caplog.text
    caplog.clear()
    with pytest.raises(RemoteError):
        await RoleGroup("w")[1].call("odd_fails")
    assert caplog.text == ""


async def test_calls_of_a_thread_start_in_order_with_few_wake_ups(job: World) -> None:
    seen: list[int] = []

    async def note(number: int) -> None:
        seen.append(number)

    job._open[1].export("note", note)
    actor = RoleGroup("w")[0]
    wakes = 0
    mailbox = context.current().endpoint.mailbox
    deliver = mailbox._deliver

    def counted() -> None:
        nonlocal wakes
        wakes += 1
        deliver()

    mailbox._deliver = counted  # type: ignore[method-assign]

    def many() -> None:
        for waiting in [actor.call("note", number) for number in range(1000)]:
            waiting.result(FEW_S)

    await blocking(many)
    assert seen == list(range(1000))
    assert wakes < 1000
