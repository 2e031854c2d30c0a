"""Making calls, and settling each exactly once.

A call is settled by its answer, its deadline, its caller's cancel, or the loss of the callee; whatever comes
after that finds nobody waiting. When a link breaks, a new one goes on with its calls (see `channel`), while the
directory is asked what became of the process. When that is dead, the error says "SIGKILL" and not only
"connection lost", and what may be made twice goes to its next start (see `routes`).
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol, cast

from runtime.errors import Closed, Full, MisuseError, RuntimeFault, Timeout, WireError
from runtime.peer.calls import DEFAULT, Answered, CallOptions, Outgoing
from runtime.peer.context import PeerAddress
from runtime.peer.flow import ItemsUsed, size_of
from runtime.peer.future import current_waiter
from runtime.peer.routes import Routes, Target
from runtime.transport.base import Link
from runtime.wire import codec, messages
from runtime.wire.codec import Encoded

logger = logging.getLogger(__name__)


class Sink(Answered, Protocol):
    """Whoever takes the items of a stream; `answered` tells its end."""

    def item(self, call: Outgoing, value: Any) -> None: ...


class CallFuture(asyncio.Future[Any]):
    """The answer to a call, on the loop. Cancelling it cancels the call. Whoever makes it sets `caller`, and
    `call` when that has been made: a constructor of its own would cost as much again."""

    __slots__ = ("call", "caller")

    caller: Caller
    call: Outgoing

    def cancel(self, msg: Any = None) -> bool:
        if not super().cancel(msg):
            return False
        self.caller.abandon(self.call)
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


class Caller(Routes):
    """The calls that this process makes. Everything is called on the loop's thread, except `full`."""

    # -- calling --------------------------------------------------------------------------------

    def call(
        self,
        target: Target,
        method: str,
        parcel: Encoded,
        waiter: Answered,
        options: CallOptions = DEFAULT,
    ) -> Outgoing:
        """Send a call, or keep it until its callee is found and has room. Raises `MisuseError` and
        `Closed`."""
        now = self._loop.time()
        call = self.table.open(self._checked_name(target), method, waiter, now)
        timeout, retry, idempotent, nested, stream = options
        call.parcel, call.size = parcel, size_of(*parcel)
        if stream:
            call.items = ItemsUsed()
        if timeout is not None:
            call.timeout, call.deadline = timeout, now + timeout
            self._timers.add(call)
        if idempotent:
            call.retry = retry
        try:
            self._dispatch(target, call, nested or current_waiter.get() is not None)
        except BaseException:
            self._take(call)
            raise
        return call

    def stream(
        self,
        target: Target,
        method: str,
        parcel: Encoded,
        sink: Sink,
        options: CallOptions = DEFAULT,
    ) -> Outgoing:
        """Call a generator: `sink` is given its items as they arrive, then told of its end. The callee
        waits for `more`. A stream ends with its link, and is never sent again."""
        return self.call(target, method, parcel, sink, options._replace(retry=0, stream=True))

    def more(self, call: Outgoing, items: int) -> None:
        """So many more items of the stream `call` have been used up: as many more may come."""
        total = call.items.use(items)
        if total is not None and call in self.table and call.link is not None:
            call.channel.urgent(messages.encode_more(call.id, total))

    def cast(self, target: Target, method: str, parcel: Encoded) -> None:
        """Send a one-way call. Raises `MisuseError` and `Closed`; on the loop's thread also `Full`,
        where other threads waited in `Endpoint.admit`."""
        name = self._checked_name(target)
        call = Outgoing(0, name, method, _ONE_WAY, self._loop.time())
        call.parcel, call.size = parcel, size_of(*parcel)
        if not self._mailbox.delivering and self.full(target, call.size):
            raise Full(f"{call!r}: {name} is behind with what it was sent, {self._backlog(target)}")
        self._dispatch(target, call, False)

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
        if call.channel is None:
            return f"{call.target} is starting, restarting or not known yet; the call was not sent"
        if not call.sent:
            return f"{call.target} is behind with what it was sent before; the call was not sent"
        for_s = self._loop.time() - call.started
        return (
            f"it was made {for_s:.1f} s ago; {call.target} runs it, or has it queued behind others"
        )

    def _checked_name(self, target: Target) -> str:
        if self._closed:
            raise Closed("this process has closed its endpoint")
        if isinstance(target, PeerAddress):
            return target.peer.rpartition(".")[0] or target.peer
        if self._finder.directory is None:
            raise MisuseError(
                f"{target!r} is a name, and this endpoint has no directory to look it up in; "
                "call a PeerAddress"
            )
        return target

    def _dispatch(self, target: Target, call: Outgoing, nested: bool) -> None:
        self.sent += 1
        if isinstance(target, PeerAddress):
            channel = call.channel = self._channel(target)
            channel.send(call, nested)
        else:
            call.named = True
            self._by_name(call, nested)

    # -- settling -------------------------------------------------------------------------------

    def result(self, link: Link, message: messages.Result) -> None:
        """An answer came in."""
        call = self._answered(link, message)
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
        call = self._answered(link, message)
        if call is None:
            return
        self.errors += 1
        address: PeerAddress = call.channel.address
        try:
            error = codec.decode_error(
                message.body,
                message.buffers,
                peer=link.peer,
                role=address.role,
                rank=address.rank,
            )
        except WireError as unreadable:
            error = RuntimeFault(f"{call!r} failed with an error unreadable here: {unreadable}")
        call.settle().failed(call, error)

    def _answered(self, link: Link, message: messages.Result | messages.Error) -> Outgoing | None:
        id, body, buffers = message
        channel = self._channels.get(link.peer)
        if channel is None or channel.link is not link:
            self.table.late += 1
            return None
        call = self.table.answer(channel, id)
        if call is not None:
            self._timers.forget(call)
        channel.answered(id, size_of(body, buffers) if buffers else 0, call)
        return call

    def item(self, link: Link, message: messages.Item) -> None:
        """An item of a stream came in."""
        channel = self._channels.get(link.peer)
        call = self.table.find(channel, message.id)
        if call is None or call.items is None:
            return  # given up meanwhile
        call.items.came(size_of(message.body, message.buffers))
        try:
            value = codec.decode(message.body, message.buffers)
        except WireError as error:
            self._call_off(call)
            self._fail(call, MisuseError(f"an item of {call!r} cannot be read here: {error}"))
        else:
            cast("Sink", call.waiter).item(call, value)

    def missing(self, link: Link, message: messages.Missing) -> None:
        """A callee has only the reference of a call's arguments, and cannot get them from their holder."""
        channel = self._channels.get(link.peer)
        call = self.table.find(channel, message.id)
        if call is not None and channel is not None and channel.link is link and not call.parcel[0]:
            link.send(messages.encode_whole(call.id, *call.parcel.shipment.whole), False)

    def told(self, link: Link, message: messages.Credit | messages.Resumed) -> None:
        """A callee tells how far it is."""
        channel = self._channels.get(link.peer)
        if channel is None or channel.link is not link:
            return
        calls = [(id, self.table.find(channel, id)) for id in message.ids]
        if isinstance(message, messages.Credit):
            channel.credited(message.cast_bytes, calls)
        else:
            channel.resumed(message.epoch, [call for _, call in calls if call is not None])

    # -- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        """Fail what is outstanding."""
        self._closed = True
        calls = self.table.all()
        for route in self._routes.values():
            if route.task is not None:
                route.task.cancel()
            calls += [call for call in self._found(route, None) if not call.id]
        for channel in self._channels.values():
            calls += [call for call in channel.withdraw_all() if not call.id]
            if channel.link is not None and self.table.sent_by(channel):
                channel.link.send(messages.encode_goodbye("it closed its endpoint"))
            channel.close()
        for call in calls:
            if not call.id or self._take(call):
                call.settle().failed(call, Closed(f"{call!r}: this process closed its endpoint"))

    def unsent(self, peer: str | None = None) -> int:
        """Bytes that were sent to `peer`, or to anybody, and have not left yet."""
        if peer is not None:
            channel = self._channels.get(peer)
            return channel.queued_bytes() if channel is not None else 0
        return sum(channel.queued_bytes() for channel in self._channels.values())
