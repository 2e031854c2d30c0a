"""Calls between endpoints over the memory network, in fake time."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from runtime.errors import (
    ArgumentError,
    Closed,
    MisuseError,
    NotExposedError,
    PeerLostError,
    RemoteError,
    Timeout,
)
from runtime.peer.context import PeerAddress
from runtime.peer.endpoint import Endpoint, current_call
from runtime.transport.base import Record
from runtime.transport.memory import MemoryNetwork, NetworkSettings
from tests.peer.support import InlineRunner, echo, settle, world

pytestmark = pytest.mark.looptime

SLOW_WIRE = NetworkSettings(delay_s=(0.01, 0.05))


class Handlers:
    """Handlers that note what happens to them."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.gate = asyncio.Event()

    async def hang(self, name: str = "hang") -> None:
        self.events.append(f"start {name}")
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.events.append(f"cancelled {name}")
            raise

    async def wait(self, name: str) -> str:
        self.events.append(f"start {name}")
        await self.gate.wait()
        return name

    def plain(self, name: str) -> str:
        self.events.append(f"start {name}")
        return name


async def test_arguments_and_results_travel() -> None:
    async def join(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    async with world(a=1, b=1) as job:
        a, _ = await job.start("a-0"), await job.start("b-0", join=join)
        assert await a.call("b-0", "join", (1, "x", b"y", None, [1.5]), {"k": {"d": (1, 2)}}) == (
            (1, "x", b"y", None, [1.5]),
            {"k": {"d": (1, 2)}},
        )


async def test_a_handler_may_suspend_and_use_timeouts_and_groups_from_its_first_step() -> None:
    async def thorough(x: int) -> int:
        async with asyncio.timeout(5), asyncio.TaskGroup() as group:
            task = group.create_task(asyncio.sleep(1, x))
        assert asyncio.current_task() is not None
        return task.result()

    async with world(a=1, b=1) as job:
        a, _ = await job.start("a-0"), await job.start("b-0", thorough=thorough)
        assert await a.call("b-0", "thorough", (7,)) == 7


async def test_a_timeout_inside_of_a_handler_ends_only_what_it_bounds() -> None:
    async def impatient() -> str:
        try:
            async with asyncio.timeout(0.5):
                await asyncio.sleep(3600)
        except TimeoutError:
            return "went on"
        return "never"

    async def at_once() -> str:
        try:
            async with asyncio.timeout(0):
                await asyncio.sleep(3600)
        except TimeoutError:
            return "went on"
        return "never"

    async with world(a=1, b=1) as job:
        a, _ = await job.start("a-0"), await job.start("b-0", x=impatient, y=at_once)
        assert await a.call("b-0", "x") == "went on"
        assert await a.call("b-0", "y") == "went on"


async def test_the_context_of_one_handler_is_not_that_of_the_next() -> None:
    from contextvars import ContextVar

    var: ContextVar[int] = ContextVar("var", default=0)

    async def count() -> int:
        token = var.set(var.get() + 1)
        await asyncio.sleep(0.1)
        found = var.get()
        var.reset(token)  # only possible in the context that it was set in
        return found

    async with world(a=1, b=1) as job:
        a, _ = await job.start("a-0"), await job.start("b-0", count=count)
        assert [await a.call("b-0", "count") for _ in range(3)] == [1, 1, 1]


async def test_a_handler_knows_who_calls() -> None:
    async def who() -> Any:
        before = current_call()
        await asyncio.sleep(0)
        assert current_call() == before
        return tuple(before)

    async with world(a=1, b=1) as job:
        a, _ = await job.start("a-0"), await job.start("b-0", who=who)
        peer, call_id, deadline = await a.call("b-0", "who", timeout=5)
        assert peer == a.peer
        assert call_id == 1
        assert deadline == pytest.approx(asyncio.get_running_loop().time() + 5, abs=0.1)
    with pytest.raises(MisuseError, match="not running in an RPC handler"):
        current_call()


async def test_an_unknown_method_and_wrong_arguments_start_nothing() -> None:
    started: list[int] = []

    async def f(x: int) -> None:
        started.append(x)

    def g(x: int) -> None:
        started.append(x)

    async with world(a=1, b=1) as job:
        a = await job.start("a-0")
        await job.start("b-0", runner=InlineRunner(), evaluate=f, g=g)
        with pytest.raises(NotExposedError, match=r"b-0 .*'evalute' \(did you mean 'evaluate'\?\)"):
            await a.call("b-0", "evalute")
        for method in ("evaluate", "g"):
            with pytest.raises(
                ArgumentError, match=r"missing a required argument: 'x'.*\(x: 'int'\)"
            ):
                await a.call("b-0", method)
        assert started == []


async def test_a_type_error_inside_of_a_handler_is_the_handlers() -> None:
    async def f() -> None:
        len(3)  # type: ignore[arg-type]

    def g(x: int = 0) -> None:
        g(1, 2)  # type: ignore[call-arg]

    async with world(a=1, b=1) as job:
        a, _ = await job.start("a-0"), await job.start("b-0", runner=InlineRunner(), f=f, g=g)
        for method in ("f", "g"):
            with pytest.raises(TypeError) as caught:
                await a.call("b-0", method)
            assert isinstance(caught.value, RemoteError)


async def test_what_a_handler_raises_is_raised_at_the_caller() -> None:
    async def f() -> None:
        raise KeyError("needle")

    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", f=f)
        with pytest.raises(KeyError) as caught:
            await a.call("b-0", "f")
        error = caught.value
        assert isinstance(error, RemoteError)
        assert (error.type_name, error.peer, error.role, error.rank) == ("KeyError", b.peer, "b", 0)
        assert 'raise KeyError("needle")' in error.remote_traceback
        assert b.statistics().errors_in == 1


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, asyncio.CancelledError])
@pytest.mark.parametrize("suspend", [False, True])
async def test_no_exception_of_a_handler_ends_more_than_its_call(
    kind: type[BaseException], suspend: bool
) -> None:
    async def f() -> None:
        if suspend:
            await asyncio.sleep(0.1)
        raise kind("out")

    async with world(a=1, b=1) as job:
        a, _ = await job.start("a-0"), await job.start("b-0", f=f, echo=echo)
        with pytest.raises(RemoteError, match=kind.__name__) as caught:
            await a.call("b-0", "f")
        assert not isinstance(caught.value, kind)
        assert await a.call("b-0", "echo", (1,)) == 1


