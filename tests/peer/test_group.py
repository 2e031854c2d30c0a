"""Groups, actors, futures and proxies, as plain threads and as coroutines use them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from runtime.errors import (
    CallGroupError,
    MisuseError,
    NotExposedError,
    PeerLostError,
    RemoteError,
    Timeout,
)
from runtime.peer import context
from runtime.peer import future as futures
from runtime.peer.endpoint import Endpoint
from runtime.peer.group import RoleActor, RoleGroup
from runtime.peer.method import rpc
from runtime.peer.proxy import create_rpc_proxy, export_rpc_instance, export_rpc_method
from tests.peer.support import World, echo, settle, until, world

FEW_S = 10.0


@pytest.fixture
async def job() -> AsyncIterator[World]:
    """`me-0` is this process; the workers w-0 … w-2 serve."""
    async with world(me=1, w=3, empty=0, other=2) as made:
        me = await made.start("me-0")
        made.install(me)
        for rank in range(3):
            await made.start(f"w-{rank}", **handlers(rank))
        yield made


def handlers(rank: int) -> dict[str, Any]:
    async def who() -> int:
        return rank

    async def odd_fails(text: str = "no") -> int:
        if rank % 2:
            raise KeyError(text)
        return rank

    async def hang() -> None:
        await asyncio.Event().wait()

    def plain(x: int, *, y: int = 0) -> int:
        return rank * 100 + x + y

    return {"who": who, "odd_fails": odd_fails, "hang": hang, "plain": plain, "echo": echo}


def blocking(work: Any, *args: Any) -> Any:
    """Run plain code in a thread, as a trainer's main thread would."""
    return asyncio.to_thread(work, *args)


# groups


async def test_a_group_is_a_sequence_of_its_members(job: World) -> None:
    group = RoleGroup("w")
    assert len(group) == 3
    assert [member.name for member in group] == ["w-0", "w-1", "w-2"]
    assert (group[-1].name, group[1].role, group[1].rank) == ("w-2", "w", 1)
    assert group[0].info.name == "w-0"
    assert isinstance(group[1:], RoleGroup)
    assert [member.name for member in group[1:]] == ["w-1", "w-2"]
    with pytest.raises(IndexError, match="no member 3"):
        group[3]
    assert repr(group) == "RoleGroup('w', 3 members)"
    assert repr(group[0]) == "RoleActor('w-0')"


async def test_roles_are_put_together_as_given(job: World) -> None:
    group = RoleGroup("all", roles=["other", "w"])
    assert [member.name for member in group] == ["other-0", "other-1", "w-0", "w-1", "w-2"]
    assert RoleGroup(roles=["other", "w"]).name == "other+w"


async def test_an_unknown_role_lists_the_roles(job: World) -> None:
    with pytest.raises(
        MisuseError, match=r"no role 'othr' \(did you mean 'other'\?\).*me, w, empty"
    ):
        RoleGroup("othr")
    with pytest.raises(MisuseError, match="list of role names"):
        RoleGroup("x", roles="w")
    with pytest.raises(MisuseError, match="needs the name"):
        RoleGroup()


async def test_an_optional_group_may_be_empty(job: World) -> None:
    for group in (RoleGroup("nope", optional=True), RoleGroup("w")[3:]):
        assert len(group) == 0
        assert await group.call("who") == []
        group.cast("who")
        with pytest.raises(MisuseError, match="empty"):
            group.call_rank0("who")


async def test_outside_of_a_job_a_group_says_how_to_start_one() -> None:
    with pytest.raises(MisuseError, match=r"runtime\.launch"):
        RoleGroup("w")


async def test_results_come_in_rank_order_to_threads_and_coroutines(job: World) -> None:
    group = RoleGroup("w")
    assert await group.call("plain", 1, y=2) == [3, 103, 203]
    assert await blocking(lambda: group.call("who").result(FEW_S)) == [0, 1, 2]
    assert await group.call_rank0("who") == 0
    assert await group[1].call("plain", 5) == 105


async def test_a_method_may_be_given_as_a_function(job: World) -> None:
    @rpc("who")
    def by_its_rpc_name() -> None: ...

    def plain() -> None: ...

    assert await RoleGroup("w").call(by_its_rpc_name) == [0, 1, 2]
    assert await RoleGroup("w")[0].call(plain, 3) == 3


