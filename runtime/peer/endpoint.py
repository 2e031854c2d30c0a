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
from runtime.peer.admission import Admission
from runtime.peer.calls import DEFAULT, CallOptions, Limited, Outgoing, Owner
from runtime.peer.context import Directory, PeerAddress
from runtime.peer.finding import Finder
from runtime.peer.flow import nbytes
from runtime.peer.future import current_waiter
from runtime.peer.handlers import Handlers
from runtime.peer.holding import Holder
from runtime.peer.loopback import Loopback
from runtime.peer.mailbox import Mailbox
from runtime.peer.method import RESERVED, Exports, method_of, rpc_methods
from runtime.peer.outgoing import Caller, CallFuture
from runtime.peer.routes import Target
from runtime.peer.running import CallContext, Running
from runtime.peer.threads import PlainRunner, ThreadRunner
from runtime.peer.timers import Timers
from runtime.transport.base import Lane, Link, Record, Transport
from runtime.wire import codec, messages

logger = logging.getLogger(__name__)

PING = RESERVED + "ping"

STAGED_BYTES = 64 * 1024
"""Buffers from that size on are worth staging."""


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
    """What was sent and has not left yet, or waits for its receiver."""


class Endpoint(Service):
    """Calls other processes and answers theirs. `async with`, or `start` and `close`.

    `directory` (given here or set before `start`) finds actors by name; without one, calls need a
    `PeerAddress`. `runner` runs plain handlers (default: a thread of the endpoint's own); `prepare` is
    called first in each thread that the endpoint starts for them.
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
        self._holder = Holder(self)
        self._own_runner = None if runner else ThreadRunner("rpc-handlers", prepare=prepare)
        self._plain_runner: PlainRunner = runner or self._own_runner  # type: ignore[assignment]
        self._prepare = prepare
        self._rejected: Counter[str] = Counter()
        self._mailbox: Mailbox | None = None
        self._options = DEFAULT
        self._mourners: list[Callable[[str, str], None]] = []
        self._timers: Timers
        self._caller: Caller
        self._admission: Admission
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
        self._caller = Caller(
            self._connect,
            self._mailbox,
            self._timers,
            Finder(self.directory, self.lose),
            self.spawn,
            control_only=self.peer.startswith("@"),
        )
        self._admission = Admission(self._mailbox, self._caller)
        self._handlers = Handlers(
            self._owner,
            self._exports,
            self._mailbox,
            self._timers,
            self._plain_runner,
            self._prepare,
        )
        out, into = Loopback.pair(self.peer, loop, self.received)
        self._to_self, self._from_self = out, into
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
        loop, caller = self.mailbox.loop, self._caller
        encoded = codec.encode_arguments(args, kwargs)
        future = CallFuture(loop=loop)
        future.caller = caller
        options = self._options
        if timeout != options.timeout:  # mostly they are those of the call before
            options = self._options = CallOptions(timeout)
        future.call = caller.call(target, method, encoded, future, options)
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

    def stage(self, encoded: codec.Encoded, budget: str = "rpc") -> codec.Encoded:
        """From any thread: `encoded` with its large buffers copied to where peers of this host can open
        them without another copy, if there is room for this `budget`: their originals may change then."""
        body, buffers = encoded
        if not any(nbytes(buffer) >= STAGED_BYTES for buffer in buffers):
            return encoded
        stage = self._transport.stage
        return codec.Encoded(body, [stage(buffer, budget) for buffer in buffers])

    def admit(self, names: Sequence[str], size: int, timeout: float | None = None) -> None:
        """From any thread, before `size` bytes are sent to each of `names`: wait while one of them is
        behind with what it was sent. Not where waiting would be wrong: on a thread that runs an
        asyncio loop, and in a handler. Says after ten seconds what it waits for. Raises `Timeout`."""
        mailbox = self.mailbox
        if not mailbox.on_loop_thread():
            self._admission.wait(names, size, timeout)

    def unsent(self, peer: str) -> int:
        """Bytes for the process `peer` that have not left yet."""
        return self.caller.unsent(peer) + self._handlers.unsent(peer)

    def lose(self, peer: str, cause: str) -> None:
        """The process `peer` is dead, says membership: calls to it fail now, with `PeerLostError`;
        calls from it are cancelled."""
        self.caller.lose(peer, cause)
        self._handlers.gone(peer)
        for mourner in self._mourners:
            mourner(peer, cause)

    def on_lost(self, mourner: Callable[[str, str], None]) -> None:
        """Call `mourner(peer, cause)` on the loop for each process that `lose` is told of. From any thread."""
        self._mourners.append(mourner)

    # -- exporting ----------------------------------------------------------------------------

    def export(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        concurrency: int | None = None,
        pickle: bool | None = None,
        raw: bool = False,
    ) -> None:
        """Expose `function` as `name`; see `rpc` for the options, which beat those of its `@rpc`.
        A `raw` one is called with the `Encoded` of its arguments as it came in, and may return the
        `Encoded` to answer. From any thread. Raises `MisuseError` when the name belongs to another
        function."""
        self._exports.add(name, function, concurrency=concurrency, pickle=pickle, raw=raw)

    def retract(self, name: str) -> None:
        """Expose `name` no longer: later calls find nothing there. From any thread."""
        self._exports.remove(name)

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
        else:
            self._received_other(link, message)

    def _received_other(self, link: Link, message: messages.Message) -> None:
        match message:
            case messages.Error():
                self._caller.error(link, message)
            case messages.Cast():
                self._handlers.cast(link, message)
            case messages.Item():
                self._caller.item(link, message)
            case messages.Ack():
                self._handlers.acknowledged(link, message)
            case messages.Credit() | messages.Resumed():
                self._caller.told(link, message)
            case messages.Cancel():
                self._handlers.cancel(link, message)
            case messages.More():
                self._handlers.more(link, message)
            case messages.Resume():
                self._handlers.resume(link, message)
            case messages.Held() | messages.Whole() | messages.Missing() if not link.outbound:
                self._handlers.by_reference(link, message, self._holder.fetch)
            case messages.Missing():
                self._caller.missing(link, message)
            case messages.Probe():
                self._handlers.probe(link, message)
            case messages.Goodbye() if link.outbound:
                self._caller.goodbye(link, message)
            case messages.Goodbye():
                self._handlers.gone(link.peer)

    def link_lost(self, link: Link, reason: str) -> None:
        """See `transport.base.Receiver`."""
        if link.outbound:
            self._caller.link_lost(link, reason)
        elif self._handlers.lost(link):
            self._caller.ask_fate(link.peer)

    def _reject(self, link: Link, error: WireError) -> None:
        self._rejected[error.reason] += 1
        logger.warning("the link to %s is ended: %s", link.peer, error)
        link.close()
        self.link_lost(link, f"it sent what is not our protocol: {error}")

    # -- inside -------------------------------------------------------------------------------

    def _connect(self, address: PeerAddress, lane: Lane) -> Link:
        if address.peer == self.peer:
            return self._to_self
        return self._transport.connect(address.peer, address.address, lane)

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
            queued=handlers.waiting(),
            late_answers=caller.table.late,
            errors_out=caller.errors,
            errors_in=handlers.errors,
            rejected=dict(self._rejected),
            unsent_bytes=caller.unsent() + handlers.unsent(),
        )


async def _ping() -> None:
    """Answers."""


def current_call() -> CallContext:
    """Who called the handler that this code runs in. `MisuseError` outside of one."""
    running = current_waiter.get()
    if not isinstance(running, Running):
        raise MisuseError("this is not running in an RPC handler")
    return running.context
