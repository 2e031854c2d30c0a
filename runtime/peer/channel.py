"""The way of our calls to one start of a process: one link after the other, and what is on its way.

A channel sends in order, as far as the receiver's window allows; what is beyond it waits here. When its
link is lost and the process lives, a new link goes on where the old one ended: RESUME says which answers are
still awaited, RESUMED which of those calls have not arrived. No call is sent twice to a process that has
it. Who finds the processes, and what a caller is told, stands in `outgoing`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence

from runtime.errors import MisuseError, PeerLostError
from runtime.peer.calls import Outgoing
from runtime.peer.context import PeerAddress
from runtime.peer.flow import WINDOW_BYTES, Window
from runtime.transport.base import Lane, Link, Record, VisitedLink
from runtime.wire import messages

ACK_EVERY = 64
"""Answers that are acknowledged together at most."""
ACK_BYTES = 256 * 1024
"""An answer of that size is acknowledged at once."""
ACK_AFTER_S = 0.1
CONGESTED_BYTES = 64 * 1024
"""With more than that before it, what is urgent takes the control lane."""

TRIES = 5
"""How often a call is sent again, and a link made anew before it holds."""

Connect = Callable[[PeerAddress, Lane], Link]


class Channel:
    """Calls to one process. Everything is called on the loop's thread."""

    __slots__ = (
        "_ack_timer",
        "_answered",
        "_connect",
        "_control",
        "_epochs",
        "_loop",
        "_queue",
        "_resumed",
        "address",
        "epoch",
        "gates",
        "lane",
        "link",
        "peer",
        "ready",
        "recovering",
        "refused",
        "visited",
        "window",
    )

    def __init__(
        self,
        address: PeerAddress,
        lane: Lane,
        connect: Connect,
        loop: asyncio.AbstractEventLoop,
        epochs: Iterator[int],
        refused: Callable[[Outgoing, Exception], None],
    ) -> None:
        self.address = address
        self.peer = address.peer
        self.lane = lane
        self.link: Link | None = None
        self.visited: VisitedLink | None = None
        """The link, where other threads may visit it."""
        self.epoch = 0
        self._epochs = epochs
        self.ready = self.recovering = False
        self.refused = refused
        self.gates: list[Callable[[], None]] = []
        self.window = Window(WINDOW_BYTES if lane == Lane.RPC else float("inf"))
        self._connect = connect
        self._loop = loop
        self._control: Link | None = None
        self._queue: dict[Outgoing, None] = {}
        self._answered: list[int] = []
        self._ack_timer: asyncio.TimerHandle | None = None
        self._resumed: asyncio.Future[bool] | None = None

    # -- sending ------------------------------------------------------------------------------

    def send(self, call: Outgoing, nested: bool = False) -> None:
        """Send `call`, or keep it until there is room for it. Raises `MisuseError` for what no peer
        would accept."""
        if self.link is None:
            self.connect()
        if self.ready and (nested or (not self._queue and self.window.admits(call.size))):
            self._transmit(call)
        else:
            self._queue[call] = None
            self.window.waiting += call.size

    def connect(self) -> None:
        """Have a link. Raises what the transport raises."""
        if self.link is None and not self.recovering:
            self._open(())

    def send_or_refuse(self, call: Outgoing) -> None:
        """`send`, where nobody is there to be told by an exception."""
        try:
            self.send(call)
        except MisuseError as error:
            self.refused(call, error)

    def _transmit(self, call: Outgoing) -> None:
        link, parcel = self.link, call.parcel
        assert link is not None
        if not call.id:
            link.send(messages.encode_cast(messages.Cast(call.method, *parcel)))
            self.window.cast(call.size)
            return
        deadline = call.deadline
        left = None if deadline is None else deadline - self._loop.time()
        if left is not None and left < 0:
            left = 0.0
        body, buffers = parcel
        if not body:
            link.send(parcel.record(call.id, call.method, left))  # a `holding.Held`
        else:
            stream = call.items is not None
            link.send(messages.encode_call(call.id, call.method, body, buffers, left, stream))
        call.sent = True
        self.window.in_flight += call.size

    def pump(self) -> None:
        """Send what waited, as far as there is room now."""
        while self.ready and self._queue:
            call = next(iter(self._queue))
            if not self.window.admits(call.size):
                return
            self.withdraw(call)
            try:
                self._transmit(call)
            except MisuseError as error:
                self.refused(call, error)
        if not self._queue and self.window.in_flight * 2 <= self.window.limit:
            self.open_gates()  # not at each answer: who is woken is to get something done

    def open_gates(self) -> None:
        """There is room, or nothing to wait for: whoever waits may look again."""
        gates, self.gates = self.gates, []
        for tell in gates:
            tell()

    def withdraw(self, call: Outgoing) -> bool:
        """Do not send `call`, if it waits here."""
        if self._queue.pop(call, self) is self:
            return False
        self.window.waiting -= call.size
        return True

    def withdraw_all(self) -> list[Outgoing]:
        """Everything that waits here, in order."""
        calls, self._queue = list(self._queue), {}
        self.window.waiting = 0
        return calls

    def urgent(self, record: Record) -> None:
        """Send what must not wait behind data; it may overtake calls."""
        link = self.link
        if link is None:
            return  # whoever comes back says by RESUME what still matters
        if self.lane == Lane.RPC and link.queued_bytes() > CONGESTED_BYTES:
            if self._control is None:
                self._control = self._connect(self.address, Lane.CONTROL)
            link = self._control
        link.send(record, False)

    def cancel(self, call: Outgoing) -> None:
        """Nobody waits for `call` any more."""
        if call.sent:
            self.urgent(messages.encode_cancel(call.id))
            self.window.owe(call.id, call.size)
            call.size = 0
        else:
            self.withdraw(call)

    # -- answers ------------------------------------------------------------------------------

    def answered(self, id: int, size: int, call: Outgoing | None) -> None:
        """The answer to call `id`, of `size` bytes, came in; `call` None: too late."""
        window = self.window
        if call is None:
            window.settled(id)
        else:
            window.in_flight -= call.size
        self._answered.append(id)
        if size >= ACK_BYTES or len(self._answered) >= ACK_EVERY:
            self._acknowledge()
        elif self._ack_timer is None:
            self._ack_timer = self._loop.call_later(ACK_AFTER_S, self._ack_idle)
        if self._queue or self.gates:
            self.pump()

    def credited(self, cast_bytes: int, calls: Iterable[tuple[int, Outgoing | None]]) -> None:
        """The peer says what waits there no longer: casts, and calls by id."""
        window = self.window
        window.casts_over(cast_bytes)
        for id, call in calls:
            if call is None:
                window.settled(id)
            else:
                window.in_flight -= call.size
                call.size = 0
        self.pump()

    def _ack_idle(self) -> None:
        self._ack_timer = None
        if self._answered:
            self._acknowledge()

    def _acknowledge(self) -> None:
        ids, self._answered = self._answered, []
        if self.link is not None:
            self.link.send(messages.encode_ack(ids))

    # -- links --------------------------------------------------------------------------------

    def _open(self, awaited: Sequence[Outgoing]) -> None:
        """A new link, which goes on with the calls that are `awaited`."""
        self.link = self._connect(self.address, self.lane)
        self.visited = self.link if isinstance(self.link, VisitedLink) else None
        self.epoch = next(self._epochs)
        self._answered.clear()
        self.link.send(messages.encode_resume(self.epoch, [call.id for call in awaited]))
        self.window.restart(sum(call.size for call in awaited))
        self.ready = not awaited

    async def reopen(self, awaited: Sequence[Outgoing]) -> bool:
        """A new link for the calls that are `awaited`. True once the peer has told which of them it
        lacks; False when that link is lost, too."""
        self._resumed = self._loop.create_future()
        self._open(awaited)
        if not awaited:
            self.pump()
            return True
        try:
            return await self._resumed
        finally:
            self._resumed = None

    def resumed(self, epoch: int, missing: Iterable[Outgoing]) -> None:
        """The peer has told which calls it lacks: they are sent again, before all that waits."""
        if epoch != self.epoch or self.ready:
            return
        self.ready = True
        for call in missing:
            self.window.in_flight -= call.size
            call.tries += 1
            if call.tries > TRIES:
                self.refused(call, lost_error(call, "connection lost, again and again"))
            else:
                self._transmit(call)
        if self._resumed is not None and not self._resumed.done():
            self._resumed.set_result(True)
        self.pump()

    def lost(self, link: Link) -> bool:
        """A link has ended. False when it is not the one that calls go by."""
        if link is self._control:
            self._control = None
        if link is not self.link:
            return False
        self.link, self.ready = None, False
        if self._resumed is not None and not self._resumed.done():
            self._resumed.set_result(False)
        return True

    def close(self) -> None:
        """End the links."""
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        for link in (self.link, self._control):
            if link is not None:
                link.close()
        self.link = self._control = None
        self.ready = False
        if self._resumed is not None and not self._resumed.done():
            self._resumed.set_result(False)

    def queued_bytes(self) -> int:
        """Bytes that wait here, or were sent and have not left."""
        size = self.window.waiting
        if self.link is not None:
            size += self.link.queued_bytes()
        if self._control is not None:
            size += self._control.queued_bytes()
        return size


def lost_error(call: Outgoing, cause: str) -> PeerLostError:
    """The error of a call whose callee is lost, or cannot be reached any more."""
    address: PeerAddress = call.channel.address
    peer = address.peer
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
