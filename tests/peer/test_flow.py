"""Credits in bytes and in items: the sums by calling functions, what they bound over the memory network."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import Full, PeerLostError, Timeout
from runtime.peer.endpoint import Endpoint
from runtime.peer.flow import (
    ITEM_BYTES,
    ITEMS,
    RECORD_BYTES,
    TELL_BYTES,
    WINDOW_BYTES,
    Credits,
    ItemsUsed,
    ItemWindow,
    Window,
    size_of,
)
from tests.peer.support import Handlers, InlineRunner, World, echo, settle, world

MIB = 1024**2


def test_a_record_counts_its_body_its_buffers_and_itself() -> None:
    assert size_of(b"body", ()) == RECORD_BYTES + 4
    assert size_of(b"", [b"12", memoryview(bytes(32)).cast("d")]) == RECORD_BYTES + 34


def test_a_window_admits_up_to_its_limit_and_one_larger_record_alone() -> None:
    window = Window(100)
    assert window.admits(1000), "nothing else is under way"
    window.cast(60)
    assert window.admits(40)
    assert not window.admits(41)
    window.waiting = 1
    assert window.full(1), "what waits comes first"


def test_casts_are_credited_by_their_total_which_never_counts_twice() -> None:
    window = Window(100)
    for _ in range(3):
        window.cast(30)
    for total, left in ((30, 60), (30, 60), (90, 0), (500, 0)):
        window.casts_over(total)
        assert window.in_flight == left


def test_a_call_that_was_given_up_takes_its_place_until_the_peer_noticed() -> None:
    window = Window(100)
    window.in_flight = 50
    window.owe(7, 50)
    assert window.in_flight == 50
    window.settled(8)
    window.settled(7)
    window.settled(7)
    assert window.in_flight == 0


def test_a_new_link_has_only_the_calls_on_its_way_that_are_still_awaited() -> None:
    window = Window(100)
    window.cast(30)
    window.in_flight += 20
    window.owe(7, 20)
    window.restart(10)
    window.settled(7)
    window.casts_over(0)
    assert window.in_flight == 10


def test_credit_is_told_at_once_when_it_is_much_and_each_only_once() -> None:
    credits = Credits()
    assert credits.take() is None
    assert not credits.add(5, 10)
    assert credits.add(0, TELL_BYTES)
    assert credits.take() == (TELL_BYTES, [5])
    assert credits.take() is None
    credits.add(0, 3)
    assert credits.take() == (TELL_BYTES + 3, [])
    credits.add(0, 3)
    credits.restart()
    assert credits.take() is None


def test_a_producer_stops_at_so_many_items_or_bytes_and_goes_on_when_they_are_used() -> None:
    window = ItemWindow()
    for _ in range(ITEMS):
        assert window.open()
        window.sent(1)
    assert not window.open()
    window.used(1)
    assert window.open()
    window.sent(ITEM_BYTES)
    assert not window.open()
    window.used(10_000)
    assert window.open()


@given(st.lists(st.integers(1, ITEM_BYTES * 2), max_size=200), st.randoms(use_true_random=False))
def test_a_stream_never_stands_still_while_its_consumer_takes_items(
    sizes: Sequence[int], dice: Any
) -> None:
    producer, consumer = ItemWindow(), ItemsUsed()
    left, untaken, outstanding = list(sizes), 0, 0
    while left or untaken:
        if left and producer.open():
            size = left.pop(0)
            producer.sent(size)
            consumer.came(size)
            untaken += 1
            outstanding += 1
            assert outstanding <= ITEMS + ITEMS // 4
            continue
        assert untaken, "it stands still"
        taken = dice.randint(1, untaken)
        untaken -= taken
        outstanding -= taken
        total = consumer.use(taken)
        if total is not None:
            producer.used(total)


# over the network


class Slow:
    """Handlers that take their time, and what they have seen."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.gate = asyncio.Event()

    async def one(self, number: int, data: bytes) -> int:
        await asyncio.sleep(0.01)
        self.seen.append(number)
        return number

    async def hold(self, number: int, data: bytes) -> int:
        await self.gate.wait()
        self.seen.append(number)
        return number

    def plain(self, number: int, data: bytes) -> int:
        self.seen.append(number)
        return number


