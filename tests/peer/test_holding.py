"""Weights for members on other hosts: one copy a host travels, and whatever happens on the way each call runs once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from runtime.errors import CallGroupError, PeerLostError, RemoteError, Timeout
from runtime.peer import holding
from runtime.peer.calls import CallOptions
from runtime.peer.endpoint import Endpoint
from runtime.peer.group import RoleGroup
from runtime.transport.base import Buffer
from runtime.transport.memory import NetworkSettings
from runtime.wire.codec import Encoded
from tests.peer.support import World, settle, until, world

SIZE = 2 * 1024**2
NAMES = [f"w-{rank}" for rank in range(7)]
FEW_S = 5.0


class Staged(bytearray):
    """Memory of an arena."""


class Hosts:
    """`me-0` and w-0 on host a; w-1 to w-3 on b; w-4 and w-5 on c; w-6 alone on d."""

    def __init__(self, job: World) -> None:
        self.job = job
        self.workers: list[Endpoint] = []
        self.got: dict[int, list[Any]] = {}
        self.hold = asyncio.Event()
        self.hold.set()
        job.directory.hosts = {"me-0": "a", **{f"w-{n}": host for n, host in enumerate("abbbccd")}}
        job.stage = self._stage
        self.room = 100 * SIZE
        self.staged: list[weakref.ref[Staged]] = []

    def _stage(self, buffer: Buffer, budget: str = "rpc") -> Buffer:
        if memoryview(buffer).nbytes > self.room:
            return buffer
        staged = Staged(buffer)
        self.staged.append(weakref.ref(staged))
        return memoryview(staged)

    async def start(self) -> None:
        self.me = await self.job.start("me-0")
        self.job.install(self.me)
        for rank in range(7):
            self.workers.append(await self.worker(rank))
        await RoleGroup("w").call("who")

    async def worker(self, rank: int) -> Endpoint:
        async def load_weights(state: dict[str, Any], version: int | None = None) -> int:
            self.got.setdefault(rank, []).append((state, version))
            await self.hold.wait()
            return rank * 10

        async def who() -> int:
            self.got.setdefault(rank, []).append("who")
            return rank

        return await self.job.start(f"w-{rank}", load_weights=load_weights, who=who)

    def sent(self) -> float:
        """How often the payload has left this process."""
        return self.me._transport.statistics().bytes_out / SIZE

    def holding(self) -> int:
        return sum(len(worker._holder._payloads) for worker in self.workers)

    def loads(self) -> list[int]:
        """How often each member's handler ran."""
        return [sum(one != "who" for one in self.got.get(rank, ())) for rank in range(7)]


@pytest.fixture
async def hosts() -> AsyncIterator[Hosts]:
    brief = NetworkSettings(connect_s=0.1)
    async with world(brief, me=1, w=7) as job:
        made = Hosts(job)
        await made.start()
        yield made


def weights() -> dict[str, Any]:
    return {"large": np.full(SIZE, 7, dtype=np.uint8), "small": np.arange(5), "none": np.zeros(0)}


async def test_each_remote_host_is_sent_the_bytes_once(hosts: Hosts) -> None:
    before = hosts.sent()
    assert await RoleGroup("w").broadcast(weights(), version=4) == [n * 10 for n in range(7)]
    # w-0 and w-6 directly, one copy to b, one to c
    assert 4 <= hosts.sent() - before < 4.1
    assert hosts.loads() == [1] * 7
    for rank in range(7):
        state, version = hosts.got[rank][-1]
        assert version == 4
        assert (int(state["large"].sum()), state["small"].tolist()) == (7 * SIZE, [0, 1, 2, 3, 4])
    hosts.got[2][-1][0]["large"][:] = 0
    assert all(hosts.got[rank][-1][0]["large"][0] == 7 for rank in (0, 1, 3, 4, 5, 6))
    await until(lambda: not hosts.holding())


