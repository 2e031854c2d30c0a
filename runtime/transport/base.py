"""What a transport is: peers with addresses, links between them, records that travel on links.

A *record* is one message of the protocol: a header (encoded by `wire.messages`) and raw buffers
beside it. A *link* is one connection, made by one side (`outbound` there) and met by the other; it
keeps the order of its records. Many that are sent within one pass of the event loop travel together.
Two peers have one link per direction and *lane*, so that what is small and urgent never waits behind data.
What records mean is decided by `peer/`; this package moves them, and says when a link is lost.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple, Protocol, runtime_checkable

from runtime.wire.frames import Buffer as Buffer
from runtime.wire.frames import Record as Record


class Lane(IntEnum):
    """What a link is for. `BULK` is the transport's own: large buffers of records that were sent on `RPC`."""

    CONTROL = 0
    RPC = 1
    BULK = 2


class Link(Protocol):
    """One connection between two peers. Used on the event loop's thread only."""

    @property
    def peer(self) -> str:
        """Id of the process at the other end (contains its incarnation)."""
        ...

    @property
    def lane(self) -> Lane:
        """What it was made for; both ends know."""
        ...

    @property
    def outbound(self) -> bool:
        """True on the side that made the connection."""
        ...

    def send(self, record: Record, ordered: bool = True) -> None:
        """Queue a record; it leaves by the end of this loop pass. Dropped when the link is lost
        (the receiver has been told by `link_lost` then). Never blocks, never raises for the network.

        Records arrive in the order they were sent, but for those that are not `ordered`: while large
        buffers of one record are on their way, unordered ones may overtake it, and be overtaken."""
        ...

    def queued_bytes(self) -> int:
        """Bytes that were sent here and have not left yet."""
        ...

    def close(self) -> None:
        """Flush what is queued (bounded by the transport's linger) and end the link."""
        ...


@runtime_checkable
class VisitedLink(Link, Protocol):
    """A link by which other threads may send in the sleeping loop's stead (`Mailbox.visit`)."""

    def enter(self) -> bool:
        """Before that. False: records would not leave at once, so it is the loop's to send them."""
        ...

    def leave(self) -> None:
        """After that."""
        ...

    def interrupted(self) -> None:
        """A visitor got no further than to somewhere: the link is lost. On the loop."""
        ...


class Receiver(Protocol):
    """What a transport calls, on the event loop's thread. None of these may raise or block."""

    def received(self, link: Link, record: Record) -> None:
        """One record came in. Inbound links are first seen here. Buffers belong to the receiver."""
        ...

    def link_lost(self, link: Link, reason: str) -> None:
        """The link has ended: the other side is gone, refused us, or broke the protocol.
        Called once for a link; not called for those that `close` ended."""
        ...


class TransportStatistics(NamedTuple):
    """Counts since the start. `rejected`: connections ended for what they sent, by reason."""

    links: int
    rejected: dict[str, int]
    records_in: int = 0
    records_out: int = 0
    messages_in: int = 0
    messages_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


class Transport(Protocol):
    """One process's access to the network."""

    @property
    def peer(self) -> str:
        """Our own id."""
        ...

    @property
    def address(self) -> str:
        """Where others reach us; valid after `start`. See `transport.address`."""
        ...

    async def start(self, receiver: Receiver) -> None:
        """Bind. Raises `ConfigError` when the address cannot be bound, naming it."""
        ...

    def connect(self, peer: str, address: str, lane: Lane = Lane.RPC) -> Link:
        """A new outbound link, or the living one to that peer on that lane. Returns at once; records
        that are sent before it is up wait. A peer that cannot be reached is a `link_lost`."""
        ...

    def stage(self, buffer: Buffer, budget: str = "rpc") -> Buffer:
        """From any thread: a copy of `buffer` in memory that peers of this host can open without another
        copy. Where there is none, or no room in the part of it that `budget` may have ("rpc", "queue" or
        "checkpoint"): the buffer, which then travels as it is."""
        ...

    async def close(self, linger: float = 1.0) -> None:
        """Flush for at most `linger` seconds, then end everything. Idempotent."""
        ...

    def statistics(self) -> TransportStatistics: ...