async def slow_pair(job: World) -> tuple[Endpoint, Endpoint, Slow]:
    slow = Slow()
    a = await job.start("a-0")
    b = await job.start("b-0", runner=InlineRunner(), plain=slow.plain, echo=echo)
    b.export("one", slow.one, concurrency=1)
    b.export("hold", slow.hold, concurrency=1)
    return a, b, slow


def queued_at(callee: Endpoint) -> int:
    """Bytes of calls that have come in and not begun."""
    lanes = callee._handlers._execution._lanes.values()
    return sum(call.size for lane in lanes for call in lane.queued())


def in_flight(caller: Endpoint, callee: Endpoint) -> int:
    return caller.caller._channels[callee.peer].window.in_flight


@pytest.mark.looptime
@pytest.mark.parametrize("cast", [False, True])
async def test_what_queues_at_a_slow_receiver_stays_within_the_window(cast: bool) -> None:
    async with world(a=1, b=1) as job:
        a, b, slow = await slow_pair(job)
        await a.call("b-0", "echo", (1,))
        calls, refused = [], 0
        data, count = bytes(MIB), 60
        for number in range(count):
            if not cast:
                calls.append(a.call("b-0", "one", (number, data)))
                continue
            while True:
                try:
                    a.cast("b-0", "one", (number, data))
                    break
                except Full:
                    refused += 1
                    await asyncio.sleep(0.01)
        most = 0
        while len(slow.seen) < count:
            most = max(most, queued_at(b))
            await asyncio.sleep(0.005)
        assert WINDOW_BYTES / 2 < most <= WINDOW_BYTES + MIB + 2 * RECORD_BYTES
        assert slow.seen == list(range(count))
        assert not cast or refused
        await asyncio.gather(*calls)
        await asyncio.sleep(1)
        assert in_flight(a, b) == 0


@pytest.mark.looptime
async def test_one_record_larger_than_the_window_goes_alone() -> None:
    async with world(a=1, b=1) as job:
        a, b, slow = await slow_pair(job)
        slow.gate.set()
        calls = [a.call("b-0", "hold", (n, bytes(20 * MIB))) for n in range(3)]
        assert await asyncio.gather(*calls) == [0, 1, 2]
        assert slow.seen == [0, 1, 2]
        assert in_flight(a, b) == 0


@pytest.mark.looptime
async def test_a_call_that_runs_for_long_gives_its_credit_back_when_it_starts() -> None:
    async with world(a=1, b=1) as job:
        a, b, slow = await slow_pair(job)
        b.export("park", slow.hold)
        calls = [a.call("b-0", "park", (n, bytes(MIB))) for n in range(50)]
        await asyncio.sleep(1)
        assert b.statistics().running == 50, "all run, though none has answered"
        assert in_flight(a, b) == 0
        slow.gate.set()
        assert await asyncio.gather(*calls) == list(range(50))
        assert in_flight(a, b) == 0


@pytest.mark.looptime
async def test_what_was_cancelled_or_timed_out_gives_its_credit_back() -> None:
    async with world(a=1, b=1) as job:
        a, b, slow = await slow_pair(job)
        calls = [a.call("b-0", "hold", (n, bytes(MIB)), timeout=5) for n in range(30)]
        await asyncio.sleep(1)
        for call in calls[5:10]:
            call.cancel()
        slow.gate.clear()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(one, (Timeout, asyncio.CancelledError)) for one in found)
        await asyncio.sleep(1)
        window = a.caller._channels[b.peer].window
        assert (window.in_flight, window.waiting) == (0, 0)
        slow.gate.set()
        assert await a.call("b-0", "hold", (99, bytes(MIB))) == 99


