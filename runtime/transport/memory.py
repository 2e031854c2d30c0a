"""A network inside of one process: for tests, the simulator and jobs of one process.

Links behave as real ones do (reliable streams between two peers, in order, cut as a whole), while the network can
be made slow, lossy or parted: delays are drawn from one seeded generator, so under a loop with fake time a
run of a given seed is the same each time. Losing a record on a stream means losing the link.

Buffers that could be written to are copied when they are sent: what arrives belongs to the receiver alone.
While large ones are on their way, each unordered record has a delay of its own: it overtakes and is overtaken.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

from runtime.errors import Closed, ConfigError, MisuseError, WireError
from runtime.transport.address import parse
from runtime.transport.base import Buffer, Lane, Receiver, Record, TransportStatistics
from runtime.wire.frames import check_record

_LARGE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """`delay_s`: least and most time of a record's way. `loss`: chance that a record's loss ends its link.
    `connect_s`: how long a dial waits for a peer that does not listen yet. `notice_s`: how long until a
    parted or killed peer is noticed."""

    delay_s: tuple[float, float] = (0.0, 0.0)
    loss: float = 0.0
    connect_s: float = 5.0
    notice_s: float = 0.001


class MemoryNetwork:
    """Where memory transports meet. Used on one event loop."""

    def __init__(self, seed: int = 0, settings: NetworkSettings | None = None) -> None:
        self.settings = settings or NetworkSettings()
        self._random = random.Random(seed)
        self._listening: dict[str, MemoryTransport] = {}
        self._parted: set[frozenset[str]] = set()

    def transport(self, peer: str, address: str | None = None) -> MemoryTransport:
        """A transport of `peer`, by default at "mem://<peer>"."""
        return MemoryTransport(self, peer, address or f"mem://{peer}")

    def part(self, one: Iterable[str], other: Iterable[str]) -> None:
        """Cut every link between the two sides (ids of peers) and refuse new ones until `heal`."""
        pairs = {frozenset((a, b)) for a in one for b in other if a != b}
        self._parted |= pairs
        for transport in list(self._listening.values()):
            for link in list(transport.links):
                if frozenset((transport.peer, link.peer)) in pairs:
                    link.cut("the network is parted")

    def heal(self) -> None:
        """Undo every `part`."""
        self._parted.clear()

    def kill(self, peer: str) -> None:
        """End a peer as SIGKILL would: nothing is flushed, the others notice."""
        for transport in list(self._listening.values()):
            if transport.peer == peer:
                transport.die()

    def reachable(self, one: str, address: str) -> MemoryTransport | None:
        """Who listens at `address`, if `one` can reach it."""
        found = self._listening.get(address)
        if found is None or frozenset((one, found.peer)) in self._parted:
            return None
        return found

    def listen(self, transport: MemoryTransport) -> None:
        if transport.address in self._listening:
            raise ConfigError(f"cannot bind {transport.address}: already in use")
        self._listening[transport.address] = transport

    def leave(self, transport: MemoryTransport) -> None:
        if self._listening.get(transport.address) is transport:
            del self._listening[transport.address]

    def draw_delay(self) -> float:
        least, most = self.settings.delay_s
        return least if least == most else self._random.uniform(least, most)

    def draw_loss(self) -> bool:
        return self.settings.loss > 0 and self._random.random() < self.settings.loss


class MemoryTransport:
    """One peer's access to a `MemoryNetwork`. Implements `base.Transport`."""

    def __init__(self, network: MemoryNetwork, peer: str, address: str) -> None:
        if parse(address).scheme != "mem":
            raise ConfigError(f"the memory network has mem:// addresses only, not {address!r}")
        self.network = network
        self.links: list[MemoryLink] = []
        self.receiver: Receiver | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.peer = peer
        self.address = address
        self._closed = False
        self._counts: Counter[str] = Counter()

    async def start(self, receiver: Receiver) -> None:
        if self.receiver is not None or self._closed:
            raise MisuseError(f"the transport of {self.peer} was started before")
        self.network.listen(self)
        self.receiver, self.loop = receiver, asyncio.get_running_loop()

    def connect(self, peer: str, address: str, lane: Lane = Lane.RPC) -> MemoryLink:
        if self._closed:
            raise Closed(f"the transport of {self.peer} is closed")
        if self.loop is None:
            raise MisuseError(f"the transport of {self.peer} is not started")
        for link in self.links:
            if link.outbound and (link.peer, link.lane) == (peer, lane) and not link.ending:
                return link
        address = str(parse(address))
        link = MemoryLink(self, peer, lane, outbound=True)
        self.links.append(link)
        link.dial(address, self.loop.time() + self.network.settings.connect_s)
        return link

    def stage(self, buffer: Buffer, budget: str = "rpc") -> Buffer:
        return buffer

    async def close(self, linger: float = 1.0) -> None:
        if self._closed:
            return
        self._closed = True
        for link in list(self.links):
            link.close()
        try:
            async with asyncio.timeout(linger):
                while self.links:
                    await self.links[0].ended.wait()
        except TimeoutError:
            pass
        self.die()

    def die(self) -> None:
        """Leave without a word."""
        self._closed = True
        self.network.leave(self)
        for link in list(self.links):
            other = link.vanish()
            if other is not None and self.loop is not None:
                self.loop.call_later(
                    self.network.settings.notice_s, other.cut_here, "connection lost"
                )

    def statistics(self) -> TransportStatistics:
        return TransportStatistics(len(self.links), {}, **self._counts)

    def count(self, way: str, records: int, size: int) -> None:
        self._counts.update({f"records_{way}": records, f"messages_{way}": 1, f"bytes_{way}": size})


