"""The ways to callees: names are found, channels kept, and made anew or given up when links break.

Everything that a `Caller` does before a call has left, and when it may not be answered. A name is looked up
once and kept until its process is lost; what is called meanwhile waits here, in order.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from itertools import count
from typing import Any

from runtime.errors import RuntimeFault
from runtime.peer.calls import CallTable, Outgoing
from runtime.peer.channel import TRIES, Channel, Connect, lost_error
from runtime.peer.context import PeerAddress
from runtime.peer.finding import FATE_S, Finder
from runtime.peer.flow import WINDOW_BYTES, size_of
from runtime.peer.mailbox import Mailbox
from runtime.peer.timers import Timers
from runtime.transport.base import Lane, Link, VisitedLink
from runtime.wire import messages

logger = logging.getLogger(__name__)

Target = str | PeerAddress
"""Whom to call: the name of an actor, or one start of a process."""

Spawn = Callable[[Coroutine[Any, Any, None], str], "asyncio.Task[None]"]


class _Route:
    """What is known about one name. Without a channel, `waiting` holds what is to be sent, in order."""

    __slots__ = ("channel", "gates", "name", "size", "task", "waiting")

    def __init__(self, name: str) -> None:
        self.name = name
        self.channel: Channel | None = None
        self.waiting: dict[Outgoing, None] = {}
        self.size = 0
        self.gates: list[Callable[[], None]] = []
        self.task: asyncio.Task[None] | None = None


class Routes:
    """How the callees of a process are reached. Everything is called on the loop's thread, except `full`."""

    def __init__(
        self,
        connect: Connect,
        mailbox: Mailbox,
        timers: Timers,
        finder: Finder,
        spawn: Spawn,
        *,
        control_only: bool,
    ) -> None:
        self._connect = connect
        self._mailbox = mailbox
        self._loop = mailbox.loop
        self._timers = timers
        self._finder = finder
        self._spawn = spawn
        self._control_only = control_only
        self._routes: dict[str, _Route] = {}
        self._channels: dict[str, Channel] = {}
        self._epochs = count(1)
        self._closed = False
        self.table = CallTable()
        self.sent = self.errors = 0

    # -- sending --------------------------------------------------------------------------------

    def _by_name(self, call: Outgoing, nested: bool) -> None:
        target = call.target
        route = self._routes.get(target)
        if route is None:
            route = self._routes[target] = _Route(target)
        channel = route.channel
        if channel is not None:
            call.channel = channel
            channel.send(call, nested)
            return
        route.waiting[call] = None
        route.size += call.size
        if route.task is None:
            route.task = self._spawn(self._find(route), f"find {target}")

    def _channel(self, address: PeerAddress) -> Channel:
        channel = self._channels.get(address.peer)
        if channel is None:
            control = self._control_only or address.peer.startswith("@")
            lane = Lane.CONTROL if control else Lane.RPC
            channel = Channel(address, lane, self._connect, self._loop, self._epochs, self._fail)
            self._channels[address.peer] = channel
        return channel

    def _call_off(self, call: Outgoing) -> None:
        if call.channel is not None:
            call.channel.cancel(call)
            return
        route = self._routes.get(call.target)
        if route is None or route.waiting.pop(call, call) is not None:
            return
        route.size -= call.size
        if not route.waiting and route.task is not None:
            route.task.cancel()  # nobody wants to know any more
            route.task = None

    def enter(self, peer: str) -> VisitedLink | None:
        """On a thread that visits the loop: the link by which calls to `peer` can leave at once, entered."""
        channel = self._channels.get(peer)
        link = channel.visited if channel is not None and channel.ready else None
        return link if link is not None and link.enter() else None

    def found(self, name: str) -> bool:
        """Whether it is known where the actor `name` runs now."""
        route = self._routes.get(name)
        return route is not None and route.channel is not None

    # -- room -----------------------------------------------------------------------------------

    def full(self, target: Target, size: int) -> bool:
        """From any thread: would `size` bytes more to `target` have to wait?"""
        if isinstance(target, PeerAddress):
            channel = self._channels.get(target.peer)
            return channel is not None and channel.window.full(size)
        route = self._routes.get(target)
        if route is None:
            return False
        channel = route.channel
        if channel is not None:
            return channel.window.full(size)
        return route.size > 0 and route.size + size > WINDOW_BYTES

    def when_room(self, names: Sequence[str], size: int, tell: Callable[[], None]) -> None:
        """Call `tell` when the first of `names` that is full may not be so any more; at once if none is."""
        for name in names:
            if self.full(name, size):
                route = self._routes[name]
                gates = route.gates if route.channel is None else route.channel.gates
                gates.append(tell)
                return
        tell()

    def _backlog(self, target: Target) -> str:
        if isinstance(target, PeerAddress):
            return f"{self._channels[target.peer].window}"
        route = self._routes[target]
        return (
            f"{route.channel.window}" if route.channel else f"{route.size} bytes wait for its start"
        )

    # -- finding --------------------------------------------------------------------------------

    async def _find(self, route: _Route) -> None:
        task = asyncio.current_task()
        error: RuntimeFault
        try:
            channel = self._channel(await self._finder.living(route.name))
            channel.connect()
        except RuntimeFault as fault:
            error = fault
        except Exception as failure:
            # A fault of the directory: its calls must end all the same, and no others.
            logger.exception("looking up %s failed", route.name)
            error = RuntimeFault(f"cannot look up {route.name!r}: {failure!r}")
        else:
            if route.task is task:
                for call in self._found(route, channel):
                    call.channel = channel
                    channel.send_or_refuse(call)
            return
        if route.task is task:
            for call in self._found(route, None):
                self._fail(call, error)

    def _found(self, route: _Route, channel: Channel | None) -> list[Outgoing]:
        """The search has ended; what waited for that."""
        calls, gates = list(route.waiting), route.gates
        route.channel, route.task, route.waiting, route.gates, route.size = channel, None, {}, [], 0
        for tell in gates:
            tell()
        return calls

    # -- losing ---------------------------------------------------------------------------------

    def goodbye(self, link: Link, message: messages.Goodbye) -> None:
        """The callee leaves and answers no more."""
        channel = self._channels.get(link.peer)
        if channel is not None and channel.lost(link):
            self._finder.doubt(link.peer)
            self._end(channel, message.reason, next_start=True)
            link.close()

    def link_lost(self, link: Link, reason: str) -> None:
        """An outbound link has ended."""
        channel = self._channels.get(link.peer)
        if channel is None or not channel.lost(link):
            return
        logger.debug("link to %s lost: %s", link.peer, reason)
        self._finder.doubt(link.peer)
        self._forget(channel)
        if channel.recovering or self._closed:
            return
        if channel.window.waiting or self.table.sent_by(channel):
            channel.recovering = True
            self._spawn(self._recover(channel), f"link to {link.peer}")

    def lose(self, peer: str, cause: str) -> None:
        """The process `peer` is dead, for certain."""
        self._finder.died(peer, cause)
        channel = self._channels.pop(peer, None)
        if channel is not None:
            self._end(channel, cause, next_start=True)
            channel.close()

    def ask_fate(self, peer: str) -> None:
        """A link to `peer` broke: find out whether it is dead."""
        if not self._closed:
            self._spawn(self._finder.fate(peer), f"fate of {peer}")

    async def _recover(self, channel: Channel) -> None:
        """Go on with the calls of a lost link by a new one, while their callee may live."""
        fate = self._spawn(self._finder.fate(channel.peer), f"fate of {channel.peer}")
        try:
            async with asyncio.timeout(FATE_S):
                back = await self._reopen(channel)
                if back and any(call.items for call in self.table.sent_by(channel)):
                    await asyncio.wait({fate})
        except (TimeoutError, RuntimeFault) as error:
            logger.debug("the link to %s could not be made anew: %r", channel.peer, error)
            back = False
        finally:
            channel.recovering = False
        if self._channels.get(channel.peer) is not channel:
            return
        if back:
            for call in self.table.sent_by(channel):
                if call.items is not None and call.tries:
                    self._fail(call, lost_error(call, "connection lost"))
        else:
            channel.close()
            self._end(channel, "connection lost", next_start=False)

    async def _reopen(self, channel: Channel) -> bool:
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(0.02 * 2**attempt)
            if self._channels.get(channel.peer) is not channel:
                return False
            calls = self.table.sent_by(channel)
            for call in calls:
                if call.items is not None:
                    call.tries += 1
            if await channel.reopen([call for call in calls if call.items is None]):
                return True
        return False

    def _end(self, channel: Channel, cause: str, *, next_start: bool) -> None:
        """No call by `channel` is answered any more. `next_start`: those that were not sent, and those
        that may be made twice, go to the next start of their callee."""
        self._forget(channel)
        again = next_start and not self._closed
        waiting = channel.withdraw_all()
        for call in self.table.sent_by(channel):
            if again and call.named and call.retry:
                call.retry -= 1
                self.table.renew(call)
                call.size = size_of(*call.parcel)
                self._by_name(call, False)
            else:
                self._fail(call, lost_error(call, cause))
        for call in waiting:
            if again and call.named:
                call.channel = None
                self._by_name(call, False)
            else:
                self._fail(call, lost_error(call, cause))
        channel.open_gates()

    def _forget(self, channel: Channel) -> None:
        for route in self._routes.values():
            if route.channel is channel:
                route.channel = None

    def _fail(self, call: Outgoing, error: Exception) -> None:
        if not call.id or self._take(call):
            self.errors += 1
            call.settle().failed(call, error)

    def _take(self, call: Outgoing) -> bool:
        if not self.table.drop(call):
            return False
        self._timers.forget(call)
        return True
