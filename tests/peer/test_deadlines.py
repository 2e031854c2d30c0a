"""Timeouts, cancels, concurrency and the order of starts, over the memory network in fake time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from runtime.errors import (
    Timeout,
)
from runtime.transport.memory import NetworkSettings
from tests.peer.support import SLOW_WIRE, Handlers, InlineRunner, echo, settle, world

pytestmark = pytest.mark.looptime


async def test_a_call_times_out_saying_what_it_waited_for_and_its_handler_is_cancelled() -> None:
    async with world(a=1, b=1) as job:
        handlers = Handlers()
        a, b = await job.start("a-0"), await job.start("b-0", hang=handlers.hang)
        start = asyncio.get_running_loop().time()
        with pytest.raises(Timeout, match=r"b-0\.hang\(\) was not answered within 5 s.*b-0") as e:
            await a.call("b-0", "hang", timeout=5)
        assert e.value.waited_s == pytest.approx(5)
        assert asyncio.get_running_loop().time() - start == pytest.approx(5, abs=0.01)
        await settle()
        assert handlers.events == ["start hang", "cancelled hang"]
        assert b.statistics().running == 0


async def test_the_deadline_travels_and_cancels_even_when_no_cancel_arrives() -> None:
    async with world(a=1, b=1) as job:
        handlers = Handlers()
        a, b = await job.start("a-0"), await job.start("b-0", hang=handlers.hang)
        call = a.call("b-0", "hang", timeout=5)
        await asyncio.sleep(1)
        assert b.statistics().running == 1
        a.caller.table.drop(call.call)  # type: ignore[attr-defined] - its own timer finds nothing
        await asyncio.sleep(4.1)
        assert handlers.events == ["start hang", "cancelled hang"]
        assert not call.done()
        call.cancel()


async def test_a_late_answer_is_dropped_and_counted() -> None:
    async def stubborn() -> str:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            return "too late"
        return "never"

    async with world(NetworkSettings(delay_s=(0.5, 0.5)), a=1, b=1) as job:
        a, _ = await job.start("a-0"), await job.start("b-0", stubborn=stubborn, echo=echo)
        await a.call("b-0", "echo", (1,))
        with pytest.raises(Timeout):
            await a.call("b-0", "echo", (1,), timeout=0.7)
        assert await a.call("b-0", "echo", (2,)) == 2
        assert a.statistics().late_answers == 1
        with pytest.raises(Timeout):
            await a.call("b-0", "stubborn", timeout=2)
        await asyncio.sleep(5)
        assert a.statistics().late_answers == 1, "what is cancelled answers nothing"


async def test_a_cancelled_caller_cancels_its_handler() -> None:
    async with world(a=1, b=1) as job:
        handlers = Handlers()
        a, b = await job.start("a-0"), await job.start("b-0", hang=handlers.hang)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await a.call("b-0", "hang")
        await settle()
        assert handlers.events == ["start hang", "cancelled hang"]
        assert a.statistics().outstanding == b.statistics().running == 0


async def test_a_queued_call_whose_time_runs_out_or_that_is_cancelled_never_starts() -> None:
    async with world(a=1, b=1) as job:
        handlers = Handlers()
        a, b = await job.start("a-0"), await job.start("b-0")
        b.export("wait", handlers.wait, concurrency=1)
        first = a.call("b-0", "wait", ("first",))
        late = a.call("b-0", "wait", ("late",), timeout=1)
        given_up = a.call("b-0", "wait", ("given up",))
        last = a.call("b-0", "wait", ("last",))
        await settle()
        assert b.statistics().queued == 3
        given_up.cancel()
        with pytest.raises(Timeout):
            await late
        handlers.gate.set()
        assert [await first, await last] == ["first", "last"]
        assert handlers.events == ["start first", "start last"]


async def test_concurrency_bounds_how_many_run_at_once() -> None:
    most = now = 0

    async def count() -> None:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await asyncio.sleep(1)
        now -= 1

    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0")
        b.export("count", count, concurrency=3)
        await asyncio.gather(*(a.call("b-0", "count") for _ in range(10)))
        assert most == 3


async def test_the_order_of_starts_is_the_order_of_calls_whatever_their_size() -> None:
    seen: list[int] = []

    async def note(number: int, load: bytes) -> None:
        seen.append(number)
        await asyncio.sleep(0.01)

    def plain(number: int, load: bytes) -> None:
        seen.append(number)

    async with world(SLOW_WIRE, a=1, b=1) as job:
        a = await job.start("a-0")
        b = await job.start("b-0", known=False, runner=InlineRunner(), note=note, plain=plain)
        for method in ("note", "plain"):
            sizes = [10, 1 << 20, 100_000]
            calls = [a.call("b-0", method, (i, bytes(sizes[i % 3]))) for i in range(60)]
            if method == "note":
                await asyncio.sleep(1)
                assert seen == [], "not even known yet"
                job.directory.started(b)
            await asyncio.gather(*calls)
            assert seen == list(range(60))
            seen.clear()


async def test_interleaved_calls_of_8_callers_each_get_their_own_answer() -> None:
    async def jitter(value: Any) -> Any:
        await asyncio.sleep((value[1] * 7919 % 13) / 1000)
        return value

    async with world(SLOW_WIRE, a=8, b=1) as job:
        await job.start("b-0", jitter=jitter, echo=echo)
        callers = [await job.start(f"a-{rank}") for rank in range(8)]

        async def ask(rank: int, number: int) -> None:
            method = "jitter" if number % 2 else "echo"
            assert await callers[rank].call("b-0", method, ((rank, number),)) == (rank, number)

        await asyncio.gather(*(ask(rank, n) for n in range(250) for rank in range(8)))


async def test_a_plain_call_past_its_deadline_does_not_start_even_if_the_loop_had_no_time() -> None:
    class LateRunner:
        work: list[Any] = []  # noqa: RUF012 - one for this test

        def submit(self, work: Any) -> None:
            self.work.append(work)

    async with world(a=1, b=1) as job:
        handlers, runner = Handlers(), LateRunner()
        a, b = await job.start("a-0"), await job.start("b-0", runner=runner, f=handlers.plain)
        call = a.call("b-0", "f", ("late",), timeout=1)
        await settle()
        b._timers.close()
        with pytest.raises(Timeout):
            await call
        # As if neither the cancel nor the timer had been heard of.
        runner.work[0].args[1].state = 0
        runner.work[0].args[0].queue(runner.work[0].args[1])
        runner.work[0].args[1].deadline = asyncio.get_running_loop().time() - 1
        runner.work[0]()
        await settle()
        assert handlers.events == []
        assert b.statistics().queued == 0
