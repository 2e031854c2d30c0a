"""`call_any`: who is called, and when the call moves on."""

from __future__ import annotations

import asyncio

import pytest

from runtime.errors import MisuseError, PeerLostError, RemoteError, Timeout
from runtime.peer.group import RoleGroup
from tests.peer.support import World, settle, until
from tests.peer.workers import blocking, worker


async def test_equals_take_turns(job: World) -> None:
    group = RoleGroup("w")
    found = [await group.call_any("who") for _ in range(6)]
    assert sorted(found) == [0, 0, 1, 1, 2, 2]
    assert found[:3] == found[3:]
    assert await blocking(lambda: group.call_any("plain", 1).result()) in (1, 101, 201)


async def test_the_least_busy_member_is_called(job: World) -> None:
    group = RoleGroup("w")
    busy = [group[0].call("hang"), group[0].call("hang"), group[2].call("hang")]
    assert [await group.call_any("who") for _ in range(4)] == [1, 1, 1, 1]
    busy.append(group[1].call("hang"))
    busy.append(group[1].call("hang"))
    assert [await RoleGroup("w").call_any("who") for _ in range(4)] == [2, 2, 2, 2]
    for call in busy:
        call.cancel()
    await settle()
    assert {await group.call_any("who") for _ in range(3)} == {0, 1, 2}


async def test_many_at_once_are_spread_evenly(job: World) -> None:
    counts = [0, 0, 0]

    def counted(rank: int) -> object:
        async def note() -> int:
            counts[rank] += 1
            await asyncio.sleep(0.01)
            return rank

        return note

    for rank in range(3):
        worker(job, rank).export("note", counted(rank))
    group = RoleGroup("w")
    for call in [group.call_any("note") for _ in range(30)]:
        await call
    assert counts == [10, 10, 10]


@pytest.mark.parametrize("idempotent", [True, False])
async def test_a_call_whose_member_dies_moves_on_if_it_may(job: World, idempotent: bool) -> None:
    started: list[int] = []

    def waits(rank: int) -> object:
        async def work() -> int:
            started.append(rank)
            if len(started) == 1:
                await asyncio.Event().wait()
            return rank

        return work

    for rank in range(3):
        worker(job, rank).export("work", waits(rank))
    call = RoleGroup("w").options(idempotent=idempotent).call_any("work")
    await until(lambda: bool(started))
    await job.kill(worker(job, started[0]), "SIGKILL", for_good=True)
    if idempotent:
        assert await call == started[1] != started[0]
    else:
        with pytest.raises(PeerLostError, match="SIGKILL"):
            await call
    assert len(started) == 1 + idempotent


async def test_a_call_that_was_not_sent_passes_by_members_that_are_gone(job: World) -> None:
    for rank in (0, 2):
        await job.kill(worker(job, rank), "exit 1", for_good=True)
    group = RoleGroup("w")
    assert [await group.call_any("who") for _ in range(3)] == [1, 1, 1]
    await job.kill(worker(job, 1), "exit 1", for_good=True)
    with pytest.raises(PeerLostError, match="exit 1"):
        await group.call_any("who")


async def test_an_error_of_the_handler_does_not_move_on(job: World) -> None:
    async def lost() -> None:
        raise PeerLostError("somebody else")

    for rank in range(3):
        worker(job, rank).export("lost", lost)
    with pytest.raises(RemoteError, match="somebody else"):
        await RoleGroup("w").options(idempotent=True).call_any("lost")
    assert sum(endpoint.statistics().calls_in for endpoint in job._open) == 1


async def test_one_deadline_holds_for_all_tries(job: World) -> None:
    call = RoleGroup("w").options(idempotent=True, timeout=0.2).call_any("hang")
    await asyncio.sleep(0.1)
    (held,) = [e for e in job._open[1:] if e.statistics().running]
    await job.kill(held, "SIGKILL", for_good=True)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    with pytest.raises(Timeout):
        await call
    assert loop.time() - begun < 0.15


async def test_a_cancelled_call_stays_where_it_was(job: World) -> None:
    call = RoleGroup("w").options(idempotent=True).call_any("hang")
    await until(lambda: any(e.statistics().running for e in job._open))
    (held,) = [e for e in job._open[1:] if e.statistics().running]
    call.cancel()
    await job.kill(held, "SIGKILL", for_good=True)
    await settle()
    assert not any(endpoint.statistics().running for endpoint in job._open)
    assert job._open[0].statistics().outstanding == 0


async def test_an_empty_group_has_nobody_to_call(job: World) -> None:
    with pytest.raises(MisuseError, match=r"call_any\('who'\): the group is empty"):
        RoleGroup("w")[3:].call_any("who")
