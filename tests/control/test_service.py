"""The control plane over a network in memory, in fake time: what processes see of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random

import pytest

from runtime.control.client import ControlClient
from runtime.control.plane import standard_machines
from runtime.control.service import LogClock
from runtime.errors import BarrierBroken, Closed, MisuseError, PeerLostError, Timeout
from runtime.machine import Call, Effect, Machine, Message, Reply, Send
from runtime.peer.endpoint import Endpoint
from runtime.transport.memory import NetworkSettings
from tests.control.cluster import AGENT, Job, actors, job, running

pytestmark = pytest.mark.looptime


def _arrive(name: str, **more: object) -> dict[str, object]:
    return {"op": "arrive", "name": name, **more}


async def test_a_barrier_of_a_role_lets_go_when_all_have_come() -> None:
    async with running(actors(("trainer", 3), ("eval", 1))) as (_, workers):
        loop = asyncio.get_running_loop()

        async def come(after: float, client: object) -> float:
            await asyncio.sleep(after)
            await client.ask("barrier", _arrive("x"))  # type: ignore[attr-defined]
            return loop.time()

        begun = loop.time()
        ends = await asyncio.gather(*(come(i, w.client) for i, w in enumerate(workers[:3])))
        assert [end - begun for end in ends] == [pytest.approx(2, abs=0.1)] * 3


async def test_rounds_of_one_name_with_jitter_keep_all_in_step() -> None:
    settings = NetworkSettings(delay_s=(0.0, 0.02))
    async with running(actors(("trainer", 4)), settings=settings) as (_, workers):
        rounds = 200  # tests/integration has a thousand
        inside = [0] * len(workers)

        async def train(index: int) -> None:
            random = Random(index)
            for number in range(1, rounds + 1):
                await asyncio.sleep(random.random() * 0.01)
                inside[index] = number
                await workers[index].client.ask("barrier", _arrive("step"))
                # Everybody has arrived at this round, nobody can be past the next one.
                assert all(number <= other <= number + 1 for other in inside)

        async with asyncio.TaskGroup() as group:
            for index in range(len(workers)):
                group.create_task(train(index))
        assert inside == [rounds] * len(workers)


async def test_a_timeout_says_why_and_withdraws_the_arrival() -> None:
    async with running(actors(("t", 2))) as (_, (one, two)):
        with pytest.raises(
            Timeout, match=r"1 of 2 have arrived, waiting for t-1 \(running\)"
        ) as caught:
            await one.client.ask("barrier", _arrive("x"), timeout=3)
        assert caught.value.waited_s == pytest.approx(3, abs=0.1)
        with pytest.raises(Timeout, match=r"waiting for t-0"):
            await two.client.ask("barrier", _arrive("x"), timeout=3)


async def test_a_cancelled_arrival_is_withdrawn() -> None:
    async with running(actors(("t", 2))) as (_, (one, two)):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await one.client.ask("barrier", _arrive("x"))
        with pytest.raises(Timeout, match=r"waiting for t-0"):
            await two.client.ask("barrier", _arrive("x"), timeout=3)


async def test_after_ten_seconds_it_says_once_what_it_waits_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running(actors(("t", 2))) as (_, (one, _two)):
        with caplog.at_level(logging.WARNING), pytest.raises(Timeout):
            await one.client.ask("barrier", _arrive("x"), timeout=50)
    said = [r.getMessage() for r in caplog.records if "still waiting" in r.getMessage()]
    assert len(said) == 1
    assert "waiting for t-1 (running)" in said[0]


async def test_waiting_longer_than_the_heartbeat_timeout_keeps_everybody_alive() -> None:
    async with running(actors(("t", 2))) as (made, (one, two)):
        waiting = asyncio.gather(one.client.ask("barrier", _arrive("x")))
        await asyncio.sleep(300)
        await two.client.ask("barrier", _arrive("x"))
        await waiting
        assert not [event for event in made.events if event["kind"] == "lost"]


async def test_a_member_that_dies_for_good_breaks_the_barrier_by_name() -> None:
    async with running(actors(("t", 3))) as (made, workers):
        waiting = [
            asyncio.gather(w.client.ask("barrier", _arrive("x")), return_exceptions=True)
            for w in workers[:2]
        ]
        await asyncio.sleep(1)
        before = asyncio.get_running_loop().time()
        await made.exited(workers[2], "SIGKILL", -9, final=True)
        for (error,) in [await wait for wait in waiting]:
            assert isinstance(error, BarrierBroken)
            assert error.missing == ["t-2"]
            assert "t-2 (SIGKILL)" in error.reason
        assert asyncio.get_running_loop().time() - before < 1


async def test_a_barrier_waits_for_a_member_that_is_started_again() -> None:
    async with AsyncExitStack() as stack:
        made = await stack.enter_async_context(job(actors(("t", 2))))
        one = await stack.enter_async_context(made.worker("t-0"))
        async with made.worker("t-1") as first:
            old = asyncio.gather(
                first.client.ask("barrier", _arrive("x"), timeout=20), return_exceptions=True
            )
            await asyncio.sleep(0.1)
            await made.exited(first, "exit 1", 1, final=False)
            await old
        waiting = asyncio.gather(one.client.ask("barrier", _arrive("x")))
        await asyncio.sleep(2)
        assert not waiting.done()
        second = await stack.enter_async_context(made.worker("t-1"))
        await second.client.ask("barrier", _arrive("x"))
        await waiting


async def test_resolve_waits_for_a_process_to_come_up_and_is_remembered() -> None:
    async with AsyncExitStack() as stack:
        made = await stack.enter_async_context(job(actors(("a", 1), ("b", 1))))
        one = await stack.enter_async_context(made.worker("a-0"))
        found = asyncio.gather(*(one.client.resolve("b") for _ in range(50)))
        await asyncio.sleep(5)
        assert not found.done()
        two = await stack.enter_async_context(made.worker("b-0"))
        assert {address.peer for address in await found} == {two.peer}
        assert (await one.client.resolve("b-0")).role == "b"


async def test_resolve_names_what_there_is_when_there_is_no_such_actor() -> None:
    async with running(actors(("a", 2))) as (_, (one, _two)):
        with pytest.raises(MisuseError, match=r"no actor 'c-0'; it has a-0, a-1"):
            await one.client.resolve("c-0")


async def test_resolve_of_one_that_is_gone_for_good_fails_at_once_with_the_cause() -> None:
    async with running(actors(("a", 1), ("b", 1))) as (made, (one, two)):
        await made.exited(two, "SIGSEGV", -11, final=True)
        with pytest.raises(PeerLostError, match="b-0 on h is gone: SIGSEGV") as caught:
            await one.client.resolve("b-0")
        error = caught.value
        assert (error.role, error.rank, error.host, error.cause) == ("b", 0, "h", "SIGSEGV")


async def test_after_a_restart_resolve_finds_the_new_process() -> None:
    async with AsyncExitStack() as stack:
        made = await stack.enter_async_context(job(actors(("a", 1), ("b", 1))))
        one = await stack.enter_async_context(made.worker("a-0"))
        async with made.worker("b-0") as first:
            assert (await one.client.resolve("b-0")).peer == first.peer
            await made.exited(first, "exit 1", 1, final=False)
        found = asyncio.gather(one.client.resolve("b-0"))
        await asyncio.sleep(1)
        assert not found.done()
        second = await stack.enter_async_context(made.worker("b-0"))
        assert (await found)[0].peer == second.peer


async def test_calls_to_a_dead_process_fail_at_once_with_what_the_membership_knows() -> None:
    async with running(actors(("a", 1), ("b", 1))) as (made, (one, two)):

        async def sleep_long() -> None:
            await asyncio.sleep(1000)

        two.endpoint.export("sleep_long", sleep_long)
        call = one.endpoint.call("b-0", "sleep_long")
        await asyncio.sleep(1)
        await made.exited(two, "SIGKILL", -9, final=True)
        with pytest.raises(PeerLostError, match="SIGKILL"):
            await call


async def test_the_fate_of_a_process_is_told_when_it_is_known() -> None:
    async with running(actors(("a", 1), ("b", 1))) as (made, (one, two)):
        loop = asyncio.get_running_loop()
        fate = asyncio.gather(one.client.fate(two.peer))
        await asyncio.sleep(0.5)
        await made.exited(two, "exit 7", 7, final=False)
        assert await fate == ["exit 7"]
        begun = loop.time()
        assert (
            await one.client.fate(one.peer) is None
        )  # It lives; that takes two seconds to be sure.
        assert loop.time() - begun == pytest.approx(2, abs=0.2)
        assert await one.client.fate("nobody.0") is None


async def test_a_process_that_was_given_up_is_not_heard_any_more() -> None:
    async with running(actors(("a", 2))) as (made, (one, two)):
        made.service.lost(two.peer, "host unreachable")
        await asyncio.sleep(0.1)
        with pytest.raises(MisuseError, match="declared lost"):
            await two.client.ask("kv", {"op": "get", "key": "k"}, timeout=5)
        states = {member.id: member.state for member in await one.client.members()}
        assert states == {"a-0": "running", "a-1": "failed"}


async def test_leaving_is_told_and_the_verdict_stays_the_agents() -> None:
    async with running(actors(("a", 2))) as (made, (one, two)):
        await two.client.leave()
        states = {member.id: member.state for member in await one.client.members()}
        assert states["a-1"] == "restarting"
        await made.exited(two, "exit 0", 0, final=True)
        states = {member.id: member.state for member in await one.client.members()}
        assert states["a-1"] == "exited"


async def test_the_agent_asks_as_others_do() -> None:
    async with job(actors(("a", 1))) as made:
        assert await made.service.ask("kv", {"op": "put", "key": "k", "value": 1}) == {"version": 1}
        with pytest.raises(MisuseError, match="no machine 'nothing'; there are barrier, directory"):
            await made.service.ask("nothing", {"op": "x"})
        with pytest.raises(Timeout, match="waiting for key 'z' to appear"):
            await made.service.ask("kv", {"op": "watch", "key": "z", "since": 0}, timeout=1)


async def test_questions_end_with_the_control_plane() -> None:
    async with job(actors(("a", 1))) as made:
        waiting = asyncio.gather(
            made.service.ask("kv", {"op": "watch", "key": "z"}), return_exceptions=True
        )
        await asyncio.sleep(1)
        await made.service.close()
        assert isinstance((await waiting)[0], Closed)
        with pytest.raises(Closed):
            await made.service.ask("kv", {"op": "get", "key": "z"})


async def test_a_lost_control_plane_is_a_lost_peer_after_some_seconds() -> None:
    async with running(actors(("a", 1))) as (made, (one,)):
        waiting = asyncio.gather(
            one.client.ask("kv", {"op": "watch", "key": "z"}), return_exceptions=True
        )
        await asyncio.sleep(1)
        made.network.kill(made.endpoint.peer)
        begun = asyncio.get_running_loop().time()
        assert isinstance((await waiting)[0], PeerLostError)
        assert asyncio.get_running_loop().time() - begun < 30


async def test_a_broken_link_does_not_lose_an_arrival() -> None:
    async with running(actors(("t", 2))) as (made, (one, two)):
        waiting = asyncio.gather(one.client.ask("barrier", _arrive("x")))
        await asyncio.sleep(1)
        made.network.part([one.peer], [made.endpoint.peer])
        await asyncio.sleep(0.5)
        made.network.heal()
        await asyncio.sleep(5)
        await two.client.ask("barrier", _arrive("x"))
        await waiting


class _Teller:
    """A machine that sends on what it is told to."""

    def handle(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        number = {"number": message["number"]} if "number" in message else {}
        return [
            Send(message["to"], {"op": "hello", **number}),
            *([Reply(call, {})] if call else []),
        ]

    def tick(self, now: float) -> list[Effect]:
        return []

    def deadline(self) -> float | None:
        return None

    def cancelled(self, call: Call, now: float) -> list[Effect]:
        return []

    def lost(self, peer: str, cause: str, now: float) -> list[Effect]:
        return []

    def why(self, call: Call) -> str | None:
        return None

    def dump(self) -> dict[str, object]:
        return {}

    def load(self, state: dict[str, object]) -> None: ...


@asynccontextmanager
async def _another_agent(made: Job, peer: str) -> AsyncIterator[list[object]]:
    """An agent of another host; gives what it is told."""
    told: list[object] = []
    endpoint = Endpoint(made.network.transport(peer))
    client = ControlClient(endpoint, made.endpoint.address, me=None, patience=30)
    client.told = told.append
    async with endpoint, client:
        where = {"host": "h2", "address": endpoint.address.address, "node_rank": 1}
        await client.ask("membership", {"op": "agent", **where})
        yield told


def _with_teller() -> dict[str, Machine]:
    return {**standard_machines(), "teller": _Teller()}


async def test_what_machines_send_reaches_agents(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with job((), machines=_with_teller) as made, _another_agent(made, "@agent-1.x") as told:
        for to in (AGENT, "@agent-1.x", "b-0.0"):
            await made.service.ask("teller", {"op": "tell", "to": to})
        await made.service.flush(1)
        assert made.sent == [{"op": "hello"}]
        assert told == [{"op": "hello"}]
        assert "no agent b-0.0 (any more) to send hello to" in caplog.text


async def test_what_an_agent_is_told_survives_a_broken_link_once_and_in_order() -> None:
    async with job((), machines=_with_teller) as made, _another_agent(made, "@agent-1.x") as told:
        for number in range(4):
            if number % 2:
                made.network.part([made.endpoint.peer], ["@agent-1.x"])
            message = {"op": "tell", "to": "@agent-1.x", "number": number}
            made.service._running_driver().handle(
                {"op": "ask", "machine": "teller", "message": message}
            )
            await asyncio.sleep(2)
            made.network.heal()
        await made.service.flush(20)
        assert [item["number"] for item in told] == [*range(4)]  # type: ignore[index]


async def test_nothing_more_is_told_to_an_agent_that_is_lost() -> None:
    async with job((), machines=_with_teller) as made, _another_agent(made, "@agent-1.x") as told:
        made.service.lost("@agent-1.x", "its ssh ended")
        await asyncio.sleep(1)
        await made.service.ask("teller", {"op": "tell", "to": "@agent-1.x"})
        await made.service.flush(1)
        assert told == []
        (lost,) = (e for e in made.events if e["kind"] == "lost")
        assert lost["cause"] == "its ssh ended"


async def test_leaving_unheard_is_no_error_and_soon_over() -> None:
    async with running(actors(("a", 1))) as (made, (one,)):
        made.network.part([one.peer], [made.endpoint.peer])
        begun = asyncio.get_running_loop().time()
        await one.client.leave()
        assert asyncio.get_running_loop().time() - begun < 5


async def test_only_actors_can_join_or_leave() -> None:
    async with job(actors(("a", 1))) as made:
        endpoint = Endpoint(made.network.transport("cli.0"))
        client = ControlClient(endpoint, made.endpoint.address, me=None)
        async with endpoint, client:
            with pytest.raises(MisuseError, match=r"cli.0 is no actor of the job and cannot join"):
                await client.join("mem://cli")
            assert [member.state for member in await client.members()] == ["expected"]


async def test_a_resolve_that_is_given_up_leaves_the_others_waiting() -> None:
    async with AsyncExitStack() as stack:
        made = await stack.enter_async_context(job(actors(("a", 1), ("b", 1))))
        one = await stack.enter_async_context(made.worker("a-0"))
        found = asyncio.gather(one.client.resolve("b-0"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await one.client.resolve("b-0")
        two = await stack.enter_async_context(made.worker("b-0"))
        assert (await found)[0].peer == two.peer


def test_the_clock_of_the_log_leaves_out_what_the_process_slept() -> None:
    raw = iter([0.0, 1.0, 2.0, 62.0, 63.0])
    clock = LogClock(lambda: next(raw), interval=1.0)
    assert [clock() for _ in range(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]
