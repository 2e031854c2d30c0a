"""Plain handlers on their threads, and cycles of handlers that wait for each other. Real time, no sleeps."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from runtime.errors import Closed, MisuseError, RemoteError, Timeout
from runtime.peer import context
from runtime.peer.context import Context
from runtime.peer.endpoint import Endpoint, current_call
from runtime.peer.group import RoleActor, RoleGroup
from runtime.peer.threads import ThreadRunner
from tests.peer.support import World, echo, settle, world

FEW_S = 10.0


def actor(job: World, endpoint: Endpoint, name: str) -> RoleActor:
    role, _, rank = name.rpartition("-")
    return RoleActor(job.directory.roles()[role][int(rank)], endpoint)


async def test_plain_handlers_run_one_at_a_time_in_order_on_one_thread() -> None:
    threads: set[int] = set()
    seen: list[int] = []
    busy = threading.Lock()

    def note(number: int) -> int:
        assert busy.acquire(blocking=False), "two at a time"
        threads.add(threading.get_ident())
        seen.append(number)
        busy.release()
        return number

    async with world(a=1, b=1) as job:
        a, _ = await job.start("a-0"), await job.start("b-0", note=note)
        calls = [a.call("b-0", "note", (n,)) for n in range(300)]
        assert await asyncio.gather(*calls) == seen == list(range(300))
        assert threads != {threading.get_ident()}
        assert len(threads) == 1


async def test_concurrency_gives_a_plain_method_threads_of_its_own() -> None:
    meeting = threading.Barrier(3)

    def meet() -> int:
        meeting.wait(FEW_S)
        return threading.get_ident()

    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0")
        b.export("meet", meet, concurrency=3)
        found = await asyncio.gather(*(a.call("b-0", "meet") for _ in range(6)))
        assert len(set(found)) == 3


async def test_a_plain_handler_knows_who_calls() -> None:
    def who() -> str:
        return current_call().peer

    async with world(a=1, b=1) as job:
        a, _ = await job.start("a-0"), await job.start("b-0", who=who)
        assert await a.call("b-0", "who") == a.peer


async def test_a_queued_plain_call_that_is_cancelled_or_late_never_starts() -> None:
    gate, seen = threading.Event(), []

    def hold(name: str) -> str:
        seen.append(name)
        assert gate.wait(FEW_S)
        return name

    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", hold=hold)
        first = a.call("b-0", "hold", ("first",))
        late = a.call("b-0", "hold", ("late",), timeout=0.05)
        given_up = a.call("b-0", "hold", ("given up",))
        last = a.call("b-0", "hold", ("last",))
        await settle()
        given_up.cancel()
        with pytest.raises(Timeout):
            await late
        await settle()
        assert b.statistics().queued == 1
        gate.set()
        assert [await first, await last] == ["first", "last"]
        assert seen == ["first", "last"]


async def test_a_plain_handler_that_was_given_up_runs_to_its_end_and_answers_nobody() -> None:
    gate, ended = threading.Event(), threading.Event()

    def hold() -> None:
        assert gate.wait(FEW_S)
        ended.set()

    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", hold=hold, echo=echo)
        call = a.call("b-0", "hold", timeout=0.05)
        with pytest.raises(Timeout):
            await call
        gate.set()
        await asyncio.to_thread(ended.wait, FEW_S)
        assert await a.call("b-0", "echo", (1,)) == 1
        assert a.statistics().late_answers == b.statistics().running == 0


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
async def test_a_plain_handler_that_exits_fails_its_call_and_the_thread_goes_on(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def leave() -> None:
        raise kind(3)

    def stay() -> str:
        return "here"

    async with world(a=1, b=1) as job:
        a, _ = await job.start("a-0"), await job.start("b-0", leave=leave, stay=stay)
        with pytest.raises(RemoteError, match=kind.__name__):
            await a.call("b-0", "leave")
        assert await a.call("b-0", "stay") == "here"
    assert "asked the thread to end" in caplog.text


async def test_a_process_may_give_a_runner_of_its_own() -> None:
    prepared: list[str] = []
    runner = ThreadRunner("mine", prepare=lambda: prepared.append(threading.current_thread().name))

    def name() -> str:
        return threading.current_thread().name

    async with world(a=1, b=1) as job:
        a, _ = await job.start("a-0"), await job.start("b-0", runner=runner, name=name)
        assert await a.call("b-0", "name") == "mine-0"
        assert prepared == ["mine-0"]
    runner.stop()
    await asyncio.to_thread(_until, lambda: not runner.alive())


def _until(condition: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(1000):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("it does not come to that")


async def test_a_thread_whose_preparation_fails_says_so_and_works(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def prepare() -> None:
        raise RuntimeError("no device 3")

    runner = ThreadRunner("odd", prepare=prepare)
    done = threading.Event()
    runner.submit(done.set)
    assert await asyncio.to_thread(done.wait, FEW_S)
    runner.stop()
    await asyncio.to_thread(_until, lambda: not runner.alive())
    assert "no device 3" in caplog.text


async def test_what_is_queued_when_a_runner_stops_is_not_run() -> None:
    runner = ThreadRunner("short")
    gate, started, ran = threading.Event(), threading.Event(), []

    def hold() -> None:
        started.set()
        gate.wait(FEW_S)

    runner.submit(hold)
    assert await asyncio.to_thread(started.wait, FEW_S)
    runner.submit(lambda: ran.append(1))
    runner.stop()
    gate.set()
    await asyncio.to_thread(_until, lambda: not runner.alive())
    assert ran == []


# cycles


async def ring(job: World, size: int, **more: Any) -> list[Endpoint]:
    """Actors p-0 … whose plain `f(n)` calls `f(n - 1)` of the next one and waits for it."""
    endpoints: list[Endpoint] = []

    def make(rank: int) -> Callable[[int], int]:
        def f(left: int) -> int:
            if not left:
                return 0
            following = actor(job, endpoints[rank], f"p-{(rank + 1) % size}")
            return 1 + int(following.call("f", left - 1).result(FEW_S))

        return f

    for rank in range(size):
        endpoints.append(await job.start(f"p-{rank}", f=make(rank), **more))
    return endpoints


@pytest.mark.parametrize("size", [1, 2, 3])
async def test_a_chain_of_plain_handlers_that_comes_back_fails_naming_the_cycle(size: int) -> None:
    async with world(p=size, x=1) as job:
        await ring(job, size)
        x = await job.start("x-0")
        path = " -> ".join([*(f"p-{rank}.f" for rank in range(size)), "p-0.f"])
        with pytest.raises(RemoteError, match=f"cycle of plain handlers.*{path}") as caught:
            await x.call("p-0", "f", (size,), timeout=FEW_S)
        assert isinstance(caught.value, MisuseError)
        assert await x.call("p-0", "f", (0,), timeout=FEW_S) == 0, "everything works on"


async def test_a_chain_that_does_not_come_back_is_no_cycle() -> None:
    async with world(p=3, x=1) as job:
        await ring(job, 3)
        x = await job.start("x-0")
        assert await x.call("p-0", "f", (2,), timeout=FEW_S) == 2


async def test_two_chains_that_cross_fail_naming_the_cycle() -> None:
    meeting = threading.Barrier(2)
    endpoints: dict[str, Endpoint] = {}

    async with world(a=1, b=1, x=1) as job:

        def make(me: str, other: str) -> Callable[[], Any]:
            def f() -> Any:
                meeting.wait(FEW_S)
                return actor(job, endpoints[me], other).call("g").result(FEW_S)

            return f

        def g() -> str:
            return "g"

        endpoints["a-0"] = await job.start("a-0", f=make("a-0", "b-0"), g=g)
        endpoints["b-0"] = await job.start("b-0", f=make("b-0", "a-0"), g=g)
        x = await job.start("x-0")
        calls = [x.call(name, "f", timeout=FEW_S) for name in ("a-0", "b-0")]
        found = await asyncio.gather(*calls, return_exceptions=True)
        errors = [error for error in found if isinstance(error, MisuseError)]
        assert errors, found
        assert all(error == "g" for error in found if error not in errors)
        assert "a-0.f" in str(errors[0])
        assert "b-0.f" in str(errors[0])
        assert await x.call("a-0", "g", timeout=FEW_S) == "g"


async def test_a_cycle_through_an_async_handler_between_plain_ones_is_found() -> None:
    endpoints: dict[str, Endpoint] = {}

    async with world(a=1, b=1, x=1) as job:

        def f() -> Any:
            return actor(job, endpoints["a-0"], "b-0").call("g").result(FEW_S)

        async def g() -> Any:
            return await actor(job, endpoints["b-0"], "a-0").call("f")

        endpoints["a-0"] = await job.start("a-0", f=f)
        endpoints["b-0"] = await job.start("b-0", g=g)
        x = await job.start("x-0")
        with pytest.raises(RemoteError, match=r"cycle.*a-0\.f -> b-0\.g -> a-0\.f"):
            await x.call("a-0", "f", timeout=FEW_S)


async def test_async_handlers_that_call_back_are_no_cycle() -> None:
    endpoints: dict[str, Endpoint] = {}

    async with world(a=1, b=1, x=1) as job:

        async def f(left: int) -> int:
            if not left:
                return 0
            return 1 + int(await actor(job, endpoints["a-0"], "b-0").call("g", left - 1))

        async def g(left: int) -> int:
            return 1 + int(await actor(job, endpoints["b-0"], "a-0").call("f", left - 1))

        endpoints["a-0"] = await job.start("a-0", f=f)
        endpoints["b-0"] = await job.start("b-0", g=g)
        x = await job.start("x-0")
        assert await x.call("a-0", "f", (20,), timeout=FEW_S) == 20


async def test_a_plain_handler_that_calls_back_and_does_not_wait_is_no_cycle() -> None:
    later: list[Any] = []
    endpoints: dict[str, Endpoint] = {}

    async with world(a=1, b=1, x=1) as job:

        def f() -> str:
            return str(actor(job, endpoints["a-0"], "b-0").call("g").result(FEW_S))

        def g() -> str:
            later.append(actor(job, endpoints["b-0"], "a-0").call("h"))
            return "g"

        def h() -> str:
            return "h"

        endpoints["a-0"] = await job.start("a-0", f=f, h=h)
        endpoints["b-0"] = await job.start("b-0", g=g)
        x = await job.start("x-0")
        assert await x.call("a-0", "f", timeout=FEW_S) == "g"
        assert await later[0] == "h"


async def test_many_callers_behind_a_handler_that_waits_are_no_cycle() -> None:
    endpoints: dict[str, Endpoint] = {}
    gate = asyncio.Event()

    async with world(a=1, b=1, x=1) as job:

        def f(number: int) -> int:
            return int(actor(job, endpoints["a-0"], "b-0").call("g", number).result(FEW_S))

        async def g(number: int) -> int:
            await gate.wait()
            return number

        endpoints["a-0"] = await job.start("a-0", f=f)
        endpoints["b-0"] = await job.start("b-0", g=g)
        x = await job.start("x-0")
        calls = [x.call("a-0", "f", (n,), timeout=FEW_S) for n in range(50)]
        await asyncio.sleep(0.1)
        gate.set()
        assert await asyncio.gather(*calls) == list(range(50))


async def test_a_group_call_of_a_plain_handler_to_its_own_process_is_a_cycle() -> None:
    async with world(p=2, x=1) as job:

        def f() -> Any:
            return RoleGroup("p").call("g").result(FEW_S)

        def g() -> str:
            return "g"

        first = await job.start("p-0", f=f, g=g)
        await job.start("p-1", g=g)
        x = await job.start("x-0")
        job.install(first)
        with pytest.raises(RemoteError, match=r"p-0\.f -> p-0\.g"):
            await x.call("p-0", "f", timeout=FEW_S)


async def test_closing_while_a_plain_handler_runs_does_not_wait_for_it() -> None:
    gate, ended = threading.Event(), threading.Event()

    def hold() -> None:
        gate.wait(FEW_S)
        ended.set()

    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", hold=hold)
        call = a.call("b-0", "hold")
        await settle()
        await b.close()
        with pytest.raises(ConnectionError):
            await call
        gate.set()
        assert await asyncio.to_thread(ended.wait, FEW_S)


def test_the_context_slot_is_empty_between_tests() -> None:
    assert context.installed() is None
    assert Context is not None
    assert issubclass(Closed, Exception)
