"""What waits to leave a link, and how it is cut into messages."""

from __future__ import annotations

from runtime.transport.outbox import Outbox
from runtime.wire.frames import Limits, Record


def test_what_fits_leaves_at_once() -> None:
    outbox = Outbox(1000)
    records = [Record(b"%d" % i) for i in range(10)]
    for record in records:
        outbox.put(record, 10)
    assert (len(outbox), outbox.queued) == (10, 100)
    assert outbox.take() == (records, 100)
    assert (len(outbox), outbox.queued) == (0, 0)


def test_a_batch_ends_before_it_is_too_large() -> None:
    outbox = Outbox(100)
    for size in (60, 40, 1, 500, 5):
        outbox.put(Record(b"h"), size)
    assert [outbox.take()[1] for _ in range(4)] == [100, 1, 500, 5]
    assert not outbox.queued


def test_a_batch_has_no_more_records_or_buffers_than_the_other_side_takes() -> None:
    limits = Limits(records=3, buffers=4)
    outbox = Outbox(10_000, limits)
    for _ in range(7):
        outbox.put(Record(b"h"), 1)
    assert [len(outbox.take()[0]) for _ in range(3)] == [3, 3, 1]
    for count in (3, 2, 2, 9, 1):
        outbox.put(Record(b"h", [b"x"] * count), 1)
    taken = []
    while len(outbox):
        taken.append([len(record.buffers) for record in outbox.take()[0]])
    assert taken == [[3], [2, 2], [9], [1]]


def test_an_outbox_can_be_emptied() -> None:
    outbox = Outbox(10)
    outbox.put(Record(b"h", [b"x"]), 2)
    outbox.clear()
    assert (len(outbox), outbox.queued) == (0, 0)
