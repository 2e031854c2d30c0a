"""Finding callees, and losing them: starts, restarts, deaths, partitions, in fake time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from runtime.errors import (
    Closed,
    MisuseError,
    PeerLostError,
    RuntimeFault,
    Timeout,
)
from runtime.peer.endpoint import Endpoint
from runtime.transport.memory import MemoryNetwork
from tests.peer.support import SLOW_WIRE, Handlers, echo, settle, world

pytestmark = pytest.mark.looptime


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


async def test_a_directory_that_breaks_fails_its_calls_and_no_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with world(a=1, b=1, c=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", hang=Handlers().hang, echo=echo)
        call = a.call("b-0", "hang")
        await settle()

        async def broken(name: str) -> Any:
            raise ZeroDivisionError(name)

        job.directory.resolve = job.directory.fate = broken  # type: ignore[method-assign]
        with pytest.raises(RuntimeFault, match=r"cannot look up 'c-0': ZeroDivisionError"):
            await a.call("c-0", "echo")
        assert await a.call("b-0", "echo", (1,)) == 1
        await job.kill(b)
        with pytest.raises(PeerLostError, match="connection lost"):
            await call
    assert "looking up c-0 failed" in caplog.text


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