@pytest.mark.looptime
async def test_a_call_given_up_while_it_waits_for_room_is_never_sent() -> None:
    async with world(a=1, b=1) as job:
        a, _, slow = await slow_pair(job)
        await a.call("b-0", "echo", (1,))
        calls = [a.call("b-0", "hold", (n, bytes(4 * MIB))) for n in range(8)]
        await settle()
        late = calls[-1]
        assert "is behind with what it was sent" in a.caller.why(late.call)  # type: ignore[attr-defined]
        late.cancel()
        slow.gate.set()
        assert await asyncio.gather(*calls[:-1]) == list(range(7))
        await asyncio.sleep(1)
        assert slow.seen == list(range(7))


@pytest.mark.looptime
async def test_what_a_lost_peer_held_is_free_and_what_waited_goes_to_its_next_start() -> None:
    async with world(a=1, b=1) as job:
        a, b, _ = await slow_pair(job)
        await a.call("b-0", "echo", (1,))
        calls = [a.call("b-0", "hold", (n, bytes(4 * MIB))) for n in range(8)]
        await asyncio.sleep(1)
        await job.kill(b)
        await asyncio.sleep(1)
        slow = Slow()
        slow.gate.set()
        await job.start("b-0", hold=slow.hold)
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(one, PeerLostError) for one in found[:3])
        assert [one for one in found if not isinstance(one, PeerLostError)] == slow.seen
        assert slow.seen[-1] == 7
        assert a.statistics().unsent_bytes == 0


@pytest.mark.looptime
async def test_calls_to_and_fro_go_on_although_both_windows_are_full() -> None:
    async with world(a=1, b=1) as job:
        ends: dict[str, Endpoint] = {}
        gate = asyncio.Event()

        async def bounce(left: int) -> int:
            me, other = ("a-0", "b-0") if left % 2 else ("b-0", "a-0")
            return left if not left else 1 + await ends[me].call(other, "bounce", (left - 1,)) * 1

        async def hold(data: bytes) -> None:
            await gate.wait()

        for name in ("a-0", "b-0"):
            ends[name] = await job.start(name, bounce=bounce)
            ends[name].export("hold", hold, concurrency=1)
        held = [
            ends[me].call(other, "hold", (bytes(MIB),))
            for me, other in (("a-0", "b-0"), ("b-0", "a-0"))
            for _ in range(40)
        ]
        await asyncio.sleep(1)
        for me, other in (("a-0", "b-0"), ("b-0", "a-0")):
            window = ends[me].caller._channels[ends[other].peer].window
            assert window.full(1)
        outside = ends["a-0"].call("a-0", "bounce", (1,))  # to itself: its own window is free
        await asyncio.sleep(1)
        assert outside.done(), "what a handler calls is not held back"
        gate.set()
        await asyncio.gather(*held)
        assert await ends["a-0"].call("b-0", "bounce", (10,)) == 10


def cast_many(endpoint: Endpoint, count: int) -> None:
    for number in range(count):
        endpoint.cast("b-0", "one", (number, bytes(MIB)))


@pytest.mark.looptime
async def test_casts_to_a_callee_that_still_starts_are_bounded_too() -> None:
    async with world(a=1, b=1) as job:
        a = await job.start("a-0")
        with pytest.raises(Full, match=r"b-0\.one\(\).*bytes wait for its start"):
            cast_many(a, 100)
        handlers = Handlers()
        await job.start("b-0", one=handlers.hang)
        await settle()
        a.cast("b-0", "one")


@pytest.mark.looptime
async def test_windows_by_the_control_lane_have_no_limit() -> None:
    async with world(a=1) as job:
        a = await job.start("a-0")
        agent = Endpoint(job.network.transport("@agent-0.00000001"))
        slow = Slow()
        agent.export("hold", slow.hold, concurrency=1)
        async with agent:
            calls = [a.call(agent.address, "hold", (n, bytes(4 * MIB))) for n in range(10)]
            await settle()
            assert agent.statistics().running == 10
            slow.gate.set()
            await asyncio.gather(*calls)
