"""Making calls: finding the callee, sending in order, and settling each call exactly once.

A name is looked up once and kept until its process is lost; what is called meanwhile waits here, in
order. A call is settled by its answer, its deadline, its caller's cancel, or the loss of the callee;
whatever comes after that finds nobody waiting. When a link breaks, the directory is asked what became
of the process, so that the error says "SIGKILL" and not only "connection lost".
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from runtime.errors import Closed, MisuseError, PeerLostError, RuntimeFault, Timeout, WireError
from runtime.peer.calls import Answered, CallTable, Outgoing
from runtime.peer.context import Directory, PeerAddress
from runtime.peer.timers import Timers
from runtime.transport.base import Link
from runtime.wire import codec, messages
from runtime.wire.codec import Encoded

logger = logging.getLogger(__name__)

FATE_S = 2.0
"""How long a broken link's calls wait for the cause of the process's death."""

_LOOK_AGAIN_S = 0.05
_DEAD_KEPT = 4096

Target = str | PeerAddress
"""Whom to call: the name of an actor, or one start of a process."""

Spawn = Callable[[Coroutine[Any, Any, None], str], "asyncio.Task[None]"]


class CallFuture(asyncio.Future[Any]):
    """The answer to a call, on the loop. Cancelling it cancels the call."""

    __slots__ = ("_caller", "call")

    def __init__(self, caller: Caller, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._caller = caller
        self.call: Outgoing | None = None

    def cancel(self, msg: Any = None) -> bool:
        if not super().cancel(msg):
            return False
        if self.call is not None:
            self._caller.abandon(self.call)
        return True

    def answered(self, call: Outgoing, value: Any) -> None:
        if not self.done():
            self.set_result(value)

    def failed(self, call: Outgoing, error: Exception) -> None:
        if not self.done():
            self.set_exception(error)


class _OneWay:
    """Nobody waits for the answer: a cast that cannot be delivered is told to the log."""

    def answered(self, call: Outgoing, value: Any) -> None:
        raise AssertionError("a one-way call has no answer")

    def failed(self, call: Outgoing, error: Exception) -> None:
        logger.warning("one-way call %r was not delivered: %s", call, error)


_ONE_WAY = _OneWay()


class _Route:
    """What is known about one name. Without a link, `waiting` holds what is to be sent, in order."""

    __slots__ = ("address", "link", "name", "task", "waiting")

    def __init__(self, name: str) -> None:
        self.name = name
        self.address: PeerAddress | None = None
        self.link: Link | None = None
        self.waiting: dict[Outgoing, None] = {}
        self.task: asyncio.Task[None] | None = None


class Caller:
    """The calls that this process makes. Everything is called on the loop's thread."""

    def __init__(
        self,
        connect: Callable[[PeerAddress], Link],
        loop: asyncio.AbstractEventLoop,
        timers: Timers,
        directory: Directory | None,
        spawn: Spawn,
    ) -> None:
        self._connect = connect
        self._loop = loop
        self._timers = timers
        self._directory = directory
        self._spawn = spawn
        self._routes: dict[str, _Route] = {}
        self._dead: dict[str, str] = {}
        self._doubtful: dict[str, None] = {}
        self._closed = False
        self.table = CallTable()
        self.sent = self.errors = 0

    # -- calling ------------------------------------------------------------------------------

    def call(
        self, target: Target, method: str, parcel: Encoded, waiter: Answered, timeout: float | None
    ) -> Outgoing:
        """Send a call, or keep it until its callee is found. Raises `MisuseError` and `Closed`."""
        now = self._loop.time()
        call = self.table.open(self._checked_name(target), method, waiter, now)
        call.parcel = parcel
        if timeout is not None:
            call.timeout, call.deadline = timeout, now + timeout
            self._timers.add(call)
        try:
            self._dispatch(target, call)
        except BaseException:
            self._take(call)
            raise
        return call

    def cast(self, target: Target, method: str, parcel: Encoded) -> None:
        """Send a one-way call. Raises `MisuseError` and `Closed`."""
        call = Outgoing(0, self._checked_name(target), method, _ONE_WAY, self._loop.time())
        call.parcel = parcel
        self._dispatch(target, call)

    def abandon(self, call: Outgoing) -> None:
        """Nobody waits for `call` any more. Nothing, when it is over."""
        if self._take(call):
            call.settle()
            self._call_off(call)

    def due(self, call: Outgoing) -> None:
        """The deadline of `call` has passed."""
        if not self.table.drop(call):
            return
        reason = f"{call!r} was not answered within {call.timeout:g} s: {self.why(call)}"
        self._call_off(call)
        self.errors += 1
        call.settle().failed(call, Timeout(reason, self._loop.time() - call.started))

    def why(self, call: Outgoing) -> str:
        """What an unanswered call waits for, in words."""
        if call.link is None:
            return f"{call.target} is starting, restarting or not known yet; the call was not sent"
        for_s = self._loop.time() - call.started
        return (
            f"it was made {for_s:.1f} s ago; {call.target} runs it, or has it queued behind others"
        )

    def _checked_name(self, target: Target) -> str:
        if self._closed:
            raise Closed("this process has closed its endpoint")
        if isinstance(target, PeerAddress):
            return target.peer.rpartition(".")[0] or target.peer
        if self._directory is None:
            raise MisuseError(
                f"{target!r} is a name, and this endpoint has no directory to look it up in; "
                "call a PeerAddress"
            )
        return target

    def _dispatch(self, target: Target, call: Outgoing) -> None:
        self.sent += 1
        if isinstance(target, PeerAddress):
            self._send(self._connect(target), target, call)
            return
        route = self._routes.get(target)
        if route is None:
            route = self._routes[target] = _Route(target)
        if route.link is not None:
            self._send(route.link, route.address, call)
            return
        route.waiting[call] = None
        if route.task is None:
            route.task = self._spawn(self._find(route), f"find {target}")

    def _send(self, link: Link, address: PeerAddress | None, call: Outgoing) -> None:
        body, buffers = call.parcel
        call.parcel = None
        if not call.id:
            link.send(messages.encode_cast(messages.Cast(call.method, body, buffers)))
            return
        call.link, call.address = link, address
        left = None if call.deadline is None else max(0.0, call.deadline - self._loop.time())
        link.send(messages.encode_call(messages.Call(call.id, call.method, body, buffers, left)))

    def _call_off(self, call: Outgoing) -> None:
        if call.link is not None:
            call.link.send(messages.encode_cancel(call.id))
            return
        route = self._routes.get(call.target)
        if route is None or route.waiting.pop(call, call) is not None:
            return
        if not route.waiting and route.task is not None:
            route.task.cancel()  # nobody wants to know any more
            route.task = None

    # -- finding ------------------------------------------------------------------------------

    async def _find(self, route: _Route) -> None:
        task = asyncio.current_task()
        try:
            address = await self._living(route.name)
            link = self._connect(address)
        except RuntimeFault as error:
            self._not_found(route, task, error)
        except Exception as error:
            # A fault of the directory: its calls must end all the same, and no others.
            logger.exception("looking up %s failed", route.name)
            self._not_found(route, task, RuntimeFault(f"cannot look up {route.name!r}: {error!r}"))
        else:
            if route.task is not task:
                return
            route.task, route.address, route.link = None, address, link
            waiting, route.waiting = route.waiting, {}
            for call in waiting:
                self._send(link, address, call)

    async def _living(self, name: str) -> PeerAddress:
        # The directory may not have heard yet what we know: that this start of the process is dead,
        # or that its link broke.
        assert self._directory is not None
        while True:
            address = await self._directory.resolve(name)
            if address.peer in self._doubtful and address.peer not in self._dead:
                await self._fate(address.peer)
            if address.peer not in self._dead:
                return address
            await asyncio.sleep(_LOOK_AGAIN_S)

    def _not_found(
        self, route: _Route, task: asyncio.Task[Any] | None, error: RuntimeFault
    ) -> None:
        if route.task is not task:
            return
        route.task = None
        waiting, route.waiting = route.waiting, {}
        for call in waiting:
            if not call.id or self._take(call):
                call.settle().failed(call, error)

    # -- settling -----------------------------------------------------------------------------

    def result(self, link: Link, message: messages.Result) -> None:
        """An answer came in."""
        call = self._answered(link, message.id)
        if call is None:
            return
        try:
            value = codec.decode(message.body, message.buffers)
        except WireError as error:
            self.errors += 1
            fault = MisuseError(f"the result of {call!r} cannot be read here: {error}")
            fault.__cause__ = error
            call.settle().failed(call, fault)
        else:
            call.settle().answered(call, value)

    def error(self, link: Link, message: messages.Error) -> None:
        """The answer is that the call failed."""
        call = self._answered(link, message.id)
        if call is None:
            return
        self.errors += 1
        address: PeerAddress | None = call.address
        try:
            error = codec.decode_error(
                message.body,
                message.buffers,
                peer=link.peer,
                role=address.role if address is not None else "",
                rank=address.rank if address is not None else -1,
            )
        except WireError as unreadable:
            error = RuntimeFault(f"{call!r} failed with an error unreadable here: {unreadable}")
        call.settle().failed(call, error)

    def _answered(self, link: Link, id: int) -> Outgoing | None:
        call = self.table.answer(link, id)
        if call is not None and call.deadline is not None:
            self._timers.forget(call)
        return call

    def goodbye(self, link: Link, message: messages.Goodbye) -> None:
        """The callee leaves and answers no more."""
        self._forget(link)
        self._fail(self.table.sent_by(link), message.reason)

    def link_lost(self, link: Link, reason: str) -> None:
        """An outbound link has ended."""
        self._forget(link)
        self._doubtful[link.peer] = None
        _keep_newest(self._doubtful)
        logger.debug("link to %s lost: %s", link.peer, reason)
        calls = self.table.sent_by(link)
        if not calls or self._closed:
            return
        if self._directory is None:
            self._fail(calls, "connection lost")
        else:
            self._spawn(self._settle(link), f"fate of {link.peer}")

    def lose(self, peer: str, cause: str) -> None:
        """The process `peer` is dead, for certain."""
        self._dead[peer] = cause
        _keep_newest(self._dead)
        for route in self._routes.values():
            if route.address is not None and route.address.peer == peer:
                route.address = route.link = None
        self._fail(self.table.sent_to(peer), cause)

    def close(self) -> None:
        """Fail what is outstanding."""
        self._closed = True
        one_way: list[Outgoing] = []
        for route in self._routes.values():
            one_way += [call for call in route.waiting if not call.id]
            if route.task is not None:
                route.task.cancel()
        for call in one_way + self.table.all():
            if not call.id or self._take(call):
                call.settle().failed(call, Closed(f"{call!r}: this process closed its endpoint"))

    async def _settle(self, link: Link) -> None:
        cause = await self._fate(link.peer)
        self._fail(self.table.sent_by(link), cause or "connection lost")

    async def _fate(self, peer: str) -> str | None:
        """What became of a process whose link broke; None: nobody knows that it is dead."""
        cause = self._dead.get(peer)
        if cause is None and self._directory is not None:
            try:
                async with asyncio.timeout(FATE_S):
                    cause = await self._directory.fate(peer)
            except Exception as error:  # noqa: BLE001 - whatever ails the directory, calls must end
                logger.debug("the fate of %s is not known: %r", peer, error)
        self._doubtful.pop(peer, None)
        if cause is not None:
            self.lose(peer, cause)
        return cause

    def _forget(self, link: Link) -> None:
        for route in self._routes.values():
            if route.link is link:
                route.address = route.link = None

    def _fail(self, calls: Sequence[Outgoing], cause: str) -> None:
        for call in calls:
            if self._take(call):
                self.errors += 1
                call.settle().failed(call, _lost(call, cause))

    def _take(self, call: Outgoing) -> bool:
        if not self.table.drop(call):
            return False
        self._timers.forget(call)
        return True


def _keep_newest(peers: dict[str, Any]) -> None:
    if len(peers) > _DEAD_KEPT:
        del peers[next(iter(peers))]


def _lost(call: Outgoing, cause: str) -> PeerLostError:
    peer = call.link.peer
    address: PeerAddress = call.address or PeerAddress(peer, "")
    who = f"{address.role} rank {address.rank} ({peer})" if address.role else peer
    where = f" on {address.host}" if address.host else ""
    return PeerLostError(
        f"{who}{where} was lost while it had to answer {call!r}: {cause}",
        peer,
        address.role,
        address.rank,
        address.host,
        cause,
    )