async def test_several_members_of_another_host_have_one_copy_and_nobody_else(hosts: Hosts) -> None:
    where = hosts.job.directory.hosts = {"me-0": "a", **dict(zip(NAMES, "aabbbcc", strict=True))}
    infos = hosts.job.directory.roles()["w"]
    large = Encoded(b"", [bytes(SIZE)])

    def copies(among: Sequence[str], payload: Encoded = large) -> list[Sequence[str]]:
        some = [info for info in infos if info.name in among]
        found, parcels = holding.shipments(hosts.me, some, payload, CallOptions())
        held = {name for one in found for name in one._members}
        assert [p is payload for p in parcels] == [info.name not in held for info in some]
        return [one._members for one in found]

    assert copies(NAMES) == [["w-2", "w-3", "w-4"], ["w-5", "w-6"]]
    assert copies(["w-0", "w-1", "w-2", "w-5"]) == []
    assert copies(NAMES, Encoded(b"", [bytes(holding.HELD_BYTES - 1)])) == []
    del where["me-0"]
    hosts.job.directory.roles = lambda: {"w": infos}  # type: ignore[method-assign]
    assert copies(NAMES) == [], "nobody knows where we are"


async def test_small_payloads_and_calls_go_directly(hosts: Hosts) -> None:
    calls = hosts.me.statistics().calls_out
    await RoleGroup("w").broadcast({"little": np.zeros(9000)})
    assert hosts.me.statistics().calls_out - calls == 7


async def test_calls_start_in_the_order_they_were_made(hosts: Hosts) -> None:
    for endpoint in hosts.workers:
        endpoint.cast("w-0", "who")  # others call as well
    group = RoleGroup("w")
    hosts.got.clear()
    first, who, second, third = (
        group.broadcast(weights(), version=1),
        group[1:6].call("who"),
        group[2:].broadcast(weights(), version=2),
        group.call("who"),
    )
    await asyncio.gather(first, who, second, third)
    for rank in range(2, 6):
        seen = [one if one == "who" else one[1] for one in hosts.got[rank]]
        assert seen == [1, "who", 2, "who"]


async def test_without_room_the_bytes_go_to_each(hosts: Hosts) -> None:
    hosts.room, before = 0, hosts.sent()
    assert await RoleGroup("w").broadcast(weights()) == [n * 10 for n in range(7)]
    assert hosts.loads() == [1] * 7
    assert 7 <= hosts.sent() - before < 7.1
    await until(lambda: not hosts.holding())


async def test_members_that_have_never_been_called_get_theirs_by_reference_too() -> None:
    async with world(me=1, w=7) as job:
        made = Hosts(job)
        made.me = await job.start("me-0")
        job.install(made.me)
        made.workers = [await made.worker(rank) for rank in range(7)]
        assert await RoleGroup("w").broadcast(weights()) == [n * 10 for n in range(7)]
        assert made.sent() < 4.1


async def test_members_that_start_late_get_theirs_by_reference_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(holding, "PATIENCE_S", 0.2)
    async with world(me=1, w=7) as job:
        made = Hosts(job)
        made.me = await job.start("me-0")
        job.install(made.me)
        call = RoleGroup("w").broadcast(weights())
        await asyncio.sleep(0.6)
        made.workers = [await made.worker(rank) for rank in range(7)]
        assert await call == [n * 10 for n in range(7)]
        assert made.sent() < 4.1


async def test_a_holder_that_has_not_started_holds_up_nobody(hosts: Hosts) -> None:
    await hosts.job.kill(hosts.workers[1])
    group = RoleGroup("w")[1:4].options(timeout=0.5, return_exceptions=True)
    found = await group.broadcast(weights())
    assert isinstance(found[0], Timeout | PeerLostError)
    assert found[1:] == [20, 30]


def dies(hosts: Hosts, step: str) -> None:
    """Have w-1, the holder of host b, die at that step."""
    victim, loop = hosts.workers[1], asyncio.get_running_loop()
    give = victim._holder._give

    def staged(parcel: Encoded) -> Any:  # on a thread
        asyncio.run_coroutine_threadsafe(hosts.job.kill(victim), loop).result(FEW_S)
        return parcel.buffers

    async def given(id: bytes, own: bool) -> Any:
        found = await give(id, own)
        hosts.job.network.kill(victim.peer)
        hosts.job.directory.stopped("w-1", "SIGKILL")
        return found

    if step == "staging":
        victim._holder._staged = staged  # type: ignore[method-assign]
    else:
        victim._holder._give = given  # type: ignore[method-assign]


