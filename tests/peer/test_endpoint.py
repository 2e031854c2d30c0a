"""Calls between endpoints over the memory network, in fake time."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import Any

import pytest

from runtime.errors import (
    ArgumentError,
    Closed,
    MisuseError,
    NotExposedError,
    PeerLostError,
    RemoteError,
)
from runtime.peer.context import PeerAddress
from runtime.peer.endpoint import Endpoint, current_call
from runtime.peer.execution import Later
from runtime.peer.method import rpc
from runtime.transport.base import Record
from runtime.transport.memory import MemoryNetwork
from runtime.wire import codec, messages
from tests.peer.support import Handlers, InlineRunner, echo, settle, world

pytestmark = pytest.mark.looptime


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


async def test_a_call_leaves_nothing_for_the_garbage_collector() -> None:
    tasks: list[weakref.ref[Any]] = []

    async def suspends() -> None:
        await asyncio.sleep(0.1)
        tasks.append(weakref.ref(asyncio.current_task()))  # type: ignore[arg-type]

    async with world(a=1, b=1) as job:
        a, _ = await job.start("a-0"), await job.start("b-0", suspends=suspends)
        gc.collect()
        gc.disable()
        try:
            call = a.call("b-0", "suspends")
            of_ours = weakref.ref(call)
            await call
            del call
            await settle()
            assert tasks[0]() is None
            assert of_ours() is None
        finally:
            gc.enable()


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


async def test_a_method_without_pickle_sends_no_pickled_result_and_no_pickled_error() -> None:
    async def give(what: str) -> Any:
        if what == "error":
            raise LookupError("no such thing")
        return PeerAddress("p", "q") if what == "object" else what

    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", free=give)
        b.export("safe", give, pickle=False)
        assert await a.call("b-0", "free", ("object",)) == PeerAddress("p", "q")
        assert await a.call("b-0", "safe", ("x",)) == "x"
        with pytest.raises(MisuseError, match=r"b-0\.safe\(\).*result.*PeerAddress"):
            await a.call("b-0", "safe", ("object",))
        with pytest.raises(LookupError):
            await a.call("b-0", "free", ("error",))
        with pytest.raises(RemoteError, match="LookupError: no such thing") as caught:
            await a.call("b-0", "safe", ("error",))
        assert not isinstance(caught.value, LookupError), "its class travels by pickle"


async def test_a_raw_handler_takes_and_gives_what_is_encoded() -> None:
    async def forward(parcel: codec.Encoded) -> codec.Encoded:
        assert type(parcel) is codec.Encoded
        return parcel

    def measure(parcel: codec.Encoded) -> int:
        return len(parcel.buffers)

    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", runner=InlineRunner())
        b.export("forward", forward, raw=True)
        b.export("measure", measure, raw=True)
        big = bytes(100_000)
        assert await a.call("b-0", "forward", (1, big)) == [[1, big], None]
        assert await a.call("b-0", "measure", (1, big)) == 1


async def test_a_plain_handler_on_the_loop_may_answer_later_and_is_not_waited_for_when_given_up() -> (
    None
):
    kept: list[Later] = []

    @rpc(thread=False)
    def postpone() -> Later:
        kept.append(Later())
        return kept[-1]

    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", postpone=postpone)
        first, second = a.call("b-0", "postpone"), a.call("b-0", "postpone")
        await settle()
        second.cancel()
        await settle()
        for later in kept:
            later.tell("late", None)
        assert await first == "late"
        assert b.statistics().running == 0


async def test_large_buffers_are_staged_where_there_is_a_place_for_them() -> None:
    async with world(a=1) as job:
        a = await job.start("a-0")
        staged: list[tuple[int, str]] = []

        def stage(buffer: Any, budget: str) -> Any:
            staged.append((len(buffer), budget))
            return memoryview(bytearray(buffer)) if len(staged) == 1 else buffer

        small = codec.encode_arguments((1, "x"))
        assert a.stage(small) is small
        data = bytearray(100_000)
        parcel = codec.encode_arguments((data, bytes(70_000)))
        assert a.stage(parcel).buffers[0] is data, "the memory network has no such place"
        a._transport.stage = stage  # type: ignore[method-assign]
        first, second = a.stage(parcel).buffers
        data[0] = 1
        assert first[0] == 0, "what is changed later does not travel"
        assert second is parcel.buffers[1], "no room"
        assert staged == [(100_000, "rpc"), (70_000, "rpc")]
        a.stage(parcel, "queue")
        assert staged[2:] == [(100_000, "queue"), (70_000, "queue")]


async def test_what_has_not_left_for_one_peer_is_known() -> None:
    async with world(a=1, b=2) as job:
        a, b = await job.start("a-0"), await job.start("b-0", echo=echo)
        other = await job.start("b-1", echo=echo)
        await asyncio.gather(*(a.call(name, "echo", (1,)) for name in ("b-0", "b-1")))
        call = a.call("b-0", "echo", (bytes(100_000),))
        assert a.unsent(b.peer) > 100_000
        assert a.unsent(other.peer) == 0
        await call
        assert a.unsent(b.peer) == 0


async def test_statistics_count_what_has_not_left_yet() -> None:
    async with world(a=1, b=1) as job:
        a, _ = await job.start("a-0"), await job.start("b-0", echo=echo)
        await a.call("b-0", "echo", (1,))
        assert a.statistics().unsent_bytes == 0
        a.cast("b-0", "echo", (bytes(100_000),))
        assert a.statistics().unsent_bytes > 100_000
        await a.call("b-0", "echo", (2,))
        assert a.statistics().unsent_bytes == 0


async def test_a_bad_method_name_leaves_no_call_behind() -> None:
    async with world(a=1, b=1) as job:
        a, _ = await job.start("a-0"), await job.start("b-0", echo=echo)
        await a.call("b-0", "echo", (1,))
        with pytest.raises(MisuseError, match="method name"):
            a.call("b-0", "x" * 600, timeout=5)
        assert a.statistics().outstanding == 0


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
        await asyncio.sleep(10)
        assert sum(b.statistics().rejected.values()) == 1
        assert await a.call("b-0", "echo", (1,)) == 1
        assert not theirs.done()
        assert not call.done(), "it goes on by a new link"
        theirs.cancel()
        call.cancel()


async def test_an_answer_to_nobody_and_a_cancel_of_nothing_do_no_harm() -> None:
    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", hang=Handlers().hang, echo=echo)
        call = a.call("b-0", "hang")
        await settle()
        (inbound,) = b._handlers._clients._by_link
        link = call.call.link  # type: ignore[attr-defined]
        inbound.send(messages.encode_result(4711, *codec.encode(1)))
        inbound.send(messages.encode_error(4711, b"\xc1"))
        link.send(messages.encode_cancel(4711))
        link.send(messages.encode_probe(messages.Probe("z.1", (), 1, 4711)))
        link.send(messages.encode_call(1, "hang", b""))  # an id that is in use
        await settle()
        assert a.statistics().late_answers == 2
        assert b.statistics().running == 1
        inbound.send(messages.encode_result(1, b"\xc1"))
        with pytest.raises(MisuseError, match=r"result of b-0\.hang\(\) cannot be read here"):
            await call
        assert await a.call("b-0", "echo", (1,)) == 1


async def test_an_endpoint_that_was_not_started_says_so() -> None:
    endpoint = Endpoint(MemoryNetwork().transport("a-0.1"))
    endpoint.export("echo", echo)
    for use in (
        lambda: endpoint.call("b-0", "echo"),
        lambda: endpoint.cast("b-0", "echo"),
        lambda: endpoint.lose("b-0.1", "exit 1"),
        endpoint.statistics,
    ):
        with pytest.raises(MisuseError, match=r"endpoint a-0\.1 has not been started"):
            use()
    await endpoint.close()


async def test_statistics_count_what_went_through() -> None:
    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", echo=echo)
        for _ in range(3):
            await a.call("b-0", "echo", (1,))
        assert a.statistics()[:4] == (3, 0, 0, 0)
        assert b.statistics()[:4] == (0, 3, 0, 0)
        assert b.exported() == ["echo"]
