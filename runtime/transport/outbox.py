"""The records that wait to leave on one link, and how many of them go into one message."""

from __future__ import annotations

from collections import deque

from runtime.transport.bulk import Departures, Message, Split
from runtime.wire import frames
from runtime.wire.frames import LIMITS, Limits, Record


class Outbox:
    """A queue that is emptied in batches which the other side will accept."""

    __slots__ = (
        "_batch_bytes", "_buffers", "_departures", "_limits", "_ordered",
        "_records", "_sizes", "_splits", "queued",
    )  # fmt: skip

    def __init__(
        self,
        batch_bytes: int,
        limits: Limits = LIMITS,
        *,
        departures: Departures | None = None,
        ordered: bool = True,
    ) -> None:
        """`batch_bytes`: a batch is full when it has that many; one record is always taken.
        `departures`: where the large buffers of split records go as these leave."""
        self.queued = 0
        """Bytes of all records here, without the large buffers of split ones."""
        self._records: deque[Record | Split] = deque()
        self._sizes: deque[int] = deque()
        self._buffers = 0
        self._splits = 0
        self._batch_bytes = batch_bytes
        self._limits = limits
        self._departures = departures
        self._ordered = ordered

    def __len__(self) -> int:
        return len(self._records)

    def put(self, record: Record, size: int) -> None:
        self._records.append(record)
        self._sizes.append(size)
        self._buffers += len(record.buffers)
        self.queued += size

    def put_split(self, item: Split, size: int) -> None:
        """`size`: of the whole record."""
        assert self._departures is not None, "this link has no bulk"
        large = item.size
        self._records.append(item)
        self._sizes.append(size - large)
        self._splits += 1
        self.queued += size - large
        self._departures.total += large

    def message(self) -> Message:
        """The next batch, or the next split record, as it leaves."""
        if self._splits and isinstance(self._records[0], Split):
            return self._announce(self._records[0])
        batch, size = self.take()
        kind = frames.DATA if self._ordered else frames.LOOSE
        return Message(frames.encode_batch(batch, kind), len(batch), size)

    def take(self) -> tuple[list[Record], int]:
        """The next batch, at least one record, and its size in bytes. Ends before a split record."""
        limits, records = self._limits, self._records
        fits = self.queued <= self._batch_bytes and self._buffers <= limits.buffers
        batch: list[Record] = []
        if fits and len(records) <= limits.records and not self._splits:
            batch, size = list(records), self.queued  # type: ignore[arg-type]  # none is split
            self.clear()
            return batch, size
        size = buffers = 0
        while records and len(batch) < limits.records:
            record = records[0]
            if isinstance(record, Split):
                break
            buffers += len(record.buffers)
            if batch and (size + self._sizes[0] > self._batch_bytes or buffers > limits.buffers):
                break
            self._buffers -= len(record.buffers)
            batch.append(record)
            records.popleft()
            size += self._sizes.popleft()
        self.queued -= size
        return batch, size

    def _announce(self, item: Split) -> Message:
        assert self._departures is not None
        self._records.popleft()
        size = self._sizes.popleft()
        self._splits -= 1
        self.queued -= size
        return Message(self._departures.announce(item, self._ordered), 1, size)

    def clear(self) -> None:
        self._records.clear()
        self._sizes.clear()
        self._buffers = self._splits = self.queued = 0