@contextlib.contextmanager
def slow(holder: Endpoint) -> Iterator[None]:
    """It takes its time to stage the payload: until the end."""
    gate = threading.Event()

    def staged(parcel: Encoded) -> Any:
        gate.wait(FEW_S)
        return parcel.buffers

    holder._holder._staged = staged  # type: ignore[method-assign]
    try:
        yield
    finally:
        gate.set()


@pytest.mark.parametrize("step", ["staging", "served"])
async def test_a_holder_that_dies_costs_nobody_else_anything(hosts: Hosts, step: str) -> None:
    dies(hosts, step)
    group = RoleGroup("w").options(return_exceptions=True, timeout=FEW_S)
    found = await group.broadcast(weights(), version=1)
    assert isinstance(found[1], PeerLostError) or (step == "served" and found[1] == 10)
    assert [n for n in range(7) if found[n] == n * 10 or n == 1] == list(range(7))
    assert hosts.loads()[2:] == [1] * 5
    assert hosts.loads()[1] <= 1


async def test_a_holder_that_is_cut_off_from_the_caller_only(hosts: Hosts) -> None:
    """The caller's link to it ends for good while it is sent the bytes: the others get theirs directly."""
    group = RoleGroup("w").options(return_exceptions=True, timeout=FEW_S)
    call = group.broadcast(weights())
    hosts.job.network.part([hosts.me.peer], [hosts.workers[1].peer])
    found = await call
    assert isinstance(found[1], PeerLostError)
    assert found[2:] == [20, 30, 40, 50, 60]
    hosts.job.network.heal()


async def test_a_link_that_breaks_while_calls_wait_for_their_bytes_loses_nothing(
    hosts: Hosts,
) -> None:
    waiting = hosts.workers[2]._handlers._waiting
    with slow(hosts.workers[1]):
        call = RoleGroup("w").broadcast(weights())
        await until(lambda: bool(waiting._asks))
        hosts.job.network.part([hosts.me.peer], [hosts.workers[2].peer])
        await asyncio.sleep(0.01)
        hosts.job.network.heal()
        await until(lambda: hosts.loads()[2] == 1)
        assert hosts.loads()[1:4] == [0, 1, 0]
    assert await call == [n * 10 for n in range(7)]
    assert hosts.loads() == [1] * 7


async def test_bytes_that_were_lost_with_a_link_are_asked_for_again(hosts: Hosts) -> None:
    waiting = hosts.workers[2]._handlers._waiting
    hosts.job.network.part([hosts.workers[1].peer], [w.peer for w in hosts.workers[2:4]])
    missing, lost = hosts.me._caller.missing, []
    hosts.me._caller.missing = lambda *args: lost.append(args)  # type: ignore[method-assign]
    call = RoleGroup("w").broadcast(weights())
    await until(lambda: len(lost) == 2)
    assert list(waiting._asks.values()) == [None]
    hosts.me._caller.missing = missing  # type: ignore[method-assign]
    for worker in hosts.workers[2:4]:
        hosts.job.network.part([hosts.me.peer], [worker.peer])
    await asyncio.sleep(0.01)
    hosts.job.network.heal()
    assert await call == [n * 10 for n in range(7)]
    assert hosts.loads() == [1] * 7


async def test_when_nobody_waits_any_more_the_holder_lets_go(hosts: Hosts) -> None:
    async def never(message: Any) -> None:
        await asyncio.sleep(3600)

    hosts.workers[3]._holder._fetch = never  # type: ignore[method-assign]
    hosts.hold.clear()
    call = RoleGroup("w").broadcast(weights())
    await until(lambda: hosts.loads() == [1, 1, 1, 0, 1, 1, 1])
    assert hosts.holding() == 1
    call.cancel()
    await until(lambda: not hosts.holding())
    hosts.hold.set()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_the_calls_of_a_cancelled_broadcast_never_start(hosts: Hosts) -> None:
    waiting = [worker._handlers._waiting for worker in hosts.workers[2:4]]
    with slow(hosts.workers[1]):
        call = RoleGroup("w")[1:4].broadcast(weights())
        await until(lambda: all(one._asks for one in waiting))
        later = RoleGroup("w")[1:4].call("who")
        await settle()
        assert not later.done()
        call.cancel()
        assert await later == [1, 2, 3]
    assert hosts.loads() == [0] * 7
    assert not any(one._asks or one._lines for one in waiting)
    await until(lambda: not hosts.holding())