async def test_what_cannot_be_sent_fails_at_the_caller_and_nothing_is_sent() -> None:
    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", echo=echo)
        with pytest.raises(MisuseError, match=r"argument 1.*lock"):
            a.call("b-0", "echo", (1, threading.Lock()))
        with pytest.raises(MisuseError, match=r"argument 'value'.*lock"):
            a.cast("b-0", "echo", (), {"value": threading.Lock()})
        await settle()
        assert a.statistics().calls_out == b.statistics().calls_in == 0


async def test_a_result_that_cannot_be_sent_fails_that_call_only() -> None:
    async def f() -> Any:
        return threading.Lock()

    def g() -> Any:
        return threading.Lock()

    async with world(a=1, b=1) as job:
        a = await job.start("a-0")
        await job.start("b-0", runner=InlineRunner(), f=f, g=g, echo=echo)
        for method in ("f", "g"):
            with pytest.raises(MisuseError, match=rf"b-0\.{method}\(\).*result.*lock"):
                await a.call("b-0", method)
        assert await a.call("b-0", "echo", (1,)) == 1


async def test_a_method_may_refuse_pickled_arguments() -> None:
    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0")
        b.export("safe", echo, pickle=False)
        assert await a.call("b-0", "safe", ({"x": [1]},)) == {"x": [1]}
        with pytest.raises(ArgumentError, match=r"b-0\.safe\(\): its arguments cannot be read"):
            await a.call("b-0", "safe", (PeerAddress,))


async def test_a_bad_method_name_leaves_no_call_behind() -> None:
    async with world(a=1, b=1) as job:
        a, _ = await job.start("a-0"), await job.start("b-0", echo=echo)
        await a.call("b-0", "echo", (1,))
        with pytest.raises(MisuseError, match="method name"):
            a.call("b-0", "x" * 600, timeout=5)
        assert a.statistics().outstanding == 0


# time


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


# one way, and to oneself


async def test_a_cast_is_answered_by_nobody() -> None:
    async with world(a=1, b=1) as job:
        handlers = Handlers()
        a, b = await job.start("a-0"), await job.start("b-0", wait=handlers.wait)
        handlers.gate.set()
        a.cast("b-0", "wait", ("cast",))
        await asyncio.sleep(0.1)
        assert handlers.events == ["start cast"]
        assert a.statistics().outstanding == b.statistics().running == 0


