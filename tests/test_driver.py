"""The driver: hands over in order, ticks in time, passes effects on. In fake time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from runtime.driver import Driver
from runtime.errors import MisuseError
from runtime.machine import Call, Effect, Emit, Fail, Message, Reply

pytestmark = pytest.mark.looptime


class _Alarm:
    """Rings when it is told to, echoes what it is asked, and remembers what happened to it."""

    def __init__(self, ring_at: list[float] | None = None) -> None:
        self.ring_at = list(ring_at or [])
        self.heard: list[Any] = []

    def handle(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        if message["op"] == "refuse":
            raise MisuseError("no")
        if message["op"] == "break":
            raise ZeroDivisionError
        if message["op"] == "ring in":
            self.ring_at.append(now + message["seconds"])
        self.heard.append((message["op"], now))
        return [] if call is None else [Reply(call, message["op"])]

    def tick(self, now: float) -> list[Effect]:
        due = [at for at in self.ring_at if at <= now]
        self.ring_at = [at for at in self.ring_at if at > now]
        return [Emit({"kind": "ring", "due": at, "at": now}) for at in due]

    def deadline(self) -> float | None:
        return min(self.ring_at, default=None)

    def cancelled(self, call: Call, now: float) -> list[Effect]:
        self.heard.append(("cancelled", call))
        return []

    def lost(self, peer: str, cause: str, now: float) -> list[Effect]:
        self.heard.append(("lost", peer, cause))
        return []

    def why(self, call: Call) -> str | None:
        return None

    def dump(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None: ...


async def test_answers_and_refusals_reach_the_callback_in_order() -> None:
    effects: list[Effect] = []
    async with Driver(_Alarm(), effects.append) as driver:
        driver.handle({"op": "a"}, Call("c", 1))
        driver.handle({"op": "refuse"}, Call("c", 2))
        driver.handle({"op": "b"}, Call("c", 3))
        await asyncio.sleep(1)
    assert effects[0] == Reply(Call("c", 1), "a")
    assert isinstance(effects[1], Fail)
    assert str(effects[1].error) == "no"
    assert effects[2] == Reply(Call("c", 3), "b")


async def test_a_refused_message_without_a_caller_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Driver(_Alarm(), lambda _: None) as driver:
        driver.handle({"op": "refuse"})
        await asyncio.sleep(1)
    assert "refused refuse: no" in caplog.text


async def test_cancelled_and_lost_stand_in_line_with_messages() -> None:
    machine = _Alarm()
    async with Driver(machine, lambda _: None) as driver:
        driver.handle({"op": "a"})
        driver.cancelled(Call("c", 1))
        driver.lost("p", "SIGKILL")
        await asyncio.sleep(1)
    assert machine.heard == [("a", 0), ("cancelled", Call("c", 1)), ("lost", "p", "SIGKILL")]


async def test_it_sleeps_until_the_deadline_and_then_ticks() -> None:
    effects: list[Any] = []
    async with Driver(_Alarm([3600.0]), effects.append):
        await asyncio.sleep(3599)
        assert effects == []
        await asyncio.sleep(2)
    assert [effect.event["at"] for effect in effects] == [pytest.approx(3600)]


async def test_a_message_can_move_the_deadline_forward() -> None:
    effects: list[Any] = []
    async with Driver(_Alarm([3600.0]), effects.append) as driver:
        await asyncio.sleep(1)
        driver.handle({"op": "ring in", "seconds": 5})
        await asyncio.sleep(6)
    assert [effect.event["at"] for effect in effects] == [pytest.approx(6)]


async def test_a_busy_inbox_does_not_starve_the_tick() -> None:
    # Each message posts the next, so the inbox is never empty, while the clock goes on.
    effects: list[Any] = []
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.01
        return now

    machine = _Alarm([1.0, 2.0, 3.0])

    def perform(effect: Effect) -> None:
        effects.append(effect)
        if isinstance(effect, Reply) and effect.call.id < 2000:
            driver.handle({"op": "busy"}, Call("c", effect.call.id + 1))

    async with Driver(machine, perform, clock=clock) as driver:
        driver.handle({"op": "busy"}, Call("c", 0))
        while len(machine.heard) <= 2000:  # noqa: ASYNC110 - passes of the loop are counted
            await asyncio.sleep(0)
    rings = [effect.event for effect in effects if isinstance(effect, Emit)]
    assert [ring["due"] for ring in rings] == [1.0, 2.0, 3.0]
    assert all(ring["at"] - ring["due"] < 0.02 for ring in rings)


async def test_a_busy_inbox_leaves_room_for_other_tasks() -> None:
    def perform(effect: Effect) -> None:
        driver.handle({"op": "again"}, Call("c", 0))

    async with Driver(_Alarm(), perform) as driver:
        driver.handle({"op": "again"}, Call("c", 0))
        for _ in range(100):
            await asyncio.sleep(0)  # Would not come back if the driver never yielded.


async def test_a_machine_that_is_always_due_still_gets_its_messages() -> None:
    class Restless(_Alarm):
        def deadline(self) -> float | None:
            return 0.0

    machine = Restless()
    async with Driver(machine, lambda _: None) as driver:
        driver.handle({"op": "a"})
        for _ in range(10):
            await asyncio.sleep(0)
    assert machine.heard == [("a", 0)]


async def test_a_wrong_machine_fails_the_driver_instead_of_limping_on() -> None:
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the block is what is tested
        async with Driver(_Alarm(), lambda _: None) as driver:
            driver.handle({"op": "break"})
            await asyncio.sleep(100)


async def test_the_machine_can_be_looked_at() -> None:
    machine = _Alarm()
    async with Driver(machine, lambda _: None) as driver:
        assert driver.machine is machine
