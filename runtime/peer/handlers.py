"""The calls that come in: found, run once, answered to whoever made them, over when nobody waits any more.

    over when ── answered, cancelled by the caller, past its deadline, or the caller is lost

How a caller's calls outlive its links stands in `clients`, how handlers run in `execution`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from runtime.errors import MisuseError, NotExposedError, PeerLostError, RuntimeFault
from runtime.peer.calls import OVER, Incoming, Owner
from runtime.peer.clients import GRACE_S, Client, Clients
from runtime.peer.cycles import CycleWatch
from runtime.peer.execution import Execution, Refused, encode, label
from runtime.peer.flow import size_of
from runtime.peer.holding import Waiting
from runtime.peer.mailbox import Mailbox
from runtime.peer.method import Exported, Exports
from runtime.peer.streams import Stream
from runtime.peer.threads import PlainRunner
from runtime.peer.timers import Timers
from runtime.transport.base import Link, Record
from runtime.wire import codec, messages

logger = logging.getLogger(__name__)

Fetch = Callable[[messages.Held], asyncio.Task[Any]]


class Handlers:
    """The calls that run or queue in this process. Everything here is called on the loop's thread."""

    def __init__(
        self,
        owner: Owner,
        exports: Exports,
        mailbox: Mailbox,
        timers: Timers,
        runner: PlainRunner,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._owner = owner
        self._exports = exports
        self._loop = mailbox.loop
        self._timers = timers
        self._clients = Clients(mailbox.loop)
        self._execution = Execution(owner, mailbox, runner, prepare, self)
        self._waiting = Waiting(self._execution.take)
        self._cycles = CycleWatch(owner, self._execution.plain, mailbox.loop, self._fail_queued)
        self.queued, self.blocked = self._cycles.queued, self._cycles.blocked
        self._closed = False
        self.received = self.errors = 0

    # -- from the caller ----------------------------------------------------------------------

    def call(self, link: Link, message: messages.Call) -> None:
        """A call came in."""
        client = self._clients.of_calls(link)
        if client is None or self._closed:
            return  # its caller has been told, or asks again
        id, method, body, buffers, deadline_s, stream = message
        self.received += 1
        if id in client.calls or id in client.kept:
            logger.warning("%s used the call id %d twice", link.peer, id)
            return
        if id > client.last:  # not `max`: this is done for every call
            client.last = id
        size = size_of(body, buffers)
        if client.cancelled and id in client.cancelled:
            del client.cancelled[id]
            client.release(id, size)
            return
        try:
            exported = self._exports.find(method)
            if exported.stream and not stream:
                raise self._is_stream(exported)
        except (NotExposedError, MisuseError) as error:
            self._refuse(client, id, error)
            return
        call = Incoming(client, id, exported, (body, buffers), size)
        if stream:
            call.stream = Stream(call)
        client.calls[id] = call
        if deadline_s is None:
            self._waiting.take(call)
            return
        call.deadline = self._loop.time() + deadline_s
        self._waiting.take(call)
        if call.state != OVER:  # most end in their first step, and need no timer
            call.timed = True
            self._timers.add(call)

    def by_reference(
        self, link: Link, message: messages.Held | messages.Whole | messages.Missing, fetch: Fetch
    ) -> None:
        """A call came in whose arguments are to be fetched; or they came, or nobody holds them, says its caller."""
        client = self._clients.of_calls(link)
        if client is None or self._closed:
            return
        if not isinstance(message, messages.Held):
            call = client.calls.get(message.id)
            if call is not None and isinstance(message, messages.Whole):
                self._waiting.came(call, (message.body, message.buffers))
            elif call is not None:
                self._waiting.missing(call)
        elif message.call.id not in client.calls:
            self._waiting.open(client)
            self.call(link, message.call)
            call = client.calls.get(message.call.id)
            if call is not None:
                self._waiting.ask(call, fetch(message))
            self._waiting.advance(client)

    def cast(self, link: Link, message: messages.Cast) -> None:
        """A one-way call came in. It runs even when its caller is gone by then."""
        client = self._clients.of_calls(link)
        if client is None or self._closed:
            return
        self.received += 1
        size = size_of(message.body, message.buffers)
        try:
            exported = self._exports.find(message.method)
            if exported.stream:
                raise self._is_stream(exported)
        except (NotExposedError, MisuseError) as error:
            logger.warning("one-way call of %s: %s", link.peer, error)
            self.errors += 1
            client.release(0, size)
            return
        self._waiting.take(Incoming(client, 0, exported, (message.body, message.buffers), size))

    def cancel(self, link: Link, message: messages.Cancel) -> None:
        """The caller gave up."""
        client = self._clients.of(link)
        call = client.cancels(link, message.id) if client is not None else None
        if call is not None:
            self.give_up(call)

    def more(self, link: Link, message: messages.More) -> None:
        """The consumer of a stream has room for more."""
        client = self._clients.of(link)
        call = client.calls.get(message.id) if client is not None else None
        if call is not None and call.stream is not None:
            self._execution.used(call, message.used)

    def probe(self, link: Link, message: messages.Probe) -> None:
        """Another process asks what one of its calls waits for."""
        client = self._clients.of(link)
        call = client.calls.get(message.subject) if client is not None else None
        if call is not None:
            self._cycles.asked(call, message)

    def acknowledged(self, link: Link, message: messages.Ack) -> None:
        """The caller has these answers."""
        client = self._clients.of_calls(link)
        if client is not None:
            client.acknowledged(message.ids)

    def resume(self, link: Link, message: messages.Resume) -> None:
        """A caller whose link was lost goes on by another one."""
        client = self._clients.resumes(link, message.epoch)
        if client is None or self._closed:
            return
        awaited = set(message.ids)
        for call in list(client.calls.values()):
            if call.id not in awaited:
                self.give_up(call)
        gone = client.resume(link, message.epoch, message.ids)
        self._waiting.again(client)
        for id in gone:
            reason = (
                f"{self._owner.name} does not have this call (any more): the connection of its "
                f"caller was lost, perhaps for more than {GRACE_S:g} s"
            )
            error = PeerLostError(reason, self._owner.peer, cause="connection lost")
            self._refuse(client, id, error)

    # -- over ---------------------------------------------------------------------------------

    def lost(self, link: Link) -> bool:
        """A caller's link has ended. It may come back; True when that matters to calls of its."""
        client = self._clients.lost(link)
        if client is None:
            return False
        client.lost(self._give_up_all)
        for call in [call for call in client.calls.values() if call.stream is not None]:
            self.give_up(call)
        return bool(client.calls)

    def gone(self, peer: str) -> None:
        """The process `peer` will not come back: nobody awaits its calls."""
        client = self._clients.gone(peer)
        if client is not None:
            self._give_up_all(client)

    def _give_up_all(self, client: Client) -> None:
        client.end_grace()
        client.kept.clear()
        for call in list(client.calls.values()):
            self.give_up(call)

    def give_up(self, call: Incoming) -> None:
        """Nobody awaits `call` any more: a queued one never starts, an async handler is cancelled."""
        if call.state == OVER:
            return
        self._over(call)
        if call.size:
            self.release(call)
        self._waiting.over(call)
        self._execution.stop(call)

    def running(self) -> int:
        """Calls that came in and are not over."""
        return sum(len(client.calls) for client in self._clients.all())

    def waiting(self) -> int:
        """Calls that wait for their turn."""
        return self._execution.queued()

    def unsent(self, peer: str | None = None) -> int:
        """Bytes of answers to `peer`, or to anybody, that have not left yet."""
        return self._clients.unsent(peer)

    async def close(self) -> None:
        """Cancel what runs, and return once the async handlers have ended."""
        self._closed = True
        self._waiting.close()
        self._cycles.close()
        for client in self._clients.all():
            if client.calls and client.link is not None:
                client.link.send(messages.encode_goodbye("it closed its endpoint"))
            self._give_up_all(client)
            client.close()
        await self._execution.close()

    # -- from the execution -------------------------------------------------------------------

    def release(self, call: Incoming) -> None:
        """`call` waits here no longer: its caller may send as much again."""
        size, call.size = call.size, 0
        if size:
            call.client.release(call.id, size)

    def answer(self, call: Incoming, value: Any, error: BaseException | None) -> None:
        """The handler of `call` gave `value`, or raised `error`."""
        if call.state == OVER:
            return
        id = call.id
        self._over(call)
        if not id:
            self.release(call)
        elif error is None:
            try:
                if type(value) is not codec.Encoded:
                    value = encode(self._owner, call, value)
            except Refused as refused:
                error = refused
            else:
                self._send(call, messages.encode_result(id, value.body, value.buffers))
        if error is not None:
            self._fail(call, error)

    def _send(self, call: Incoming, record: Record) -> None:
        client: Client = call.client
        if call.stream is None:
            client.answer(call.id, record)
        elif client.link is not None:
            client.link.send(record)  # behind its items

    def _fail(self, call: Incoming, error: BaseException) -> None:
        self.errors += 1
        own = isinstance(error, Refused)
        fault = error.fault if isinstance(error, Refused) else error
        if call.id:
            encoded = codec.encode_error(fault, own=own, pickle=call.exported.pickle)
            self._send(call, messages.encode_error(call.id, *encoded))
        else:
            logger.warning(
                "one-way call of %s to %s failed",
                call.client.peer,
                label(self._owner, call),
                exc_info=fault,
            )

    def _refuse(self, client: Client, id: int, error: RuntimeFault) -> None:
        self.errors += 1
        client.answer(id, messages.encode_error(id, *codec.encode_error(error, own=True)))

    def _is_stream(self, exported: Exported) -> MisuseError:
        name = f"{self._owner.name}.{exported.name}()"
        return MisuseError(f"{name} is a generator: its items are taken with `stream`, not `call`")

    def _over(self, call: Incoming) -> None:
        """`call` needs no answer from now on."""
        call.state = OVER
        call.client.calls.pop(call.id, None)
        if call.timed:
            self._timers.forget(call)
        if call.parked is not None:
            self._cycles.over(call)

    def _fail_queued(self, call: Incoming, error: MisuseError) -> None:
        if call.lane is not None and call.lane.claim(call):
            self._over(call)
            self._refuse(call.client, call.id, error)