async def test_a_cast_that_fails_is_told_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def f() -> None:
        raise KeyError("needle")

    async with world(a=1, b=1) as job:
        a, _ = await job.start("a-0"), await job.start("b-0", f=f)
        a.cast("b-0", "f")
        a.cast("b-0", "nothing")
        a.cast("c-0", "f")
        await asyncio.sleep(0.1)
    text = caplog.text
    assert "one-way call of a-0" in text
    assert "needle" in text
    assert "no method 'nothing'" in text
    assert "c-0.f() was not delivered" in text


async def test_a_cast_runs_although_its_caller_has_left() -> None:
    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0")
        done: list[str] = []

        async def slowly() -> None:
            await asyncio.sleep(1)
            done.append("done")

        b.export("slowly", slowly)
        a.cast("b-0", "slowly")
        await settle()
        await a.close()
        await asyncio.sleep(2)
        assert done == ["done"]


async def test_a_process_calls_itself_and_shares_no_memory_with_itself() -> None:
    async def change(data: bytearray) -> bytearray:
        data[:5] = b"other"
        return data

    async with world(a=1) as job:
        a = await job.start("a-0", change=change)
        mine = bytearray(b"my own" + bytes(100_000))
        assert (await a.call("a-0", "change", (mine,)))[:5] == b"other"
        assert mine[:6] == b"my own"
        assert await a.call(a.address, "runtime.ping") is None


# names, starts, losses


async def test_a_call_to_a_callee_that_still_starts_waits_for_it() -> None:
    async with world(a=1, b=1) as job:
        a = await job.start("a-0")
        call = a.call("b-0", "echo", (1,), timeout=100)
        await asyncio.sleep(50)
        await job.start("b-0", echo=echo)
        assert await call == 1
        assert await a.call("b-0", "echo", (2,)) == 2
        assert job.directory.asked == ["b-0"], "an address is looked up once"


async def test_a_call_may_give_up_while_its_callee_starts() -> None:
    async with world(a=1, b=1) as job:
        a = await job.start("a-0")
        with pytest.raises(Timeout, match=r"within 2 s: b-0 is starting"):
            await a.call("b-0", "echo", (1,), timeout=2)
        given_up = a.call("b-0", "echo", (1,))
        await settle()
        given_up.cancel()
        await settle()
        handlers = Handlers()
        await job.start("b-0", wait=handlers.wait)
        handlers.gate.set()
        assert await a.call("b-0", "wait", ("new",)) == "new"
        assert handlers.events == ["start new"]


async def test_a_callee_that_is_gone_for_good_or_unknown_fails_at_once() -> None:
    async with world(a=1, b=1) as job:
        a = await job.start("a-0")
        job.directory.stopped("b-0", "exit 1", for_good=True)
        with pytest.raises(PeerLostError, match="exit 1"):
            await a.call("b-0", "echo")
        with pytest.raises(MisuseError, match="no actor 'z-0'"):
            await a.call("z-0", "echo")
        assert a.statistics().outstanding == 0


async def test_without_a_directory_only_addresses_can_be_called() -> None:
    network = MemoryNetwork()
    async with (
        Endpoint(network.transport("a.1")) as a,
        Endpoint(network.transport("b.1")) as b,
    ):
        b.export("echo", echo)
        assert await a.call(b.address, "echo", (1,)) == 1
        with pytest.raises(MisuseError, match="no directory"):
            a.call("b", "echo", (1,))


async def test_a_callee_that_dies_in_mid_call_is_told_with_its_cause() -> None:
    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", hang=Handlers().hang)
        call = a.call("b-0", "hang")
        await asyncio.sleep(1)
        start = asyncio.get_running_loop().time()
        await job.kill(b, "SIGKILL")
        with pytest.raises(PeerLostError, match=r"b rank 0 \(b-0\..*SIGKILL") as caught:
            await call
        assert asyncio.get_running_loop().time() - start < 0.1
        error = caught.value
        assert (error.peer, error.role, error.rank, error.cause) == (b.peer, "b", 0, "SIGKILL")