class MemoryLink:
    """One end of a link. Implements `base.Link`. `twin` is the other end, once there is one."""

    def __init__(
        self, transport: MemoryTransport, peer: str, lane: Lane, *, outbound: bool
    ) -> None:
        self.ending = False
        self.ended = asyncio.Event()
        self.twin: MemoryLink | None = None
        self._transport = transport
        self.peer = peer
        self.lane = lane
        self.outbound = outbound
        # Sent in this pass of the loop, or before the link is up.
        self._waiting: list[tuple[Record, int]] = []
        self._flush: asyncio.Handle | None = None
        self._flying: deque[tuple[float, list[tuple[Record, int]]]] = deque()
        self._queued = 0
        self._last_arrival = 0.0
        # Unordered records that travel by themselves, and until when large buffers are on their way.
        self._alone: dict[int, tuple[Record, int]] = {}
        self._flights = 0
        self._large_until = 0.0

    def send(self, record: Record, ordered: bool = True) -> None:
        try:
            size = check_record(record)
        except WireError as error:
            raise MisuseError(f"too large to be sent: {error}") from None
        if self.ending:
            return
        if record.buffers:
            own = [b if type(b) is bytes else bytearray(b) for b in record.buffers]
            record = Record(record.header, own)
        self._queued += size
        if not ordered and self.twin is not None and self._large_on_its_way(size):
            self._depart_alone(record, size)
            return
        self._waiting.append((record, size))
        if self._flush is None and self.twin is not None:
            self._flush = self._loop.call_soon(self._depart)

    def queued_bytes(self) -> int:
        return self._queued

    def close(self) -> None:
        if self.ending:
            return
        self.ending = True
        self._finish_if_empty()

    # between the two ends

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        loop = self._transport.loop
        assert loop is not None
        return loop

    def dial(self, address: str, deadline: float) -> None:
        """Look for the peer now and, while nobody listens there, again and again until `deadline`."""
        if self.ended.is_set():
            return
        found = self._transport.network.reachable(self._transport.peer, address)
        if found is None:
            if self._loop.time() >= deadline:
                self.cut_here(f"connection refused: nobody listens at {address}")
            else:
                self._loop.call_later(0.02, self.dial, address, deadline)
        elif found.peer != self.peer:
            self._loop.call_soon(self.cut_here, f"wrong peer: {address} is {found.peer}")
        else:
            twin = MemoryLink(found, self._transport.peer, self.lane, outbound=False)
            self.twin, twin.twin = twin, self
            found.links.append(twin)
            if self._waiting and self._flush is None:
                self._flush = self._loop.call_soon(self._depart)

    def _depart(self) -> None:
        """Everything of this loop pass leaves as one message."""
        self._flush = None
        records, self._waiting = self._waiting, []
        if self.ended.is_set() or not records:
            return
        network = self._transport.network
        if network.draw_loss():
            self.cut("connection lost")
            return
        arrival = max(self._last_arrival, self._loop.time() + network.draw_delay())
        self._last_arrival = arrival
        self._transport.count("out", len(records), sum(size for _, size in records))
        self._flying.append((arrival, records))
        self._loop.call_at(arrival, self._arrive)

        if any(size >= _LARGE_BYTES for _, size in records):
            self._large_until = arrival

    def _large_on_its_way(self, size: int) -> bool:
        sizes = [size, *(size for _, size in self._waiting)]
        return max(sizes) >= _LARGE_BYTES or self._large_until > self._loop.time()

    def _depart_alone(self, record: Record, size: int) -> None:
        network = self._transport.network
        if network.draw_loss():
            self.cut("connection lost")
            return
        self._transport.count("out", 1, size)
        self._flights += 1
        self._alone[self._flights] = record, size
        arrival = self._loop.time() + network.draw_delay()
        self._loop.call_at(arrival, self._arrive_alone, self._flights)

    def _arrive(self) -> None:
        if self._flying:  # not cut on the way
            self._land(self._flying.popleft()[1])

    def _arrive_alone(self, flight: int) -> None:
        if flight in self._alone:
            self._land([self._alone.pop(flight)])

    def _land(self, records: list[tuple[Record, int]]) -> None:
        size = sum(size for _, size in records)
        self._queued -= size
        twin = self.twin
        if twin is not None and not twin.ended.is_set():
            twin._transport.count("in", len(records), size)
            for record, _ in records:
                twin._deliver(record)
        self._finish_if_empty()

    def _deliver(self, record: Record) -> None:
        receiver = self._transport.receiver
        if receiver is not None and not self.ending:
            receiver.received(self, record)

    def _finish_if_empty(self) -> None:
        if not self.ending or self.ended.is_set():
            return
        if self._waiting or self._flying or self._alone:
            return
        other = self.vanish()
        if other is not None:
            self._after_flight(other, "closed by the peer")

    def _after_flight(self, other: MemoryLink, reason: str) -> None:
        self._loop.call_at(
            max(self._last_arrival, self._loop.time() + self._transport.network.draw_delay()),
            other.cut_here,
            reason,
        )

    def cut(self, reason: str) -> None:
        """Both ends lose the link, a moment from now."""
        later = self._transport.network.settings.notice_s
        for end in (self, self.twin):
            if end is not None:
                self._loop.call_later(later, end.cut_here, reason)
                end._forget_all()
                end.twin = None  # what is sent until then goes nowhere

    def cut_here(self, reason: str) -> None:
        """This end notices that the link is gone."""
        if self.ended.is_set():
            return
        silent = self.ending
        self.vanish()
        receiver = self._transport.receiver
        if receiver is not None and not silent:
            receiver.link_lost(self, reason)

    def vanish(self) -> MemoryLink | None:
        """End this end in silence; gives the other end."""
        other, self.ending = self.twin, True
        self.ended.set()
        self._forget_all()
        self._queued = 0
        if self in self._transport.links:
            self._transport.links.remove(self)
        return other

    def _forget_all(self) -> None:
        self._waiting.clear()
        self._flying.clear()
        self._alone.clear()
