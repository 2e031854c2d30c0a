"""The records that wait to leave on one link, and how many of them go into one message."""

from __future__ import annotations

from collections import deque

from runtime.wire.frames import LIMITS, Limits, Record


class Outbox:
    """A queue that is emptied in batches which the other side will accept."""

    __slots__ = ("_batch_bytes", "_buffers", "_limits", "_records", "_sizes", "queued")

    def __init__(self, batch_bytes: int, limits: Limits = LIMITS) -> None:
        """`batch_bytes`: a batch is full when it has that many; one record is always taken."""
        self.queued = 0
        """Bytes of all records here."""
        self._records: deque[Record] = deque()
        self._sizes: deque[int] = deque()
        self._buffers = 0
        self._batch_bytes = batch_bytes
        self._limits = limits

    def __len__(self) -> int:
        return len(self._records)

    def put(self, record: Record, size: int) -> None:
        self._records.append(record)
        self._sizes.append(size)
        self._buffers += len(record.buffers)
        self.queued += size

    def take(self) -> tuple[list[Record], int]:
        """The next batch, at least one record, and its size in bytes."""
        limits, records = self._limits, self._records
        fits = self.queued <= self._batch_bytes and self._buffers <= limits.buffers
        if fits and len(records) <= limits.records:
            batch, size = list(records), self.queued
            self.clear()
            return batch, size
        batch, size, buffers = [], 0, 0
        while records and len(batch) < limits.records:
            buffers += len(records[0].buffers)
            if batch and (size + self._sizes[0] > self._batch_bytes or buffers > limits.buffers):
                break
            self._buffers -= len(records[0].buffers)
            batch.append(records.popleft())
            size += self._sizes.popleft()
        self.queued -= size
        return batch, size

    def clear(self) -> None:
        self._records.clear()
        self._sizes.clear()
        self._buffers = self.queued = 0
