"""Records whose large buffers travel apart: how they come together again, and what is refused."""

from __future__ import annotations

import contextlib
import random
import struct
from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import WireError
from runtime.transport.bulk import Arrivals, Departures, split
from runtime.transport.outbox import Outbox
from runtime.wire import frames
from runtime.wire.frames import Buffer, Limits, Record

Act = Callable[[Arrivals], object]

THRESHOLD, PIECE = 10, 8
LIMITS = Limits(buffer_bytes=1000, record_buffers=50)


class Sender:
    """One direction of a link: what leaves on its rpc link and on its bulk link."""

    def __init__(self) -> None:
        self.departures = Departures(PIECE)
        self.outbox = Outbox(100, LIMITS, departures=self.departures)
        self.loose = Outbox(100, LIMITS, departures=self.departures, ordered=False)

    def send(self, record: Record, ordered: bool) -> None:
        item, size = split(record, THRESHOLD), frames.check_record(record, LIMITS)
        outbox = self.outbox if ordered else self.loose
        if item is not None:
            outbox.put_split(item, size)
        else:
            outbox.put(record, size)


def _receive(arrivals: Arrivals, parts: list[Buffer]) -> list[Record]:
    batch = frames.decode_batch(parts, LIMITS)
    if batch.kind == frames.SPLIT:
        return arrivals.announced(batch.records)
    if batch.kind == frames.PIECE:
        return arrivals.piece(batch.records)
    return batch.records if batch.kind == frames.LOOSE else arrivals.behind(batch.records)


_sizes = st.sampled_from([0, 1, 9, 10, 11, 16, 17, 40])
_records = st.lists(st.tuples(st.booleans(), st.lists(_sizes, max_size=4)), max_size=12)


@given(_records, st.randoms(use_true_random=False))
def test_whatever_comes_first_all_records_come_together_in_order(
    plan: list[tuple[bool, list[int]]], draw
) -> None:
    data = random.Random(0)  # not hypothesis's, whose entropy is limited
    sent = {
        b"%d" % n: (ordered, Record(b"%d" % n, [data.randbytes(size) for size in sizes]))
        for n, (ordered, sizes) in enumerate(plan)
    }
    sender, arrivals = Sender(), Arrivals(LIMITS)
    for ordered, record in sent.values():
        sender.send(record, ordered)
    ways: list[deque[list[Buffer]]] = [deque(), deque()]
    got: list[Record] = []
    queues = [sender.outbox, sender.loose, sender.departures]
    while any(queue.queued for queue in queues) or any(ways):
        queue = draw.choice(queues)
        if queue.queued:
            ways[queue is sender.departures].append(queue.message().parts)
        way = draw.choice(ways)
        if way:
            got += _receive(arrivals, way.popleft())
    assert {r.header: [bytes(b) for b in r.buffers] for r in got} == {
        header: list(record.buffers) for header, (_, record) in sent.items()
    }
    in_order = [r.header for r in got if sent[r.header][0]]
    assert in_order == [header for header, (ordered, _) in sent.items() if ordered]
    assert not arrivals.waiting
    assert sender.departures.total == 0


@given(_records, st.data())
def test_of_garbled_messages_nothing_comes_but_a_wire_error(
    plan: list[tuple[bool, list[int]]], data: st.DataObject
) -> None:
    sender, arrivals = Sender(), Arrivals(LIMITS)
    for number, (ordered, sizes) in enumerate(plan):
        sender.send(Record(b"%d" % number, [bytes(size) for size in sizes]), ordered)
    messages = []
    for queue in (sender.outbox, sender.loose, sender.departures):
        while queue.queued:
            messages.append([bytes(part) for part in queue.message().parts])
    for _ in range(data.draw(st.integers(0, 3)) if messages else 0):
        parts = data.draw(st.sampled_from(messages))
        at = data.draw(st.integers(0, len(parts) - 1))
        whole = bytearray(parts[at] or b"\0")
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
        parts[at] = bytes(whole)
    with contextlib.suppress(WireError):
        for parts in data.draw(st.permutations(messages)):
            _receive(arrivals, parts)


def _announce(number: int, *cuts: tuple[int, int]) -> Act:
    text = struct.pack("<?Q", True, number) + b"".join(struct.pack("<IQ", *cut) for cut in cuts)
    return lambda arrivals: arrivals.announced([Record(text), Record(b"h")])


def _piece(number: int, size: int, offset: int, length: int) -> Act:
    record = Record(struct.pack("<QQQ", number, size, offset), [bytes(length)])
    return lambda arrivals: arrivals.piece([record])


@pytest.mark.parametrize(
    ("reason", "acts"),
    [
        ("unknown transfer", [_piece(1, 20, 0, 8)]),
        ("unknown transfer", [_piece(0, 8, 0, 8), _piece(0, 8, 0, 8)]),
        ("truncated transfer", [_piece(0, 20, 0, 8), _piece(1, 20, 0, 8)]),
        ("piece out of place", [_piece(0, 20, 0, 8), _piece(0, 20, 0, 8)]),
        ("piece out of place", [_piece(0, 20, 8, 8)]),
        ("piece out of range", [_piece(0, 20, 0, 21)]),
        ("piece out of range", [_piece(0, 20, 0, 8), _piece(0, 30, 8, 22)]),
        ("piece out of range", [_piece(0, 20, 0, 0)]),
        ("oversized buffer", [_piece(0, 1001, 0, 8)]),
        ("oversized buffer", [_piece(0, 600, 0, 600), _piece(1, 600, 0, 600)]),
        ("oversized buffer", [_announce(0, (0, 1001))]),
        ("oversized buffer", [_announce(0, (0, 0))]),
        ("transfer number", [_announce(1, (0, 20))]),
        ("transfer size", [_announce(0, (0, 20)), _piece(0, 21, 0, 21)]),
        ("malformed split", [_announce(0)]),
        ("malformed split", [_announce(0, *((n, 20) for n in range(51)))]),
        ("malformed split", [_announce(0, (1, 20))]),
        ("malformed split", [_announce(0, (0, 20), (0, 20))]),
        ("malformed split", [_announce(0, (1, 20), (0, 20))]),
        ("malformed split", [lambda arrivals: arrivals.announced([Record(b"x")])]),
        ("malformed piece", [lambda arrivals: arrivals.piece([Record(bytes(24))])]),
        ("malformed piece", [lambda arrivals: arrivals.piece([Record(b"x", [b"y"])])]),
    ],
)
def test_what_does_not_fit_has_a_name(reason: str, acts: list[Act]) -> None:
    arrivals = Arrivals(LIMITS)
    for act in acts[:-1]:
        act(arrivals)
    with pytest.raises(WireError) as caught:
        acts[-1](arrivals)
    assert caught.value.reason == reason


def test_a_buffer_of_more_than_there_is_memory_for_is_refused() -> None:
    arrivals = Arrivals(Limits(buffer_bytes=2**62))
    with pytest.raises(WireError, match="no memory"):
        arrivals.piece([Record(struct.pack("<QQQ", 0, 2**61, 0), [b"x"])])


def test_nothing_is_cut_out_of_a_record_of_small_buffers() -> None:
    assert split(Record(b"h", [bytes(9), memoryview(bytes(8)).cast("d")]), 10) is None


def test_views_of_other_types_travel_as_bytes() -> None:
    view = memoryview(bytes(range(16))).cast("d")
    item = split(Record(b"h", [b"small", view]), 10)
    assert item is not None
    assert (item.rest, item.size) == (Record(b"h", [b"small"]), 16)
    assert [(at, bytes(large)) for at, large in item.large] == [(1, bytes(range(16)))]
