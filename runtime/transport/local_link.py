"""One end of a link over a unix socket: the records that wait to leave, and those that come in.

The first record of a pass of the loop leaves at once, those after it as one message, and so do those that are sent
while we receive. Records that the kernel has no room for wait as they are; nothing is copied for that.
A large buffer goes by the arena where both ends have the same one and there is room in it, else as it is.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from runtime.errors import MisuseError, WireError
from runtime.transport.base import Buffer, Lane, Link, Receiver, Record
from runtime.transport.copying import Copier, Entry, Handles, Waiting
from runtime.transport.link import SocketSettings, Timed
from runtime.transport.outbox import Outbox
from runtime.transport.pipe import MAX_DESCRIPTORS, Pipe
from runtime.transport.stream import PREFIX, Decoder, encode, new_space
from runtime.wire import frames

if TYPE_CHECKING:
    from runtime.transport.arena import Arena

_log = logging.getLogger(__name__)


class LocalHub:
    """What the links of a transport share: who we are, whom to tell, which of them are to be written."""

    handshake: Callable[[LocalLink, frames.Batch], None]
    """Told of messages about the link itself."""
    forget: Callable[[LocalLink], None]
    """Told when a link has ended."""

    def __init__(
        self, peer: str, settings: SocketSettings, receiver: Receiver, arena: Arena | None
    ) -> None:
        self.peer = peer
        self.settings = settings
        self.received = receiver.received
        self.lost = receiver.link_lost
        self.counts: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.gone = asyncio.Event()
        """Set whenever a link has ended."""
        self.arena = arena
        self.copier = Copier(arena, f"{peer} copier") if arena is not None else None
        self.linger_s = settings.linger_s
        self.space = new_space()
        self.loop = asyncio.get_running_loop()
        self.visited = False
        """Another thread sends while the loop sleeps: it leaves at once, and nothing is scheduled."""
        self.corked = False
        """Records wait for the end of this pass, or until what came in is dealt with."""
        self.dirty: list[LocalLink] = []
        self._corked_for_pass = False

    def cork(self) -> None:
        """Records after this one leave together, at the end of this pass."""
        if self.visited:
            return
        self.corked = self._corked_for_pass = True
        self.loop.call_soon(self._uncork)

    def _uncork(self) -> None:
        self._corked_for_pass = False
        self.flush_dirty()

    def flush_dirty(self) -> None:
        self.corked = self._corked_for_pass
        if self.dirty:
            dirty, self.dirty = self.dirty, []
            for link in dirty:
                link.dirty = False
                link.flush()

    def reject(self, link: LocalLink, error: WireError) -> None:
        """End a link for what came by it."""
        self.rejected[error.reason] += 1
        if self.rejected[error.reason] == 1:
            text = "%s: dropped the connection of %s: %s (others like it are only counted)"
            _log.warning(text, self.peer, link.peer or "a stranger", error)
        link.say(frames.BYE, str(error))
        link.end(f"broke the protocol: {error}")


class LocalLink(Timed):
    """One end of a link. Implements `base.Link`."""

    def __init__(self, hub: LocalHub, peer: str, lane: Lane, endpoint: str | None) -> None:
        settings = hub.settings
        self.peer = peer
        self.lane = lane
        self.outbound = endpoint is not None
        self.endpoint = endpoint
        self.up = False
        """Both sides know each other: records may flow."""
        self.ended = self.closing = self.dirty = False
        self.pipe: Pipe | None = None
        self.divertible = self.outbound
        """What waits here may go another way."""
        self.sound = False
        """It has ended by our own doing."""
        self._hub = hub
        self._early = settings.batch_bytes
        self.limits = settings.limits
        self._outbox = Outbox(settings.batch_bytes, settings.limits)
        self._decoder = Decoder(hub.space, settings.limits)
        self._waiting = Waiting(hub.copier, self._accept)
        self._with_descriptors: deque[Entry] = deque()
        self._offered: list[int] = []
        self._handles = Handles(hub.arena)
        self._other: Link | None = None
        self._usual = True
        """Neither closing, nor ended, nor reached by another way."""

    # sending

    def send(self, record: Record, ordered: bool = True) -> None:
        header, buffers = record
        size = len(header)
        if buffers or not self._usual or size > self._early or self._waiting.queued:
            self._send_unusual(record, ordered)
            return
        outbox, hub, pipe = self._outbox, self._hub, self.pipe
        if hub.corked or outbox.queued or not self.up or pipe is None or pipe.unsent:
            outbox.put(record, size)
            if not self.dirty or outbox.queued >= self._early:
                self._schedule()
            return
        hub.cork()
        head = frames.encode_batch((record,))[0]
        pipe.write(PREFIX.pack(len(head), 0, 0) + head)
        counts = hub.counts
        counts["messages_out"] += 1
        counts["records_out"] += 1
        counts["bytes_out"] += size

    def enter(self) -> bool:
        """See `base.VisitedLink`."""
        pipe, hub = self.pipe, self._hub
        idle = self.up and pipe is not None and not pipe.unsent and not hub.corked
        hub.visited = idle and self._usual and not self._outbox.queued and not self._waiting.queued
        return hub.visited

    def leave(self) -> None:
        """See `base.VisitedLink`."""
        self._hub.visited = False

    def interrupted(self) -> None:
        """See `base.VisitedLink`."""
        self.sound = True
        self.end("a visitor was interrupted")

    def send_descriptors(self, record: Record, descriptors: Sequence[int]) -> None:
        """Send a record, and file descriptors with it, which the other end has from `take_descriptors`. They are
        duplicated here and now. Raises `MisuseError` where the peer is not reached by a unix socket."""
        count = len(descriptors)
        if not 0 < count <= MAX_DESCRIPTORS:
            raise MisuseError(f"{count} file descriptors; allowed are 1 to {MAX_DESCRIPTORS}")
        if self._other is not None:
            raise MisuseError(f"{self.peer} is reached by ZeroMQ, which passes no file descriptors")
        size = _size(record, self)
        if self._usual:
            self.divertible = False
            # A record of our own: it is known again by its identity.
            entry = Entry(Record(*record), size, [os.dup(number) for number in descriptors])
            if not self._waiting.keep(entry, ordered=True):
                self._accept([entry])

    def _send_unusual(self, record: Record, ordered: bool) -> None:
        if self._other is not None:
            self._other.send(record, ordered)
            return
        size = _size(record, self)
        if self._usual:
            entry = Entry(record, size)
            if not self._waiting.keep(entry, ordered):
                self._accept([entry])

    def _accept(self, entries: Sequence[Entry]) -> None:
        """These wait for nothing but their turn."""
        for entry in entries:
            self._outbox.put(entry.record, entry.size)
            if entry.descriptors:
                self._with_descriptors.append(entry)
        self._schedule()

    def _schedule(self) -> None:
        """Flush in time: at once what is the first of this pass or a lot, else with what else it sends."""
        hub = self._hub
        if not hub.corked:
            hub.cork()
            self.flush()
        elif self._outbox.queued >= self._early:
            self.flush()
        elif not self.dirty:
            self.dirty = True
            hub.dirty.append(self)

    def flush(self) -> None:
        """Write what waits, as far as the kernel takes it."""
        outbox, pipe = self._outbox, self.pipe
        if not self.up or pipe is None:
            return
        while outbox.queued and not pipe.unsent:
            records, size = outbox.take()
            counts = self._hub.counts
            counts["messages_out"] += 1
            counts["records_out"] += len(records)
            counts["bytes_out"] += size
            if self._with_descriptors:
                for together, descriptors in _apart(records, self._with_descriptors):
                    self._write(pipe, together, descriptors)
            else:
                self._write(pipe, records)
        if not pipe.unsent:
            self._handles.sent()
        if self.closing and not self.queued_bytes():
            self.say(frames.BYE, "closed by the peer")
            self.drop()

    def _write(
        self, pipe: Pipe, records: Sequence[Record], descriptors: Sequence[int] = ()
    ) -> None:
        parts = frames.encode_batch(records)
        if len(parts) == 1 and not descriptors:
            pipe.write(PREFIX.pack(len(parts[0]), 0, 0) + parts[0])
        else:
            pipe.put(encode(parts, self._handles.share(parts), len(descriptors)), descriptors)

    def say(self, kind: int, *texts: str) -> None:
        """Write a message about the link itself, unless another one is being written."""
        records = [Record(text.encode("utf-8", "replace")[:4096]) for text in texts]
        if self.pipe is not None and not self.pipe.unsent:
            self.pipe.put(encode(frames.encode_batch(records, kind), frozenset(), 0))

    def queued_bytes(self) -> int:
        if self._other is not None:
            return self._other.queued_bytes()
        unsent = self.pipe.unsent if self.pipe is not None else 0
        return self._outbox.queued + self._waiting.queued + unsent

    # receiving

    def readable(self) -> bool:
        """Receive once, and hand on what is complete. False when nothing came."""
        hub, decoder, pipe = self._hub, self._decoder, self.pipe
        assert pipe is not None
        hub.corked = True
        try:
            count = pipe.receive(decoder.room())
            if count:
                parts = decoder.next(count)
                while parts is not None:
                    self._take(pipe, parts)
                    parts = decoder.next() if not self.ended else None
            else:
                self.end("connection lost")
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self.end(f"connection lost: {error}")
        except WireError as error:
            hub.reject(self, error)
        finally:
            hub.flush_dirty()
        return True

    def _take(self, pipe: Pipe, parts: list[Buffer]) -> None:
        decoder = self._decoder
        if decoder.shared:
            self._handles.open(parts, decoder.shared, wanted=not self.closing)
        batch = frames.decode_batch(parts, self.limits)
        if batch.kind != frames.DATA or not self.up:
            if decoder.pending:
                raise WireError("trailing bytes", "after a message about the link")
            self._hub.handshake(self, batch)
            return
        if decoder.descriptors:
            self._offered = pipe.descriptors(decoder.descriptors)
        counts, received = self._hub.counts, self._hub.received
        counts["messages_in"] += 1
        counts["records_in"] += len(batch.records)
        counts["bytes_in"] += sum(map(len, parts))
        for record in batch.records:
            if not self._usual:
                break
            try:
                received(self, record)
            except Exception:  # noqa: BLE001 - a bug of the receiver must not end the link for all
                _log.exception("the receiver of records from %s raised", self.peer)
        if self._offered:
            for number in self.take_descriptors():
                os.close(number)

    def take_descriptors(self) -> list[int]:
        """Those that came with the record that is being received; whoever takes them closes them."""
        taken, self._offered = self._offered, []
        return taken

    # life

    def set_up(self, member: int | None) -> None:
        """The other end has said who it is, and what it is called in the arena."""
        self.up, self.divertible, self._handles.member = True, False, member
        if member is None:
            self._waiting.copier = None
        if not self.closing:
            self.stop_timer()
        self.flush()

    def mute(self) -> None:
        """The other end takes nothing any more. What it has sent is still to be read."""
        self._discard()
        self._handles.revoke()

    def close(self) -> None:
        if self._other is not None:
            self._other.close()
        elif not self.closing and not self.ended:
            self.closing, self._usual = True, False
            self.stop_timer()
            self.timer = self._hub.loop.call_later(self._hub.linger_s, self.drop)
            if self.up:
                self.flush()
            elif not self.queued_bytes():
                self.drop()

    def divert(self, other: Link) -> None:
        """From now on this link stands for another one, which gets what waits here. Only while `divertible`."""
        entries = self._waiting.clear()
        self._other = other
        while self._outbox.queued:
            records, _ = self._outbox.take()
            for record in records:
                other.send(record)
        for entry in entries:
            other.send(entry.record)

    def end(self, reason: str) -> None:
        """The link is lost."""
        if self.ended:
            return
        silent = self.closing or not (self.outbound or self.up)
        self._detach()
        if not silent:
            self._hub.lost(self, reason)
        self._discard()

    def drop(self) -> None:
        """End without telling the receiver."""
        if not self.ended:
            self._detach()
            self._discard()

    def _detach(self) -> None:
        self.ended, self._usual, self.up = True, False, False
        self.stop_timer()
        pipe, self.pipe = self.pipe, None
        if pipe is not None:
            if self._handles.member is not None:
                self._handles.revoke()
                self._discard_unread(pipe)
            pipe.close()
        self._hub.forget(self)
        self._hub.gone.set()

    def _discard_unread(self, pipe: Pipe) -> None:
        """Let go of the handles that have come and were not read yet."""
        decoder = self._decoder
        try:
            pipe.refuse_more()
            while count := pipe.receive(decoder.room()):
                parts = decoder.next(count)
                while parts is not None:
                    self._handles.open(parts, decoder.shared, wanted=False)
                    parts = decoder.next()
        except (OSError, WireError):
            pass  # that was all of it

    def _discard(self) -> None:
        for entry in (*self._waiting.clear(), *self._with_descriptors):
            for number in entry.descriptors:
                os.close(number)
        self._with_descriptors.clear()
        self._outbox.clear()


def _size(record: Record, link: LocalLink) -> int:
    try:
        return frames.check_record(record, link.limits)
    except WireError as error:
        raise MisuseError(f"too large to be sent to {link.peer}: {error}") from None


def _apart(
    records: Sequence[Record], entries: deque[Entry]
) -> Iterator[tuple[Sequence[Record], Sequence[int]]]:
    """What goes into a message each: those that come first in `entries` alone, with their descriptors."""
    together: list[Record] = []
    for record in records:
        if entries and entries[0].record is record:
            if together:
                yield together, ()
                together = []
            yield [record], entries.popleft().descriptors
        else:
            together.append(record)
    if together:
        yield together, ()
