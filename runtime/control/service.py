"""The control plane at work in the process that hosts it: questions in, effects out.

One `Driver` runs the `Plane`. What comes in by RPC, from the hosting agent itself and from the clock all
goes through the driver's inbox, in order. With one voter an entry is applied when it is taken; a
replicated log will stand between the two and change nothing above or below.

The service beats for its own agent. Its clock leaves out the time during which this process did not run
(a stopped process, a suspended machine): nobody loses a lease because the control plane slept.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from random import Random
from typing import Any

from runtime.aio import Backoff, Service
from runtime.control.asking import Asker
from runtime.control.messages import error_state
from runtime.control.plane import Plane
from runtime.driver import Driver
from runtime.errors import Closed, PeerLostError, RuntimeFault
from runtime.machine import Call, Effect, Emit, Fail, Message, Reply, Send
from runtime.peer.context import PeerAddress
from runtime.peer.endpoint import Endpoint, current_call

logger = logging.getLogger(__name__)

_ANSWER_FIRST_S = 0.02
_STALL_INTERVALS = 3
"""A gap of more than this many heartbeats means that this process did not run."""


class LogClock:
    """Seconds that pass only while this process runs. It must be read at least every `interval`."""

    def __init__(self, read: Callable[[], float], interval: float) -> None:
        self._read, self._interval = read, interval
        self._last: float | None = None
        self._lag = 0.0

    def __call__(self) -> float:
        raw = self._read()
        gap = 0.0 if self._last is None else raw - self._last
        if gap > _STALL_INTERVALS * self._interval:
            self._lag += gap - self._interval
            logger.warning("the control plane did not run for %.1f s; leases are extended", gap)
        self._last = raw
        return raw - self._lag


class _Courier:
    """Takes messages to one agent, in their order; what it says to them goes to `answered`."""

    def __init__(
        self, endpoint: Endpoint, agent: PeerAddress, answered: Callable[[Any], None]
    ) -> None:
        self._endpoint, self._agent, self._answered = endpoint, agent, answered
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None

    async def run(self) -> None:
        number, backoff = 0, Backoff(Random(self._agent.peer))
        while True:
            message = dict(await self.messages.get())
            number += 1
            while True:
                try:
                    told = (number, message)
                    answer = await self._endpoint.call(self._agent, "control.told", told)
                    self._answered(answer)
                except PeerLostError:  # until membership gives the agent up
                    await backoff.wait()
                    continue
                except RuntimeFault as error:
                    logger.error("%s did not take %s: %s", self._agent.peer, message, error)
                backoff.reset()
                self.messages.task_done()
                break


class ControlService(Service):
    """Serves the plane at `endpoint`.

    `me` is the hosting agent's peer id ("@agent-0.<hex8>"). `on_send` gets what machines send to that
    agent, `on_emit` every event; both are called on the loop and must not block. What machines send to
    other agents is told to these one after the other, each until it was taken: nothing is lost with
    a link, or overtaken. `heartbeat_interval`: seconds.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        plane: Plane,
        *,
        me: str,
        on_send: Callable[[Message], None] | None = None,
        on_emit: Callable[[Message], None] | None = None,
        heartbeat_interval: float = 1.0,
    ) -> None:
        super().__init__("control")
        self._endpoint, self._plane, self._me = endpoint, plane, me
        self._on_send, self._on_emit = on_send, on_emit
        self._heartbeat_interval = heartbeat_interval
        self.progress: Callable[[], Message] = dict
        """How far the workers of the hosting agent are: asked at each heartbeat."""
        self.answered: Callable[[Any], None] = lambda answer: None
        """Gets what an agent says to a message that it was sent, when it has taken it."""
        self._driver: Driver | None = None
        self._waiting: dict[Call, list[asyncio.Future[Any]]] = {}
        self._couriers: dict[str, _Courier] = {}
        self._asker = Asker(self._post, self._give_up, Random(me))

    @property
    def plane(self) -> Plane:
        """The plane: to be read between turns, never to be changed."""
        return self._plane

    async def ask(self, machine: str, message: Message, timeout: float | None = None) -> Any:
        """As `ControlClient.ask`, for the hosting agent."""
        return await self._asker.ask(machine, message, timeout)

    def lost(self, peer: str, cause: str) -> None:
        """A process is gone for good, and nobody else will say so (an agent, or a client that is no
        member)."""
        self._running_driver().lost(peer, cause)

    async def flush(self, timeout: float) -> None:
        """Wait until the living agents have taken all that they were sent, at most `timeout` seconds."""
        waits = [
            self.spawn(courier.messages.join(), f"flush to {peer}")
            for peer, courier in self._couriers.items()
        ]
        if waits:
            await asyncio.wait(waits, timeout=timeout)

    def why(self, call: Call) -> str | None:
        """In words, what an unanswered call waits for."""
        return self._plane.why(call)

    # -- life ---------------------------------------------------------------------------------

    async def _on_start(self) -> None:
        clock = LogClock(asyncio.get_running_loop().time, self._heartbeat_interval)
        self._driver = Driver(self._plane, self._perform, clock=clock, name="control plane")
        await self._driver.start()
        self.serve(self._driver.wait(), "plane")
        self.serve(self._beat(), "heartbeat")
        self._endpoint.export("control.ask", self._asked)
        self._endpoint.export("control.cancelled", self._cancelled)

    async def _on_close(self) -> None:
        if self._driver is not None:
            await self._driver.close()
        closed = Closed("the control plane has closed")
        for future in [future for futures in self._waiting.values() for future in futures]:
            if not future.done():
                future.set_exception(closed)

    async def _beat(self) -> None:
        if "membership" not in self._plane.machines:
            await asyncio.Event().wait()
        beat = {"op": "heartbeat", "agent": self._me}
        while True:
            message = {**beat, "progress": self.progress()}
            command = {"op": "ask", "machine": "membership", "message": message}
            self._running_driver().handle(command)
            await asyncio.sleep(self._heartbeat_interval)

    def _running_driver(self) -> Driver:
        if self._driver is None:
            raise Closed("the control plane has not been started")
        return self._driver

    # -- questions ----------------------------------------------------------------------------

    def _post(self, number: int, command: Message) -> asyncio.Future[Any]:
        return self._enter(Call(self._me, number), command)

    def _give_up(self, number: int) -> None:
        if self.running:
            self._running_driver().cancelled(Call(self._me, number))

    def _enter(self, call: Call, command: Message) -> asyncio.Future[Any]:
        """Hand a command to the plane; its answer will settle the future."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if not self.running:
            future.set_exception(Closed("the control plane has closed"))
            return future
        self._waiting.setdefault(call, []).append(future)
        future.add_done_callback(lambda done: self._forget(call, done))
        self._running_driver().handle(command, call)
        return future

    def _forget(self, call: Call, future: asyncio.Future[Any]) -> None:
        futures = self._waiting.get(call, [])
        if future in futures:
            futures.remove(future)
        if not futures:
            self._waiting.pop(call, None)

    async def _asked(self, number: int, command: dict[str, Any]) -> Any:
        # When the caller's link breaks this handler is cancelled, but not the question: the caller
        # may ask again by the same number. What ends a question is `cancelled`, or the caller's death.
        peer = current_call().peer
        return await self._enter(Call(peer, number), command)

    async def _cancelled(self, number: int) -> None:
        self._running_driver().cancelled(Call(current_call().peer, number))

    # -- effects ------------------------------------------------------------------------------

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Reply(call, value):
                self._settle(call, ["value", value])
            case Fail(call, error):
                self._settle(call, ["error", error_state(error)])
            case Send(to, message):
                self._send(to, message)
            case Emit(event):
                self._note(event)

    def _settle(self, call: Call, answer: list[Any]) -> None:
        for future in self._waiting.pop(call, []):
            if not future.done():
                future.set_result(answer)

    def _send(self, to: str, message: Message) -> None:
        if to == self._me:
            if self._on_send is not None:
                self._on_send(message)
        elif to in self._couriers:
            self._couriers[to].messages.put_nowait(message)
        else:
            logger.info("no agent %s (any more) to send %s to", to, message.get("op"))

    def _note(self, event: Message) -> None:
        if event.get("kind") == "agent" and event["peer"] != self._me:
            address = PeerAddress(
                event["peer"], event["address"], "@agent", event["node_rank"], event["host"]
            )
            courier = self._couriers[address.peer] = _Courier(
                self._endpoint, address, self.answered
            )
            courier.task = self.serve(courier.run(), f"courier to {address.peer}")
        elif event.get("kind") == "lost":
            if (gone := self._couriers.pop(event["peer"], None)) is not None and gone.task:
                gone.task.cancel()
            # Not in this turn: the answer to its own `leave` is still on its way out.
            loop = asyncio.get_running_loop()
            loop.call_later(_ANSWER_FIRST_S, self._endpoint.lose, event["peer"], event["cause"])
        elif event.get("kind") == "refused":
            logger.warning("the control plane refused a message: %s", event["reason"])
        if self._on_emit is not None:
            self._on_emit(event)