async def test_an_unknown_fate_is_a_lost_connection_after_two_seconds_at_most() -> None:
    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", hang=Handlers().hang)
        job.directory.fate_takes = 60
        call = a.call("b-0", "hang")
        await asyncio.sleep(1)
        start = asyncio.get_running_loop().time()
        await job.kill(b)
        with pytest.raises(PeerLostError, match="connection lost"):
            await call
        assert asyncio.get_running_loop().time() - start == pytest.approx(2, abs=0.1)


async def test_membership_settles_calls_at_once_while_the_fate_is_still_asked() -> None:
    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", hang=Handlers().hang)
        job.directory.fate_takes = 60
        call = a.call("b-0", "hang")
        await asyncio.sleep(1)
        await job.kill(b)
        await asyncio.sleep(0.01)
        a.lose(b.peer, "SIGSEGV")
        with pytest.raises(PeerLostError, match="SIGSEGV"):
            await call
        a.lose(b.peer, "SIGSEGV")


async def test_membership_may_know_before_the_link_breaks() -> None:
    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", hang=Handlers().hang)
        call = a.call("b-0", "hang")
        await asyncio.sleep(1)
        a.lose(b.peer, "host unreachable")
        with pytest.raises(PeerLostError) as caught:
            await call
        assert caught.value.cause == "host unreachable"


async def test_after_a_restart_the_same_name_reaches_the_new_process() -> None:
    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", hang=Handlers().hang)
        call = a.call("b-0", "hang")
        await asyncio.sleep(1)
        await job.kill(b)
        with pytest.raises(PeerLostError):
            await call
        again = a.call("b-0", "echo", ("back",))
        await asyncio.sleep(3)
        await job.start("b-0", echo=echo)
        assert await again == "back"


async def test_a_directory_that_lags_behind_does_not_lead_calls_to_the_dead() -> None:
    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", echo=echo)
        await a.call("b-0", "echo", (1,))
        stale = job.directory.running["b-0"]
        job.directory.causes[b.peer] = "SIGKILL"
        job.network.kill(b.peer)
        await asyncio.sleep(0.1)
        again = a.call("b-0", "echo", ("back",))
        await asyncio.sleep(1)
        assert job.directory.running["b-0"] == stale
        await job.start("b-0", echo=echo)
        assert await again == "back"


async def test_a_parted_peer_that_lives_is_reached_again_after_the_network_heals() -> None:
    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", hang=Handlers().hang, echo=echo)
        call = a.call("b-0", "hang")
        await asyncio.sleep(1)
        job.network.part([a.peer], [b.peer])
        with pytest.raises(PeerLostError, match="connection lost"):
            await call
        job.network.heal()
        assert await a.call("b-0", "echo", (1,)) == 1


async def test_a_lost_caller_cancels_its_handlers_and_empties_its_place_in_the_queue() -> None:
    async with world(a=2, b=1) as job:
        handlers = Handlers()
        a, other = await job.start("a-0"), await job.start("a-1")
        b = await job.start("b-0", hang=handlers.hang)
        b.export("wait", handlers.wait, concurrency=1)
        calls = [
            a.call("b-0", "hang"),
            a.call("b-0", "wait", ("x",)),
            a.call("b-0", "wait", ("y",)),
        ]
        await settle()
        theirs = other.call("b-0", "wait", ("theirs",))
        await settle()
        await job.kill(a)
        await asyncio.sleep(0.1)
        handlers.gate.set()
        assert await theirs == "theirs"
        assert sorted(handlers.events) == [
            "cancelled hang",
            "start hang",
            "start theirs",
            "start x",
        ]
        assert b.statistics().running == 0
        for call in calls:
            with pytest.raises(Closed):
                await call


async def test_a_caller_that_membership_calls_dead_is_lost_too() -> None:
    async with world(a=1, b=1) as job:
        handlers = Handlers()
        a, b = await job.start("a-0"), await job.start("b-0", hang=handlers.hang)
        call = a.call("b-0", "hang")
        await settle()
        b.lose(a.peer, "host unreachable")
        await settle()
        assert handlers.events == ["start hang", "cancelled hang"]
        call.cancel()


