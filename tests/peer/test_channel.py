"""Links that break while both sides live: calls go on, and none runs twice. In fake time, by seeds."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest

from runtime.errors import MisuseError, PeerLostError, RemoteError, Timeout
from runtime.peer.calls import CallOptions, Outgoing
from runtime.peer.channel import ACK_EVERY, TRIES
from runtime.peer.clients import GRACE_S, Client
from runtime.peer.endpoint import Endpoint
from runtime.peer.outgoing import CallFuture
from runtime.transport.base import Lane
from runtime.transport.memory import NetworkSettings
from runtime.wire import codec
from tests.peer.support import Handlers, InlineRunner, World, echo, settle, world

pytestmark = pytest.mark.looptime


def idempotent(endpoint: Endpoint, target: str, method: str, *args: Any, retry: int = 1) -> Any:
    future = CallFuture(loop=asyncio.get_running_loop())
    future.caller = endpoint.caller
    options = CallOptions(retry=retry, idempotent=True)
    future.call = endpoint.caller.call(
        target, method, codec.encode_arguments(args), future, options
    )
    return future


def client_of(callee: Endpoint, caller: Endpoint) -> Client:
    return callee._handlers._clients._by_peer[caller.peer]


def cut(job: World, *ends: Endpoint) -> None:
    """Break every link between them; they can connect again at once."""
    job.network.part([ends[0].peer], [end.peer for end in ends[1:]])
    job.network.heal()


async def test_a_call_that_runs_when_its_link_breaks_is_answered_by_the_next_link() -> None:
    async with world(a=1, b=1) as job:
        handlers = Handlers()
        a, b = await job.start("a-0"), await job.start("b-0", wait=handlers.wait)
        calls = [a.call("b-0", "wait", (str(n),)) for n in range(3)]
        await settle()
        cut(job, a, b)
        await asyncio.sleep(0.5)
        handlers.gate.set()
        assert await asyncio.gather(*calls) == ["0", "1", "2"]
        assert handlers.events == ["start 0", "start 1", "start 2"], "none ran twice"


async def test_an_answer_that_was_lost_is_sent_again_and_the_call_does_not_run_again() -> None:
    ran: list[int] = []

    async def count(value: int) -> int:
        ran.append(value)
        return value

    async with world(NetworkSettings(delay_s=(0.1, 0.1)), a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", count=count)
        assert await a.call("b-0", "count", (0,)) == 0
        call = a.call("b-0", "count", (1,))
        await asyncio.sleep(0.15)
        assert ran == [0, 1], "the answer is on its way"
        cut(job, a, b)
        assert await call == 1
        assert ran == [0, 1]


async def test_a_call_that_was_lost_on_its_way_is_sent_again_before_those_made_after_it() -> None:
    async with world(NetworkSettings(delay_s=(0.1, 0.1)), a=1, b=1) as job:
        handlers = Handlers()
        handlers.gate.set()
        a, b = await job.start("a-0"), await job.start("b-0", wait=handlers.wait)
        await a.call("b-0", "wait", ("first",))
        lost = a.call("b-0", "wait", ("lost",))
        await asyncio.sleep(0.05)
        cut(job, a, b)
        later = a.call(b.address, "wait", ("later",))
        assert [await lost, await later] == ["lost", "later"]
        assert handlers.events == ["start first", "start lost", "start later"]


async def test_the_deadline_of_a_call_that_is_sent_again_is_that_of_the_first_time() -> None:
    async with world(a=1, b=1) as job:
        handlers = Handlers()
        a, b = await job.start("a-0"), await job.start("b-0", hang=handlers.hang)
        call = a.call("b-0", "hang", timeout=5)
        await asyncio.sleep(3)
        cut(job, a, b)
        start = asyncio.get_running_loop().time()
        with pytest.raises(Timeout):
            await call
        assert asyncio.get_running_loop().time() - start == pytest.approx(2, abs=0.01)
        await settle()
        assert handlers.events == ["start hang", "cancelled hang"]


async def test_what_the_caller_gave_up_while_the_link_was_broken_is_cancelled_when_it_is_back() -> (
    None
):
    async with world(a=1, b=1) as job:
        handlers = Handlers()
        a, b = await job.start("a-0"), await job.start("b-0", hang=handlers.hang, echo=echo)
        call, other = a.call("b-0", "hang", ("x",)), a.call("b-0", "hang", ("y",))
        await settle()
        job.network.part([a.peer], [b.peer])
        await asyncio.sleep(0.1)
        call.cancel()
        await asyncio.sleep(0.1)
        assert handlers.events == ["start x", "start y"]
        job.network.heal()
        await asyncio.sleep(0.2)
        assert handlers.events == ["start x", "start y", "cancelled x"]
        other.cancel()


async def test_a_caller_that_stays_away_too_long_is_given_up_and_its_calls_never_run_again() -> (
    None
):
    async with world(a=1, b=1) as job:
        handlers = Handlers()
        a, b = await job.start("a-0"), await job.start("b-0", hang=handlers.hang, echo=echo)
        call = a.call("b-0", "hang")
        await settle()
        job.network.part([a.peer], [b.peer])
        await asyncio.sleep(GRACE_S - 0.1)
        assert handlers.events == ["start hang"]
        with pytest.raises(PeerLostError, match="connection lost"):
            await call
        await asyncio.sleep(0.2)
        assert handlers.events == ["start hang", "cancelled hang"]
        job.network.heal()
        assert await a.call("b-0", "echo", (1,)) == 1
        assert b.statistics().running == 0


async def test_a_call_that_was_given_up_here_is_refused_when_it_is_asked_for_again() -> None:
    async with world(a=1, b=1) as job:
        handlers = Handlers()
        a, b = await job.start("a-0"), await job.start("b-0", hang=handlers.hang)
        call = a.call("b-0", "hang")
        await settle()
        b._handlers._give_up_all(client_of(b, a))
        cut(job, a, b)
        with pytest.raises(PeerLostError, match="does not have this call"):
            await call
        assert handlers.events == ["start hang", "cancelled hang"]


async def test_a_call_that_breaks_its_link_each_time_ends_and_does_not_go_on_for_ever() -> None:
    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", echo=echo)
        assert await a.call("b-0", "echo", (1,)) == 1
        sent: list[int] = []
        handlers, take = b._handlers, b._handlers.call

        def poison(link: Any, message: Any) -> None:
            if message.id != 2:
                take(link, message)
                return
            sent.append(message.id)
            link.cut("it broke")

        handlers.call = poison  # type: ignore[method-assign]
        with pytest.raises(PeerLostError, match="again and again"):
            await a.call("b-0", "echo", (2,))
        assert len(sent) == 1 + TRIES
        assert await a.call("b-0", "echo", (3,)) == 3


# after a death


async def test_an_idempotent_call_goes_to_the_next_start_of_its_callee() -> None:
    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", hang=Handlers().hang)
        again = idempotent(a, "b-0", "hang")
        once = a.call("b-0", "hang")
        await settle()
        await job.kill(b)
        with pytest.raises(PeerLostError, match="SIGKILL"):
            await once

        async def hang(name: str = "") -> str:
            return "answered"

        await job.start("b-0", hang=hang)
        assert await again == "answered"


async def test_an_idempotent_call_is_made_again_as_often_as_was_said() -> None:
    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", hang=Handlers().hang)
        call = idempotent(a, "b-0", "hang", retry=2)
        for _ in range(2):
            await asyncio.sleep(1)
            await job.kill(b)
            b = await job.start("b-0", hang=Handlers().hang)
        await asyncio.sleep(1)
        assert not call.done()
        await job.kill(b)
        with pytest.raises(PeerLostError):
            await call


async def test_an_idempotent_call_to_an_actor_that_is_gone_for_good_fails() -> None:
    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", hang=Handlers().hang)
        call = idempotent(a, "b-0", "hang", retry=5)
        await settle()
        await job.kill(b, "exit 1", for_good=True)
        with pytest.raises(PeerLostError, match="exit 1"):
            await call


async def test_one_way_calls_are_never_sent_again() -> None:
    seen: list[int] = []

    async def note(value: int) -> None:
        seen.append(value)

    async with world(NetworkSettings(delay_s=(0.1, 0.1)), a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", note=note, echo=echo)
        await a.call("b-0", "echo", (0,))
        a.cast("b-0", "note", (1,))
        await asyncio.sleep(0.05)
        cut(job, a, b)
        assert await a.call("b-0", "echo", (2,)) == 2
        a.cast("b-0", "note", (3,))
        await a.call("b-0", "echo", (4,))
        assert seen == [3]


# what is kept


async def test_answers_are_kept_until_they_are_acknowledged_and_no_longer() -> None:
    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", echo=echo)
        most = 0
        for n in range(5 * ACK_EVERY):
            await a.call("b-0", "echo", (n,))
            most = max(most, len(client_of(b, a).kept))
        assert most <= ACK_EVERY + 2
        await asyncio.sleep(1)
        assert client_of(b, a).kept == {}
        await a.call("b-0", "echo", (bytes(300_000),))
        await settle()
        assert client_of(b, a).kept == {}, "a large one is acknowledged at once"


async def test_what_was_acknowledged_by_a_link_that_broke_is_not_kept_for_ever() -> None:
    async with world(NetworkSettings(delay_s=(0.05, 0.05)), a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", echo=echo)
        await asyncio.gather(*(a.call("b-0", "echo", (n,)) for n in range(10)))
        cut(job, a, b)
        await a.call("b-0", "echo", (1,))
        await asyncio.sleep(1)
        assert client_of(b, a).kept == {}


async def test_a_caller_that_is_gone_leaves_nothing_behind() -> None:
    async with world(a=1, b=1) as job:
        a, b = await job.start("a-0"), await job.start("b-0", echo=echo, hang=Handlers().hang)
        await a.call("b-0", "echo", (1,))
        call = a.call("b-0", "hang")
        await settle()
        await a.close()
        await settle()
        assert b.statistics().running == 0, "it said good-bye"
        assert b._handlers._clients.all() == []
        assert call.exception() is not None


# what is urgent


async def test_a_cancel_takes_the_control_lane_when_data_queues_and_is_remembered() -> None:
    async with world(NetworkSettings(delay_s=(0.1, 0.1)), a=1, b=1) as job:
        handlers = Handlers()
        a, b = await job.start("a-0"), await job.start("b-0", hang=handlers.hang, echo=echo)
        await a.call("b-0", "echo", (1,))
        data = a.call("b-0", "echo", (bytes(1_000_000),))
        late = a.call("b-0", "hang")
        await settle()
        lanes = [link.lane for link in a._transport.links]  # type: ignore[attr-defined]
        assert lanes == [Lane.RPC]
        job.network.settings = NetworkSettings()  # the control link is quick, what flies stays slow
        late.cancel()
        await asyncio.sleep(0.02)
        lanes = [link.lane for link in a._transport.links]  # type: ignore[attr-defined]
        assert lanes == [Lane.RPC, Lane.CONTROL]
        assert client_of(b, a).cancelled
        assert len(await data) == 1_000_000
        await asyncio.sleep(0.5)
        assert handlers.events == [], "the cancel came before its call"
        assert a.caller._channels[b.peer].window.in_flight == 0


async def test_agents_are_spoken_to_on_the_control_lane() -> None:
    async with world(a=1) as job:
        a = await job.start("a-0")
        agent = Endpoint(job.network.transport("@agent-0.00000001"))
        agent.export("echo", echo)
        async with agent:
            assert await a.call(agent.address, "echo", (1,)) == 1
            a.export("told", echo)
            assert await agent.call(a.address, "told", (2,)) == 2
            for endpoint in (a, agent):
                lanes = {link.lane for link in endpoint._transport.links}  # type: ignore[attr-defined]
                assert lanes == {Lane.CONTROL}


# by seeds


class Callee:
    """Counts how often each call runs."""

    def __init__(self) -> None:
        self.ran: Counter[int] = Counter()
        self.starts: list[int] = []

    async def work(self, number: int, nap: float) -> int:
        self._note(number)
        if nap:
            await asyncio.sleep(nap)
        return number

    def plain(self, number: int, nap: float) -> int:
        self._note(number)
        return number

    async def fails(self, number: int, nap: float) -> int:
        self._note(number)
        raise KeyError(number)

    def _note(self, number: int) -> None:
        self.ran[number] += 1
        self.starts.append(number)


async def storm(job: World, dice: random.Random, a: Endpoint, b: Endpoint) -> None:
    """Cut and part the network, for at most a second at a time."""
    for _ in range(dice.randrange(1, 8)):
        await asyncio.sleep(dice.uniform(0, 1.5))
        job.network.part([a.peer], [b.peer])
        await asyncio.sleep(dice.choice([0, 0, dice.uniform(0, 1)]))
        job.network.heal()


@pytest.mark.parametrize("seed", range(60))
async def test_whatever_the_network_does_no_call_runs_twice_and_each_ends_once(seed: int) -> None:
    dice = random.Random(seed)
    settings = NetworkSettings(delay_s=(0.0, dice.choice([0.0, 0.05, 0.3])), notice_s=0.01)
    async with world(settings, a=1, b=1) as job:
        callee = Callee()
        a = await job.start("a-0")
        b = await job.start(
            "b-0",
            runner=InlineRunner(),
            work=callee.work,
            plain=callee.plain,
            fails=callee.fails,
        )
        calls: dict[int, asyncio.Future[Any]] = {}
        weather = asyncio.get_running_loop().create_task(storm(job, dice, a, b))
        for number in range(dice.randrange(1, 80)):
            method = dice.choice(["work", "work", "plain", "fails"])
            nap = dice.choice([0, 0, dice.uniform(0, 3)])
            calls[number] = a.call("b-0", method, (number, nap), timeout=dice.choice([None, 2.5]))
            if dice.random() < 0.1:
                calls[dice.randrange(number + 1)].cancel()
            if dice.random() < 0.3:
                await asyncio.sleep(dice.uniform(0, 0.4))
        await weather
        await asyncio.wait(calls.values(), timeout=60)
        twice = {number: times for number, times in callee.ran.items() if times > 1}
        assert not twice, f"seed {seed}: these ran twice: {twice}"
        for number, call in calls.items():
            assert call.done(), f"seed {seed}: {number} has not ended"
            if call.cancelled():
                continue
            error = call.exception()
            expected = (Timeout, RemoteError, PeerLostError)
            assert error is None or isinstance(error, expected), f"seed {seed}: {error!r}"
            if error is None or isinstance(error, RemoteError):
                assert callee.ran[number] == 1, f"seed {seed}: {number} was answered unheard"
            assert error is not None or call.result() == number, f"seed {seed}"
        await asyncio.sleep(5)
        assert a.statistics().outstanding == b.statistics().running == 0, f"seed {seed}"
        assert client_of(b, a).kept == {}, f"seed {seed}: answers are kept for nobody"
        channel = a.caller._channels[b.peer]
        assert channel.window.in_flight == channel.window.waiting == 0, f"seed {seed}"


@pytest.mark.parametrize("seed", range(30))
async def test_short_cuts_lose_no_call_and_keep_the_order_of_starts(seed: int) -> None:
    dice = random.Random(seed)
    async with world(NetworkSettings(delay_s=(0.0, 0.02)), a=1, b=1) as job:
        callee = Callee()
        a, b = await job.start("a-0"), await job.start("b-0", work=callee.work)
        calls = []
        for number in range(100):
            calls.append(a.call("b-0", "work", (number, 0)))
            if dice.random() < 0.05:
                cut(job, a, b)
            if dice.random() < 0.3:
                await asyncio.sleep(dice.uniform(0, 0.1))
        assert await asyncio.gather(*calls) == list(range(100)), f"seed {seed}"
        assert callee.starts == list(range(100)), f"seed {seed}"


async def test_a_call_that_no_peer_accepts_fails_alone_when_it_had_to_wait() -> None:
    async with world(a=1, b=1) as job:
        a = await job.start("a-0")
        bad, good = a.call("b-0", "x" * 600), a.call("b-0", "echo", (1,))
        await job.start("b-0", echo=echo)
        assert await good == 1
        with pytest.raises(MisuseError, match="method name"):
            await bad
        call: Outgoing = good.call  # type: ignore[attr-defined]
        assert call.parcel is None, "what was answered holds on to nothing"
