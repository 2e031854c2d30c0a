"""Runs one machine: hands it what comes in, wakes it when something is due, passes its effects on.

One turn of the driver: is the machine's `deadline()` past? then `tick`. Is something in the inbox? then
hand over one entry. Neither: wait for the inbox, at most until the deadline. The clock is read in every
turn: a driver that only waits for the inbox with a timeout never ticks while the inbox is busy.

What effects mean is up to the `perform` callback; what machines decide is up to them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from runtime.aio import Service
from runtime.errors import RuntimeFault
from runtime.machine import Call, Effect, Fail, Machine, Message

logger = logging.getLogger(__name__)

_TURNS_PER_PASS = 64
"""Turns taken before other tasks of the event loop have theirs."""

_STEP_S = 1e-6


class _Handle(NamedTuple):
    message: Message
    call: Call | None


class _Cancelled(NamedTuple):
    call: Call


class _Lost(NamedTuple):
    peer: str
    cause: str


class Driver(Service):
    """The asyncio side of one machine.

    `perform` is called on the loop's thread with each effect, in order; it must neither block nor
    raise. `clock` gives the machine's `now` in seconds (default: the loop's clock) and must advance
    at the loop's pace.
    """

    def __init__(
        self,
        machine: Machine,
        perform: Callable[[Effect], None],
        *,
        clock: Callable[[], float] | None = None,
        name: str = "driver",
    ) -> None:
        super().__init__(name)
        self._machine, self._perform, self._clock = machine, perform, clock
        self._inbox: deque[_Handle | _Cancelled | _Lost] = deque()
        self._arrived = asyncio.Event()

    @property
    def machine(self) -> Machine:
        """The machine: to be read (`why`, `dump`) between turns, never to be changed."""
        return self._machine

    def handle(self, message: Message, call: Call | None = None) -> None:
        """Post a message. An error of ours that the machine raises becomes a `Fail` of `call`."""
        self._post(_Handle(message, call))

    def cancelled(self, call: Call) -> None:
        """Post that the caller gave up."""
        self._post(_Cancelled(call))

    def lost(self, peer: str, cause: str) -> None:
        """Post that a process is gone for good."""
        self._post(_Lost(peer, cause))

    def _post(self, entry: _Handle | _Cancelled | _Lost) -> None:
        self._inbox.append(entry)
        self._arrived.set()

    async def _on_start(self) -> None:
        self.serve(self._turn_forever(), "turns")

    async def _turn_forever(self) -> None:
        clock = self._clock or asyncio.get_running_loop().time
        turns = 0
        while True:
            now = clock()
            due = self._machine.deadline()
            ticks = due is not None and due <= now
            if ticks:
                self._perform_all(self._machine.tick(now))
            if self._inbox:
                self._perform_all(self._take(self._inbox.popleft(), now))
            elif not ticks:
                # No less than a step: of a fake clock, rounding may leave less than it ever moves by.
                await self._wait(None if due is None else max(due - now, _STEP_S))
                turns = 0
                continue
            turns += 1
            if turns % _TURNS_PER_PASS == 0:
                await asyncio.sleep(0)

    async def _wait(self, seconds: float | None) -> None:
        self._arrived.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._arrived.wait()
        except TimeoutError:
            pass  # The deadline: the next turn ticks.

    def _take(self, entry: _Handle | _Cancelled | _Lost, now: float) -> list[Effect]:
        match entry:
            case _Cancelled(call):
                return self._machine.cancelled(call, now)
            case _Lost(peer, cause):
                return self._machine.lost(peer, cause, now)
            case _Handle(message, call):
                try:
                    return self._machine.handle(message, call, now)
                except RuntimeFault as error:
                    if call is None:
                        logger.warning("%s refused %s: %s", self._name, message.get("op"), error)
                        return []
                    return [Fail(call, error)]

    def _perform_all(self, effects: list[Effect]) -> None:
        for effect in effects:
            self._perform(effect)