@pytest.mark.parametrize("after", [0, 0.005, 0.02, 0.04, 0.06, 0.08, 0.11, 0.16])
async def test_whenever_the_callee_dies_the_call_ends_and_the_next_start_answers(
    after: float,
) -> None:
    async def slow_echo(value: int) -> int:
        await asyncio.sleep(0.05)
        return value

    async with world(SLOW_WIRE, a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", echo=slow_echo)
        calls = [a.call("b-0", "echo", (n,), timeout=60) for n in range(20)]
        await asyncio.sleep(after)
        await job.kill(b)
        done = await asyncio.gather(*calls, return_exceptions=True)
        for number, found in enumerate(done):
            assert found == number or isinstance(found, PeerLostError), found
        await asyncio.sleep(0.01)  # a call that is made before anybody notices is lost with it
        await job.start("b-0", echo=slow_echo)
        assert await a.call("b-0", "echo", ("back",), timeout=60) == "back"
        assert a.statistics().outstanding == 0


@pytest.mark.parametrize("after", [0, 0.005, 0.02, 0.04, 0.06, 0.08, 0.11, 0.16])
async def test_whenever_the_caller_cancels_nothing_is_left(after: float) -> None:
    async def slow_echo(value: int) -> int:
        await asyncio.sleep(0.05)
        return value

    async with world(SLOW_WIRE, a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", echo=slow_echo)
        calls = [a.call("b-0", "echo", (n,)) for n in range(20)]
        await asyncio.sleep(after)
        for call in calls:
            call.cancel()
        await asyncio.sleep(1)
        assert a.statistics().outstanding == b.statistics().running == b.statistics().queued == 0
        assert await a.call("b-0", "echo", (1,)) == 1


# closing, and strangers


async def test_closing_fails_what_is_outstanding_and_cancels_what_runs() -> None:
    async with world(a=1, b=1, c=1) as job:
        handlers = Handlers()
        a, b = await job.start("a-0"), await job.start("b-0", hang=handlers.hang)
        waiting, running = a.call("c-0", "f"), a.call("b-0", "hang")
        out = b.call("a-0", "nothing")
        await asyncio.sleep(1)
        assert isinstance(out.exception(), NotExposedError)
        await b.close()
        assert handlers.events == ["start hang", "cancelled hang"]
        with pytest.raises(PeerLostError, match="closed its endpoint"):
            await running
        await a.close()
        with pytest.raises(Closed, match=r"c-0\.f\(\)"):
            await waiting
        with pytest.raises(Closed):
            a.call("b-0", "hang")


@pytest.mark.parametrize(
    "header", [b"", b"\xc1", b"\x90", b"\x93\x01\x02\x03", b"\x91\xcc\xc8", bytes(500)]
)
async def test_garbage_ends_the_link_it_came_by_and_nothing_else(header: bytes) -> None:
    async with world(a=2, b=1) as job:
        a, other = await job.start("a-0"), await job.start("a-1")
        b = await job.start("b-0", hang=Handlers().hang, echo=echo)
        call, theirs = a.call("b-0", "hang"), other.call("b-0", "hang")
        await settle()
        call.call.link.send(Record(header))  # type: ignore[attr-defined]
        with pytest.raises(PeerLostError):
            await call
        assert sum(b.statistics().rejected.values()) == 1
        assert await a.call("b-0", "echo", (1,)) == 1
        assert not theirs.done()
        theirs.cancel()


async def test_an_answer_to_nobody_and_a_cancel_of_nothing_do_no_harm() -> None:
    from runtime.wire import codec, messages

    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", hang=Handlers().hang, echo=echo)
        call = a.call("b-0", "hang")
        await settle()
        (inbound,) = b._inbound
        link = call.call.link  # type: ignore[attr-defined]
        inbound.send(messages.encode_result(4711, *codec.encode(1)))
        inbound.send(messages.encode_error(4711, b"\xc1"))
        link.send(messages.encode_cancel(4711))
        link.send(messages.encode_probe(messages.Probe("z.1", (), 1, 4711)))
        link.send(messages.encode_call(messages.Call(1, "hang", b"")))  # an id that is in use
        await settle()
        assert a.statistics().late_answers == 2
        assert b.statistics().running == 1
        inbound.send(messages.encode_result(1, b"\xc1"))
        with pytest.raises(MisuseError, match=r"result of b-0\.hang\(\) cannot be read here"):
            await call
        assert await a.call("b-0", "echo", (1,)) == 1


async def test_statistics_count_what_went_through() -> None:
    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", echo=echo)
        for _ in range(3):
            await a.call("b-0", "echo", (1,))
        assert a.statistics()[:4] == (3, 0, 0, 0)
        assert b.statistics()[:4] == (0, 3, 0, 0)
        assert b.exported() == ["echo"]