async def test_failures_of_a_group_come_together_naming_each(job: World) -> None:
    with pytest.raises(CallGroupError) as caught:
        await RoleGroup("w").call("odd_fails", "needle")
    error = caught.value
    assert isinstance(error, ExceptionGroup)
    assert [(f.role, f.rank) for f in error.failures] == [("w", 1)]
    assert error.partial == {0: 0, 2: 2}
    assert isinstance(error.exceptions[0], KeyError)
    assert str(error) == "odd_fails() failed in 1 of 3 members: w-1: KeyError: 'needle'"
    with pytest.raises(CallGroupError, match=r"in 3 of 3 members: w-0: .*; w-1: .*; w-2: "):
        await RoleGroup("w").call("nothing")


async def test_failures_may_stand_in_the_list(job: World) -> None:
    found = await RoleGroup("w").options(return_exceptions=True).call("odd_fails")
    assert [found[0], found[2]] == [0, 2]
    assert isinstance(found[1], KeyError)


async def test_a_lost_member_is_named_with_its_cause(job: World) -> None:
    call = RoleGroup("w").call("hang")
    call.add_done_callback(lambda done: done.exception())
    lost = next(e for e in job._open if e.peer.startswith("w-1"))
    await settle()
    await job.kill(lost, "SIGSEGV")
    await settle()
    assert not call.done(), "the others have not answered"
    call.cancel()
    job.directory.stopped("w-1", "SIGSEGV", for_good=True)
    with pytest.raises(PeerLostError, match="SIGSEGV"):
        await RoleGroup("w")[1].call("who")


async def test_a_timeout_of_options_ends_the_call(job: World) -> None:
    actor = RoleGroup("w").options(timeout=0.05)[2]
    with pytest.raises(Timeout, match=r"w-2\.hang\(\) was not answered within 0\.05 s"):
        await actor.call("hang")
    with pytest.raises(CallGroupError) as caught:
        await RoleGroup("w").options(timeout=0.05).call("hang")
    assert [type(e) for e in caught.value.exceptions] == [Timeout] * 3


@pytest.mark.parametrize("timeout", [0, -1, True, "5"])
async def test_a_timeout_that_is_none_is_refused(job: World, timeout: Any) -> None:
    with pytest.raises(MisuseError, match="seconds above 0"):
        RoleGroup("w").options(timeout=timeout)
    with pytest.raises(MisuseError, match="seconds above 0"):
        RoleGroup("w")[0].options(timeout=timeout)


async def test_what_cannot_be_sent_is_refused_before_anything_is(job: World) -> None:
    group = RoleGroup("w")
    with pytest.raises(MisuseError, match=r"argument 0.*lock"):
        group.call("echo", threading.Lock())
    with pytest.raises(MisuseError, match=r"argument 'x'.*lock"):
        group[0].call("echo", x=threading.Lock())
    with pytest.raises(MisuseError, match="lock"):
        group.cast("echo", threading.Lock())
    await settle()
    assert context.current().endpoint.statistics().calls_out == 0


async def test_a_cast_reaches_every_member(job: World) -> None:
    seen: list[str] = []

    async def note(text: str) -> None:
        seen.append(text)

    for endpoint in job._open[1:]:
        endpoint.export("note", note)
    await blocking(RoleGroup("w").cast, "note", "all")
    RoleGroup("w")[0].cast("note", "one")
    await until(lambda: len(seen) == 4)
    assert sorted(seen) == ["all", "all", "all", "one"]


async def test_ready_is_when_every_member_answers(job: World) -> None:
    await blocking(RoleGroup("w").wait_ready, FEW_S)
    assert 0 <= await RoleGroup("w")[0].ping() < FEW_S
    with pytest.raises(Timeout, match=r"not ready after 0.05 s; no answer from other-0, other-1"):
        await RoleGroup("other").wait_ready_async(0.05)
    job.directory.stopped("other-0", "exit 1", for_good=True)
    with pytest.raises(PeerLostError, match="exit 1"):
        await blocking(RoleGroup("other").wait_ready, 0.05)


# futures


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


# proxies


class Counter:
    """Exported by a worker, called through a proxy."""

    def __init__(self, total: int = 0) -> None:
        self.total = total

    @rpc
    def add(self, n: int, *, twice: bool = False) -> int:
        self.total += n * (2 if twice else 1)
        return self.total

    @rpc("current")
    async def value(self) -> int:
        return self.total

    @rpc
    async def options(self) -> str:
        return "a user's own"

    def secret(self) -> int:
        return 0


