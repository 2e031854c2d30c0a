"""Groups and their members: who they are, and calling one, all, or the least busy."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections import OrderedDict
from typing import Any

import pytest
import torch

from runtime.errors import CallGroupError, MisuseError, PeerLostError, Timeout
from runtime.peer import context
from runtime.peer.group import RoleGroup
from runtime.peer.method import rpc
from tests.peer.support import SLOW_WIRE, World, settle, until, world
from tests.peer.workers import FEW_S, blocking, handlers, worker


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
    lost = worker(job, 1)
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


async def test_scattered_lists_give_each_member_its_own_item(job: World) -> None:
    group = RoleGroup("w")
    assert await group.call("plain", [1, 2, 3], y=[10, 20, 30], _scatter=True) == [11, 122, 233]
    assert await group.call("who", _scatter=True) == [0, 1, 2]
    assert await group[3:].call("plain", [], _scatter=True) == []
    with pytest.raises(MisuseError, match="argument 'y' has 2 items; with _scatter it needs 3"):
        group.call("plain", [1, 2, 3], y=[1, 2], _scatter=True)
    with pytest.raises(MisuseError, match="argument 0 is a int; with _scatter"):
        group.call("plain", 1, _scatter=True)
    with pytest.raises(MisuseError, match="lock"):
        group.call("plain", [1, 2, threading.Lock()], _scatter=True)
    await settle()
    assert context.current().endpoint.statistics().calls_out == 6


async def test_weights_are_broadcast_as_they_are_now(job: World) -> None:
    got: dict[int, Any] = {}

    def loads(rank: int) -> Any:
        async def load_weights(state_dict: dict[str, Any], **named: Any) -> int:
            got[rank] = state_dict, named
            return rank

        return load_weights

    for rank in range(3):
        worker(job, rank).export("load_weights", loads(rank))
        worker(job, rank).export("other", loads(rank + 10))
    state = OrderedDict(weight=torch.ones(4000, 3), bias=torch.ones(3, requires_grad=True))
    call = RoleGroup("w").broadcast(state)
    state["weight"].zero_()
    assert await call == [0, 1, 2]
    for rank in range(3):
        found, named = got[rank]
        assert (type(found), list(found), named) == (dict, ["weight", "bias"], {})
        assert (float(found["weight"].sum()), found["bias"].tolist()) == (12000, [1, 1, 1])
    got[0][0]["weight"].zero_()
    assert float(got[1][0]["weight"].sum()) == 12000, "each has its own"
    assert await RoleGroup("w").broadcast(state, "other", version=3) == [10, 11, 12]
    assert got[11][1] == {"version": 3}
    with pytest.raises(MisuseError, match=r"broadcast\(Tensor\): give a state dict"):
        RoleGroup("w").broadcast(torch.ones(3))  # type: ignore[arg-type]
    assert await RoleGroup("w")[3:].broadcast(state) == []


@pytest.mark.parametrize("retry", [-1, True, 1.5, "2"])
async def test_a_number_of_retries_that_is_none_is_refused(job: World, retry: Any) -> None:
    with pytest.raises(MisuseError, match="whole numbers from 0"):
        RoleGroup("w").options(retry=retry)
    with pytest.raises(MisuseError, match="whole numbers from 0"):
        RoleGroup("w")[0].options(retry=retry)


async def test_an_idempotent_call_reaches_the_next_start_of_its_member(job: World) -> None:
    call = RoleGroup("w").options(idempotent=True, retry=1).call("hang")
    once = RoleGroup("w")[1].call("hang")
    await settle()
    await job.kill(worker(job, 1))
    with pytest.raises(PeerLostError, match="SIGKILL"):
        await once
    assert not call.done()
    again = await job.start("w-1", **handlers(1))
    await until(lambda: again.statistics().running == 1)
    call.cancel()
    await until(lambda: not any(endpoint.statistics().running for endpoint in job._open))


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
    with pytest.raises(MisuseError, match=r"await group\.wait_ready_async"):
        RoleGroup("w").wait_ready()
    assert 0 <= await RoleGroup("w")[0].ping() < FEW_S
    with pytest.raises(Timeout, match=r"not ready after 0.05 s; no answer from other-0, other-1"):
        await RoleGroup("other").wait_ready_async(0.05)
    job.directory.stopped("other-0", "exit 1", for_good=True)
    with pytest.raises(PeerLostError, match="exit 1"):
        await blocking(RoleGroup("other").wait_ready, 0.05)


async def test_a_member_that_dies_and_is_started_again_is_waited_for() -> None:
    async with world(SLOW_WIRE, driver=1, w=2) as job:
        job.install(await job.start("driver-0"))
        for rank in range(2):
            await job.start(f"w-{rank}")
        await RoleGroup("w").wait_ready_async(FEW_S)
        async with asyncio.TaskGroup() as group:
            group.create_task(RoleGroup("w").wait_ready_async(FEW_S))
            await settle()  # it has been asked, and cannot have heard it
            await job.kill(worker(job, 1))
            await job.start("w-1")


async def test_groups_reach_a_restarted_member_without_being_built_anew(job: World) -> None:
    group = RoleGroup("w")
    assert await group.call("who") == [0, 1, 2]
    await job.kill(worker(job, 1))
    await asyncio.sleep(0.01)
    call = group.call("who")
    await settle()
    assert not call.done()
    await job.start("w-1", **handlers(1))
    assert await call == [0, 1, 2]


async def test_a_group_that_is_sent_calls_its_members_from_where_it_arrived(job: World) -> None:
    group = RoleGroup("w").options(timeout=7.0, return_exceptions=True)[1:]
    there = pickle.loads(pickle.dumps(group))
    assert [member.name for member in there] == ["w-1", "w-2"]
    assert there.name == "w"
    assert there[0].info == group[0].info
    assert await there.call("plain", 1) == [101, 201]
    assert "raised in w-1" in str((await there.call("odd_fails"))[0])
    assert await pickle.loads(pickle.dumps(group[1])).call("plain", 1) == 201
