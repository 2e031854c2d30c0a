"""A worker's whole access to others: ZeroMQ for all of them, the local lane for calls between processes of one host.

Which way a link takes is decided when it is made. A peer that has no local socket here, or another process at that
path (two hosts may have equal ones), is reached by ZeroMQ, and so is, from then on, one whose local link was lost: if
it lives, calls go on. A link that never came up has delivered nothing, so what it had to send takes the other way, and
its owner sees one link all the time.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import TYPE_CHECKING

from runtime.transport.address import local_path, parse_all
from runtime.transport.base import Buffer, Lane, Link, Receiver, Record, TransportStatistics
from runtime.transport.link import SocketLink, SocketSettings
from runtime.transport.local import LocalTransport
from runtime.transport.local_link import LocalLink
from runtime.transport.sockets import SocketTransport

if TYPE_CHECKING:
    from runtime.transport.arena import Arena

_log = logging.getLogger(__name__)


class HostTransport:
    """Implements `base.Transport`. Control is always by ZeroMQ."""

    def __init__(
        self,
        peer: str,
        address: str,
        *,
        local: bool = True,
        arena: Arena | None = None,
        settings: SocketSettings | None = None,
    ) -> None:
        """`address`: as `SocketTransport`'s. `local`: use the local lane where there is one. `arena` is closed with
        the transport."""
        self._sockets = SocketTransport(peer, address, settings)
        lanes = [str(own) for own in parse_all(address) if local and local_path(own) is not None]
        self._local = LocalTransport(peer, lanes[0], arena, settings) if lanes else None
        self._arena = arena
        self._receiver: Receiver
        self._by_zmq: set[str] = set()
        """Peers that the local lane does not reach any more."""
        self._stands_in: dict[SocketLink, LocalLink] = {}
        """Links of ZeroMQ, and the local ones that they were taken for."""
        self._closed = False

    @property
    def peer(self) -> str:
        return self._sockets.peer

    @property
    def address(self) -> str:
        return self._sockets.address

    async def start(self, receiver: Receiver) -> None:
        await self._sockets.start(_Sorted(self, receiver))
        self._receiver = receiver
        if self._local is not None:
            try:
                await self._local.start(_Local(self, receiver))
            except BaseException:
                await self._sockets.close(0.0)
                raise

    def connect(self, peer: str, address: str, lane: Lane = Lane.RPC) -> Link:
        if lane is Lane.RPC and self._local is not None and peer not in self._by_zmq:
            link = self._local.reach(peer, self._sockets.way_to(address), lane)
            if link is not None:
                return link
        other = self._sockets.connect(peer, address, lane)
        return self._stands_in.get(other, other)

    def stage(self, buffer: Buffer, budget: str = "rpc") -> Buffer:
        return self._local.stage(buffer, budget) if self._local is not None else buffer

    def owner_of(self, link: Link) -> Link:
        """What our receiver knows a link of ZeroMQ as."""
        return self._stands_in.get(link, link)  # type: ignore[call-overload,no-any-return]

    def lost_local(self, link: Link, reason: str) -> None:
        """Take the other way, at once if nothing has gone this one."""
        assert isinstance(link, LocalLink)
        if link.outbound and not link.sound:
            self._by_zmq.add(link.peer)
            if link.divertible and link.endpoint is not None and not self._closed:
                _log.debug("%s reaches %s by ZeroMQ: %s", self.peer, link.peer, reason)
                other = self._sockets.connect(link.peer, link.endpoint, link.lane)
                living = {z: face for z, face in self._stands_in.items() if not z.ended}
                self._stands_in = {**living, other: link}
                link.divert(other)
                return
        self._receiver.link_lost(link, reason)

    async def close(self, linger: float = 1.0) -> None:
        self._closed = True
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._sockets.close(linger), name="close ZeroMQ")
                if self._local is not None:
                    group.create_task(self._local.close(linger), name="close the local lane")
        finally:
            if self._arena is not None:
                await asyncio.to_thread(self._arena.close)

    def statistics(self) -> TransportStatistics:
        """Of both ways together."""
        total = self._sockets.statistics()
        if self._local is None:
            return total
        local = self._local.statistics()
        rejected = Counter(total.rejected) + Counter(local.rejected)
        sums = [mine + other for mine, other in zip(total[2:], local[2:], strict=True)]
        return TransportStatistics(total.links + local.links, dict(rejected), *sums)


class _Sorted:
    """The receiver of what comes by ZeroMQ."""

    def __init__(self, host: HostTransport, receiver: Receiver) -> None:
        self._owner_of = host.owner_of
        self._receiver = receiver

    def received(self, link: Link, record: Record) -> None:
        self._receiver.received(self._owner_of(link), record)

    def link_lost(self, link: Link, reason: str) -> None:
        self._receiver.link_lost(self._owner_of(link), reason)


class _Local:
    """The receiver of what comes by the local lane."""

    def __init__(self, host: HostTransport, receiver: Receiver) -> None:
        self.received = receiver.received  # nothing in between: this is the quick way
        self._lost = host.lost_local

    def link_lost(self, link: Link, reason: str) -> None:
        self._lost(link, reason)