async def serve_counter(job: World, namespace: str | None) -> Endpoint:
    worker = job._open[1]
    worker.export_instance(namespace, Counter())
    return worker


@pytest.mark.parametrize("namespace", ["counter", None, ""])
@pytest.mark.parametrize("owner", ["w-0", "w", "actor", "info"])
async def test_a_proxy_blocks_or_is_awaited_as_its_methods_do(
    job: World, namespace: str | None, owner: Any
) -> None:
    await serve_counter(job, namespace)
    given = {"actor": RoleGroup("w")[0], "info": RoleGroup("w")[0].info}.get(owner, owner)
    proxy = create_rpc_proxy(given, namespace, Counter)
    assert await blocking(lambda: proxy.add(2, twice=True)) == 4
    assert await proxy.value() == 4
    assert await proxy.options() == "a user's own"
    assert "Counter in w-0" in repr(proxy)


async def test_a_blocking_method_on_the_loop_sends_nothing(job: World) -> None:
    worker = await serve_counter(job, "c")
    with pytest.raises(MisuseError, match=r"await RoleActor\.call\('c\.add', \.\.\.\)"):
        create_rpc_proxy("w", "c", Counter).add(1)
    await settle()
    assert worker.statistics().calls_in == 0


async def test_a_proxy_takes_options(job: World) -> None:
    class Slow:
        @rpc
        async def hang(self) -> None:
            await asyncio.Event().wait()

    job._open[1].export_instance("slow", Slow())
    proxy: Any = create_rpc_proxy("w-0", "slow", Slow)
    with pytest.raises(Timeout, match=r"slow\.hang"):
        await proxy.options(timeout=0.05).hang()


async def test_what_a_proxy_does_not_have_is_told(job: World) -> None:
    await serve_counter(job, "c")
    proxy: Any = create_rpc_proxy("w", "c", Counter)
    with pytest.raises(
        NotExposedError, match=r"Counter\.ad is not .*did you mean 'add'.*add, options"
    ):
        _ = proxy.ad
    with pytest.raises(AttributeError):
        _ = proxy.__deepcopy__
    with pytest.raises(MisuseError, match="no method marked"):
        create_rpc_proxy("w", "c", World)
    with pytest.raises(MisuseError, match=r"no actor 'w-7'.*w-0, w-1, w-2"):
        create_rpc_proxy("w-7", "c", Counter)


async def test_functions_and_instances_are_exported_by_the_running_node(job: World) -> None:
    me = context.current().endpoint
    counter = Counter(5)
    export_rpc_instance("mine", counter)
    export_rpc_instance("mine", counter)
    export_rpc_method("echo", echo)
    export_rpc_method("echo", echo)
    assert me.exported() == ["echo", "mine.add", "mine.current", "mine.options"]
    with pytest.raises(MisuseError, match=r"'mine\.add' already"):
        export_rpc_instance("mine", Counter())
    with pytest.raises(MisuseError, match="no method marked"):
        export_rpc_instance("x", object())
    assert await job._open[1].call("me-0", "mine.current") == 5


async def test_declared_functions_are_exposed_by_the_node_that_is_installed(job: World) -> None:
    from runtime.peer import method as methods

    before = list(methods._declared.functions)
    try:

        @rpc("declared", export=True)
        async def declared() -> str:
            return "found"

        assert await job._open[1].call("me-0", "declared") == "found"
    finally:
        methods._declared.functions[:] = before


async def test_only_marked_functions_have_a_name_of_their_own(job: World) -> None:
    with pytest.raises(MisuseError, match="not marked with @rpc"):
        context.current().endpoint.export_function(echo)


async def test_groups_reach_a_restarted_member_without_being_built_anew(job: World) -> None:
    group = RoleGroup("w")
    assert await group.call("who") == [0, 1, 2]
    old = next(e for e in job._open if e.peer.startswith("w-1"))
    await job.kill(old)
    await asyncio.sleep(0.01)
    call = group.call("who")
    await settle()
    assert not call.done()
    await job.start("w-1", **handlers(1))
    assert await call == [0, 1, 2]


def test_logging_is_by_module() -> None:
    assert futures.logger is logging.getLogger("runtime.peer.future")
    assert RoleActor is not None
