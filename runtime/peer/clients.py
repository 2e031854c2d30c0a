"""One calling process, as its callee sees it: what it called, which answers are kept for it, how it comes back.

Calls belong to the process, not to the link that they came by. When that breaks, its calls go on for
`GRACE_S`; a further link of the same process takes them over (see `messages.Resume`). An answer is kept until
the caller says that it has arrived. So a call that is asked for again is answered again, but never run
again while this process lives: a call that is not known here and was not made after all that are is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from runtime.peer.calls import Incoming
from runtime.peer.flow import Credits
from runtime.transport.base import Lane, Link, Record
from runtime.wire import messages

GRACE_S = 3.0
"""How long a caller whose link is lost may come back; its calls are given up after that."""
CREDIT_AFTER_S = 0.01

_CANCELS_KEPT = 1024
_CLIENTS_KEPT = 4096


class Client:
    """A process that calls this one. Used on the loop's thread."""

    __slots__ = (
        "_credits",
        "_loop",
        "_timer",
        "calls",
        "cancelled",
        "epoch",
        "gone",
        "grace",
        "kept",
        "last",
        "link",
        "peer",
    )

    def __init__(self, peer: str, loop: asyncio.AbstractEventLoop) -> None:
        self.peer = peer
        self.link: Link | None = None
        self.epoch = 0
        self.gone = False
        self.last = 0
        """The highest id of its calls."""
        self.calls: dict[int, Incoming] = {}
        self.kept: dict[int, Record] = {}
        self.cancelled: dict[int, None] = {}
        """Cancels that overtook their calls."""
        self.grace: asyncio.TimerHandle | None = None
        self._credits = Credits()
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None

    def answer(self, id: int, record: Record) -> None:
        """Send the answer to call `id`, now or when the caller comes back."""
        self.kept[id] = record
        if self.link is not None:
            self.link.send(record, False)

    def acknowledged(self, ids: Sequence[int]) -> None:
        """These answers have arrived."""
        kept = self.kept
        for id in ids:
            kept.pop(id, None)

    def cancels(self, link: Link, id: int) -> Incoming | None:
        """The call that the caller gives up, if it is here."""
        call = self.calls.get(id)
        if call is None and self.kept.pop(id, None) is None and link.lane == Lane.CONTROL:
            self.cancelled[id] = None
            if len(self.cancelled) > _CANCELS_KEPT:
                del self.cancelled[next(iter(self.cancelled))]
        return call

    def release(self, id: int, size: int) -> None:
        """`size` bytes of call `id` (0: of a cast) wait here no longer."""
        if self.link is None or self.link.lane != Lane.RPC:
            return  # nothing is counted there
        if self._credits.add(id, size):
            self._tell()
        elif self._timer is None:
            self._timer = self._loop.call_later(CREDIT_AFTER_S, self._tell_late)

    def _tell_late(self) -> None:
        self._timer = None
        self._tell()

    def _tell(self) -> None:
        news = self._credits.take()
        if news is not None and self.link is not None:
            self.link.send(messages.encode_credit(*news), False)

    def resume(self, link: Link, epoch: int, ids: Sequence[int]) -> list[int]:
        """The caller goes on by `link` and still awaits `ids`: their answers that are kept are sent again.
        Those that never came are asked for; returns those that may have come and are not here."""
        self.link, self.epoch, self.gone = link, epoch, False
        self.end_grace()
        self._credits.restart()
        kept, self.kept = self.kept, {}
        missing: list[int] = []
        gone: list[int] = []
        for id in ids:
            call, record = self.calls.get(id), kept.get(id)
            if record is not None:
                self.answer(id, record)
            elif call is not None:
                if not call.size:
                    self.release(id, 1)
            else:
                (missing if id > self.last else gone).append(id)
        if ids:
            link.send(messages.encode_resumed(epoch, missing))
        return gone

    def lost(self, give_up: Callable[[Client], None]) -> None:
        """Its link is lost: `give_up` is told when it does not come back in time."""
        self.link = None
        self._credits.restart()
        self.end_grace()
        if self.calls or self.kept:
            self.grace = self._loop.call_later(GRACE_S, give_up, self)

    def end_grace(self) -> None:
        """It is back, or gone for good."""
        if self.grace is not None:
            self.grace.cancel()
            self.grace = None

    def close(self) -> None:
        """Nothing more is sent to it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.link = None


class Clients:
    """Every process that calls this one, by peer id and by link."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._by_peer: dict[str, Client] = {}
        self._by_link: dict[Link, Client] = {}

    def of_calls(self, link: Link) -> Client | None:
        """Who calls by `link`; None when it has made a further link since: that said what still matters."""
        return self._by_link.get(link)

    def of(self, link: Link) -> Client | None:
        """The process at the other end of `link`, if it has called."""
        return self._by_peer.get(link.peer)

    def resumes(self, link: Link, epoch: int) -> Client | None:
        """Who begins `link`, or goes on by it; None when it has made a further link since."""
        client = self._client(link.peer)
        if epoch <= client.epoch:
            return None
        if client.link is not None:
            self._by_link.pop(client.link, None)
        client.link = link
        self._by_link[link] = client
        return client

    def lost(self, link: Link) -> Client | None:
        """`link` has ended: whose calls came by it."""
        client = self._by_link.pop(link, None)
        if client is not None and client.gone:
            self._by_peer.pop(client.peer, None)
        return client

    def gone(self, peer: str) -> Client | None:
        """The process `peer` is dead, they say: forget it, but for a link by which it may still call."""
        client = self._by_peer.get(peer)
        if client is not None:
            client.gone = True
            if client.link is None:
                del self._by_peer[peer]
        return client

    def all(self) -> list[Client]:
        """All that are known."""
        return list(self._by_peer.values())

    def unsent(self, peer: str | None = None) -> int:
        """Bytes of answers that have not left yet."""
        return sum(
            link.queued_bytes() for link in self._by_link if peer is None or link.peer == peer
        )

    def _client(self, peer: str) -> Client:
        client = self._by_peer.get(peer)
        if client is None:
            if len(self._by_peer) >= _CLIENTS_KEPT:
                clients = self._by_peer.values()
                idle = next((one for one in clients if not one.link and not one.grace), None)
                if idle is not None:
                    del self._by_peer[idle.peer]
            client = self._by_peer[peer] = Client(peer, self._loop)
        return client
