"""Messages on a byte stream: however it is cut, the same messages come out; what is amiss has a fixed phrase."""

from __future__ import annotations

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.errors import WireError
from runtime.transport.stream import LARGE, PREFIX, SHARED, SPACE, Decoder, encode, new_space
from runtime.wire.frames import Limits

LIMITS = Limits()
SIZES = st.sampled_from([0, 1, 7, 5000, LARGE - 1, LARGE, LARGE + 1, 200_000, SPACE + 3])


def decoded(data: bytes, cuts: list[int], space: memoryview) -> list[tuple[list[bytes], int]]:
    """Every message of `data`, which comes in pieces of these sizes, over and over."""
    decoder, found, at, turn = Decoder(space, LIMITS), [], 0, 0
    while at < len(data):
        room = decoder.room()
        assert len(room) > 0
        piece = data[at : at + min(len(room), cuts[turn % len(cuts)])]
        room[: len(piece)] = piece
        at, turn = at + len(piece), turn + 1
        parts = decoder.next(len(piece))
        while parts is not None:
            found.append(([bytes(part) for part in parts], decoder.descriptors))
            parts = decoder.next()
        space[: len(piece)] = b"\xee" * len(piece)  # others use it, too
    assert not decoder.pending
    return found


@given(
    st.lists(st.tuples(st.integers(1, 300), st.lists(SIZES, max_size=4)), min_size=1, max_size=6),
    st.lists(st.integers(1, 300_000), min_size=1, max_size=5),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_messages_come_out_however_the_stream_is_cut(
    shapes: list[tuple[int, list[int]]], cuts: list[int]
) -> None:
    messages = [
        [b"h" * head, *(bytes([number]) * size for number, size in enumerate(sizes, 1))]
        for head, sizes in shapes
    ]
    data = b"".join(
        b"".join(encode(parts, frozenset(), number)) for number, parts in enumerate(messages)
    )
    cuts = [max(cut, len(data) // 200) for cut in cuts]
    found = decoded(data, cuts, new_space())
    assert found == [(parts, number) for number, parts in enumerate(messages)]


def test_a_small_message_may_come_byte_by_byte() -> None:
    parts: list[bytes] = [b"head", b"one", b"", b"three"]
    data = b"".join(encode(parts, frozenset(), 0)) * 2
    assert decoded(data, [1], new_space()) == [(parts, 0)] * 2


def test_large_parts_are_written_from_where_they_lie_and_received_writable() -> None:
    large = bytearray(LARGE)
    chunks = encode([b"h", large, b"s"], frozenset(), 0)
    assert [len(chunk) for chunk in chunks] == [12 + 16 + 1, LARGE, 1]
    large[0] = 7
    assert chunks[1][0] == 7
    decoder, data, parts = Decoder(new_space(), LIMITS), b"".join(chunks), None
    while parts is None:
        room = decoder.room()
        piece, data = data[: len(room)], data[len(room) :]
        room[: len(piece)] = piece
        parts = decoder.next(len(piece))
    assert data == b""
    view = memoryview(parts[1])
    assert not view.readonly
    assert view[0] == 7


def test_handles_are_told_apart_from_buffers() -> None:
    data = b"".join(encode([b"h", b"buffer", b"handle"], frozenset({2}), 0))
    decoder = Decoder(new_space(), LIMITS)
    decoder.room()[: len(data)] = data
    assert decoder.next(len(data)) == [b"h", b"buffer", b"handle"]
    assert decoder.shared == [2]
    plain = b"".join(encode([b"h"], frozenset(), 0))
    decoder.room()[: len(plain)] = plain
    assert decoder.next(len(plain)) == [b"h"]
    assert decoder.shared == []


@pytest.mark.parametrize(
    ("data", "phrase"),
    [
        (PREFIX.pack(LIMITS.batch_bytes + 1, 0, 0), "oversized header"),
        (PREFIX.pack(0, 1, 0), "oversized header"),
        (PREFIX.pack(1, LIMITS.buffers + 1, 0), "buffer count"),
        (PREFIX.pack(1, 1, 0) + struct.pack("<Q", LIMITS.buffer_bytes + 1), "oversized buffer"),
        (PREFIX.pack(1, 1, 0) + struct.pack("<Q", SHARED | 65), "oversized buffer"),
        (PREFIX.pack(1, 1, 0) + struct.pack("<Q", SHARED), "oversized buffer"),
    ],
)
def test_what_is_more_than_allowed_is_refused_before_it_comes(data: bytes, phrase: str) -> None:
    decoder = Decoder(new_space(), LIMITS)
    decoder.room()[: len(data)] = data
    with pytest.raises(WireError) as caught:
        decoder.next(len(data))
    assert caught.value.reason == phrase