async def test_a_caller_that_dies_leaves_nothing_held(hosts: Hosts) -> None:
    waiting = [worker._handlers._waiting for worker in hosts.workers[1:4]]
    with slow(hosts.workers[1]):
        call = RoleGroup("w")[1:4].broadcast(weights())
        await until(lambda: all(one._asks for one in waiting))
        await hosts.job.kill(hosts.me)
        for worker in hosts.workers:
            worker.lose(hosts.me.peer, "SIGKILL")
        await until(lambda: not hosts.holding() and not any(one._asks for one in waiting))
    assert hosts.loads() == [0] * 7
    call.cancel()


async def test_who_waits_for_a_holder_that_does_nothing_gets_the_bytes_directly(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holding, "PATIENCE_S", 0.05)
    with slow(hosts.workers[1]):
        call = RoleGroup("w").broadcast(weights())
        await until(lambda: hosts.loads() == [1] * 7)
    assert await call == [n * 10 for n in range(7)]
    assert hosts.loads() == [1] * 7
    await until(lambda: not hosts.holding())


async def test_of_the_time_that_calls_have_a_holder_gets_a_part(hosts: Hosts) -> None:
    with slow(hosts.workers[1]):
        group = RoleGroup("w")[1:4].options(timeout=0.4)
        assert await group.broadcast(weights()) == [10, 20, 30]


async def test_a_holder_is_not_sent_the_next_payload_before_the_calls_of_the_last_have_begun(
    hosts: Hosts,
) -> None:
    large = {"large": np.zeros(10 * SIZE // 2, dtype=np.uint8)}
    with slow(hosts.workers[1]):
        calls = [RoleGroup("w")[1:4].broadcast(large) for _ in range(5)]
        await until(lambda: hosts.holding() > 0)
        await settle()
        assert hosts.holding() == 1
    await asyncio.gather(*calls)
    assert hosts.loads()[1:4] == [5] * 3


async def test_nothing_of_a_payload_is_kept_once_all_have_answered(hosts: Hosts) -> None:
    gc.disable()
    try:
        call = RoleGroup("w").broadcast(weights())
        await call
        hosts.got.clear()
        assert len(hosts.staged) > 2
        await until(lambda: not any(staged() for staged in hosts.staged))
    finally:
        gc.enable()


async def test_errors_are_those_of_the_members(hosts: Hosts) -> None:
    async def refuse(state: dict[str, Any]) -> None:
        raise ValueError("too heavy")

    async def take(state: dict[str, Any]) -> str:
        return "ok"

    for rank, worker in enumerate(hosts.workers):
        worker.export("take", refuse if rank in (1, 2) else take)
    with pytest.raises(CallGroupError) as caught:
        await RoleGroup("w").broadcast(weights(), "take")
    assert [(f.rank, f.host) for f in caught.value.failures] == [(1, "b"), (2, "b")]
    assert caught.value.partial == dict.fromkeys([0, 3, 4, 5, 6], "ok")


async def test_a_method_that_is_not_there_is_refused_as_ever(hosts: Hosts) -> None:
    with pytest.raises(CallGroupError) as caught:
        await RoleGroup("w").broadcast(weights(), "no_such")
    assert len(caught.value.failures) == 7
    await until(lambda: not hosts.holding())
    assert await RoleGroup("w").call("who") == list(range(7))


async def test_a_payload_that_is_over_is_refused(hosts: Hosts) -> None:
    await RoleGroup("w").broadcast(weights())
    holder = hosts.workers[1]._holder
    await until(lambda: not len(holder._payloads))
    with pytest.raises(RemoteError, match="any more"):
        await hosts.workers[2].call("w-1", "runtime.take", [holder._over[-1]])
    unknown = hosts.workers[2].call("w-1", "runtime.take", [b"unknown"])
    await until(lambda: len(holder._payloads) == 1)
    unknown.cancel()
    await until(lambda: not len(holder._payloads))
