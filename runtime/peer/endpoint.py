"""One process's end of all its calls: those it makes, and those it answers.

An `Endpoint` owns a transport and is its receiver: every record is decoded once and handed to `outgoing`
(answers to our calls) or `handlers` (calls of others). A record that is not our protocol ends the link
that it came by, is counted, and touches nothing else.

Names are looked up in a `Directory`; membership tells `lose` who is dead. Everything here belongs to
the loop's thread; `future`, `group` and `proxy` are the doors for other threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from runtime.aio import Service
from runtime.errors import MisuseError, WireError
from runtime.peer.calls import Limited, Outgoing, Owner
from runtime.peer.context import Directory, PeerAddress
from runtime.peer.future import current_waiter
from runtime.peer.handlers import Handlers
from runtime.peer.loopback import Loopback
from runtime.peer.mailbox import Mailbox
from runtime.peer.method import RESERVED, Exports, method_of, rpc_methods
from runtime.peer.outgoing import Caller, CallFuture, Target
from runtime.peer.running import CallContext, Running
from runtime.peer.threads import PlainRunner, ThreadRunner
from runtime.peer.timers import Timers
from runtime.transport.base import Link, Record, Transport
from runtime.wire import codec, messages

logger = logging.getLogger(__name__)

PING = RESERVED + "ping"


class EndpointStatistics(NamedTuple):
    """Counts since the start, and what is under way now."""

    calls_out: int
    """Calls and casts made."""
    calls_in: int
    """Calls and casts that came in."""
    outstanding: int
    """Calls of ours without an answer yet."""
    running: int
    """Calls of others that run or queue here."""
    queued: int
    """Of those: waiting for their turn."""
    late_answers: int
    """Answers dropped because their call had timed out or was cancelled."""
    errors_out: int
    """Calls of ours that failed."""
    errors_in: int
    """Calls of others that failed here."""
    rejected: dict[str, int]
    """Links ended for what they sent, by reason."""
    unsent_bytes: int
    """What was sent and has not left yet. Nothing limits it: whoever casts much looks here."""


class Endpoint(Service):
    """Calls other processes and answers theirs. `async with`, or `start` and `close`.

    `directory` (given here or set before `start`) finds actors by name; without one, calls need a
    `PeerAddress`. `runner` runs plain
    handlers (default: a thread of the endpoint's own); `prepare` is called first in each thread that
    the endpoint starts for them.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        directory: Directory | None = None,
        role: str = "",
        rank: int = -1,
        runner: PlainRunner | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(f"endpoint {transport.peer}")
        self.role, self.rank = role, rank
        self.directory = directory
        self._transport = transport
        name = transport.peer.rpartition(".")[0] or transport.peer
        self._owner = Owner(transport.peer, name)
        self._exports = Exports(name)
        self._exports.add(PING, _ping)
        self._own_runner = None if runner else ThreadRunner("rpc-handlers", prepare=prepare)
        self._plain_runner: PlainRunner = runner or self._own_runner  # type: ignore[assignment]
        self._prepare = prepare
        self._links: dict[str, Link] = {}
        self._inbound: dict[Link, None] = {}
        self._rejected: Counter[str] = Counter()
        self._mailbox: Mailbox | None = None
        self._timers: Timers
        self._caller: Caller
        self._handlers: Handlers

    # -- life ---------------------------------------------------------------------------------

    @property
    def peer(self) -> str:
        """Our own id."""
        return self._transport.peer

    @property
    def address(self) -> PeerAddress:
        """Where others reach us; valid after `start`."""
        return PeerAddress(self.peer, self._transport.address, self.role, self.rank)

    @property
    def mailbox(self) -> Mailbox:
        """The way to the loop from other threads. `MisuseError` before `start`."""
        if self._mailbox is None:
            raise MisuseError(f"{self._name} has not been started")
        return self._mailbox

    async def _on_start(self) -> None:
        loop = asyncio.get_running_loop()
        self._mailbox = Mailbox(loop)
        self._timers = Timers(loop, self._due)
        self._caller = Caller(self._connect, loop, self._timers, self.directory, self.spawn)
        self._handlers = Handlers(
            self._owner,
            self._exports,
            self._mailbox,
            self._timers,
            self._plain_runner,
            self._prepare,
        )
        out, into = Loopback.pair(self.peer, loop, self.received)
        self._links[self.peer], self._loop_in = out, into
        await self._transport.start(self)

    async def _on_close(self) -> None:
        if self._mailbox is None:
            return
        self._caller.close()
        try:
            await self._handlers.close()
        finally:
            self._timers.close()
            if self._own_runner is not None:
                self._own_runner.stop()
            await self._transport.close()

    # -- calling ------------------------------------------------------------------------------

    def call(
        self,
        target: Target,
        method: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> asyncio.Future[Any]:
        """Call `method` of `target`, on the loop's thread. Cancelling the future cancels the call.

        `timeout` in seconds travels with the call as its deadline. Raises `MisuseError` here and now
        for arguments that cannot be sent; then nothing is sent.
        """
        loop = self.mailbox.loop
        encoded = codec.encode_arguments(args, kwargs)
        future = CallFuture(self._caller, loop)
        future.call = self._caller.call(target, method, encoded, future, timeout)
        return future

    def cast(
        self,
        target: Target,
        method: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Call `method` one way: nobody hears whether it arrived or what came of it."""
        self.caller.cast(target, method, codec.encode_arguments(args, kwargs))

    @property
    def caller(self) -> Caller:
        """What makes the calls; for those who wait in other ways than `call` does."""
        if self._mailbox is None:
            raise MisuseError(f"{self._name} has not been started")
        return self._caller

    def lose(self, peer: str, cause: str) -> None:
        """The process `peer` is dead, says membership: calls to it fail now, with `PeerLostError`;
        calls from it are cancelled."""
        self.caller.lose(peer, cause)
        for link in [link for link in self._inbound if link.peer == peer]:
            del self._inbound[link]
            self._handlers.lost(link)
        gone = self._links.pop(peer, None) if peer != self.peer else None
        if gone is not None:
            gone.close()

    # -- exporting ----------------------------------------------------------------------------

    def export(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        concurrency: int | None = None,
        pickle: bool | None = None,
    ) -> None:
        """Expose `function` as `name`; see `rpc` for the options, which beat those of its `@rpc`.
        From any thread. Raises `MisuseError` when the name belongs to another function."""
        self._exports.add(name, function, concurrency=concurrency, pickle=pickle)

    def export_function(self, function: Callable[..., Any]) -> None:
        """Expose an `@rpc` function under its own name."""
        method = method_of(function)
        if method is None:
            raise MisuseError(
                f"{function!r} is not marked with @rpc; give it a name: export(name, f)"
            )
        self.export(method.name, function)

    def export_instance(self, namespace: str | None, instance: object) -> None:
        """Expose every `@rpc` method of `instance`, as "namespace.method" (or "method")."""
        methods = rpc_methods(type(instance))
        if not methods:
            raise MisuseError(f"{type(instance).__qualname__} has no method marked with @rpc")
        for attribute, method in methods.items():
            name = f"{namespace}.{method.name}" if namespace else method.name
            self._exports.add(
                name,
                getattr(instance, attribute),
                concurrency=method.concurrency,
                pickle=method.pickle,
            )

    def exported(self) -> list[str]:
        """The names of what is exposed, sorted."""
        return self._exports.names()

    # -- the receiver of the transport --------------------------------------------------------

    def received(self, link: Link, record: Record) -> None:
        """See `transport.base.Receiver`."""
        try:
            message = messages.decode(record)
        except WireError as error:
            self._reject(link, error)
            return
        kind = type(message)
        if kind is messages.Result:
            self._caller.result(link, message)  # type: ignore[arg-type]
        elif kind is messages.Call:
            self._handlers.call(link, message)  # type: ignore[arg-type]
            self._inbound[link] = None
        else:
            self._received_other(link, message)

    def _received_other(self, link: Link, message: messages.Message) -> None:
        match message:
            case messages.Error():
                self._caller.error(link, message)
            case messages.Cast():
                self._handlers.cast(link, message)
            case messages.Cancel():
                self._handlers.cancel(link, message)
            case messages.Probe():
                self._handlers.probe(link, message)
            case messages.Goodbye():
                self._caller.goodbye(link, message)

    def link_lost(self, link: Link, reason: str) -> None:
        """See `transport.base.Receiver`."""
        if link.outbound:
            if self._links.get(link.peer) is link:
                del self._links[link.peer]
            self._caller.link_lost(link, reason)
        else:
            self._inbound.pop(link, None)
            self._handlers.lost(link)

    def _reject(self, link: Link, error: WireError) -> None:
        self._rejected[error.reason] += 1
        logger.warning("the link to %s is ended: %s", link.peer, error)
        link.close()
        self.link_lost(link, f"it sent what is not our protocol: {error}")

    # -- inside -------------------------------------------------------------------------------

    def _connect(self, address: PeerAddress) -> Link:
        link = self._links.get(address.peer)
        if link is None:
            link = self._transport.connect(address.peer, address.address)
            self._links[address.peer] = link
        return link

    def _due(self, item: Limited) -> None:
        if isinstance(item, Outgoing):
            self._caller.due(item)
        else:
            self._handlers.give_up(item)  # type: ignore[arg-type]

    def statistics(self) -> EndpointStatistics:
        """What went through here, and what is under way."""
        caller, handlers = self.caller, self._handlers
        return EndpointStatistics(
            calls_out=caller.sent,
            calls_in=handlers.received,
            outstanding=len(caller.table),
            running=handlers.running(),
            queued=handlers.queued(),
            late_answers=caller.table.late,
            errors_out=caller.errors,
            errors_in=handlers.errors,
            rejected=dict(self._rejected),
            unsent_bytes=sum(
                link.queued_bytes() for link in (*self._links.values(), *self._inbound)
            ),
        )


async def _ping() -> None:
    """Answers."""


def current_call() -> CallContext:
    """Who called the handler that this code runs in. `MisuseError` outside of one."""
    running = current_waiter.get()
    if not isinstance(running, Running):
        raise MisuseError("this is not running in an RPC handler")
    return running.context
