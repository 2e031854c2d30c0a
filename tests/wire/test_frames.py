"""Batches of records as frames, and what is refused."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import WireError
from runtime.wire import frames, messages
from runtime.wire.frames import BYE, DATA, HELLO, WELCOME, Limits, Record

buffers = st.lists(st.binary(max_size=20), max_size=4).map(tuple)
records = st.lists(st.builds(Record, st.binary(max_size=40), buffers), max_size=12)


def _refusal(function: Callable[..., object], *args: Any, **options: Any) -> str | None:
    """The reason of the WireError that `function` raises; None when it raises nothing."""
    try:
        function(*args, **options)
    except WireError as error:
        return error.reason
    return None


def _same(one: list[Record], other: list[Record]) -> bool:
    return [(r.header, list(map(bytes, r.buffers))) for r in one] == [
        (r.header, list(map(bytes, r.buffers))) for r in other
    ]


@given(records, st.sampled_from([DATA, HELLO, WELCOME, BYE]))
def test_a_batch_comes_out_as_it_went_in(sent: list[Record], kind: int) -> None:
    parts = frames.encode_batch(sent, kind)
    got = frames.decode_batch([bytes(part) for part in parts])
    assert got.kind == kind
    assert _same(got.records, sent)


@given(st.lists(st.binary(max_size=64), max_size=4))
def test_random_bytes_are_a_batch_or_a_wire_error(parts: list[bytes]) -> None:
    assert _refusal(frames.decode_batch, parts) != ""


@given(st.binary(max_size=64), st.lists(st.binary(max_size=8), max_size=3))
def test_a_right_preamble_with_anything_behind_it(rest: bytes, more: list[bytes]) -> None:
    head = bytes(frames.encode_batch([], DATA)[0])[:8] + rest
    assert _refusal(frames.decode_batch, [head, *more]) in {
        None,
        "truncated",
        "trailing bytes",
        "malformed header",
        "buffer count",
        "oversized header",
        "record count",
    }


def _head(*items: object) -> bytes:
    return bytes(frames.encode_batch([], DATA)[0])[:8] + msgpack.packb(list(items))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], "truncated"),
        ([b""], "truncated"),
        ([b"PR"], "truncated"),
        ([b"GET / HTTP/1.1"], "magic"),
        ([b"PR\xf5\x03\0\0\0\0\x90"], "version"),
        ([b"PR\xf5\x02\x09\0\0\0\x90"], "kind"),
        ([b"PR\xf5\x02\0\0\1\0\x90"], "flags"),
        ([b"PR\xf5\x02\0\0\0\0"], "truncated"),
        ([_head(b"x")[:-1]], "truncated"),
        ([_head(b"x") + b"x"], "trailing bytes"),
        ([b"PR\xf5\x02\0\0\0\0\xc1"], "malformed header"),
        ([b"PR\xf5\x02\0\0\0\0" + b"\x91" * 5000], "malformed header"),
        ([b"PR\xf5\x02\0\0\0\0" + msgpack.packb(b"no list")], "malformed header"),
        ([b"PR\xf5\x02\0\0\0\0" + msgpack.packb({1: 2})], "malformed header"),
        ([_head("text")], "malformed header"),
        ([_head(b"x", 2.5), b""], "malformed header"),
        ([_head(1), b""], "buffer count"),
        ([_head(b"x", 0), b""], "buffer count"),
        ([_head(b"x", -1), b""], "buffer count"),
        ([_head(b"x", 1, 1), b"", b""], "buffer count"),
        ([_head(b"x", 2), b""], "buffer count"),
        ([_head(b"x"), b""], "buffer count"),
        ([_head(b"x", 2**60), b""], "buffer count"),
    ],
)
def test_what_is_wrong_has_a_name(parts: list[bytes], reason: str) -> None:
    with pytest.raises(WireError) as caught:
        frames.decode_batch(parts)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        ([Record(b"x" * 101)], "oversized header"),
        ([Record(b"x" * 101), Record(b"y")], "oversized header"),
        ([Record(b"x" * 90)] * 20, "oversized header"),
        ([Record(b"")] * 11, "record count"),
        ([Record(b"")] * 30, "record count"),
        ([Record(b"", [b"x"] * 3)], "buffer count"),
        ([Record(b"", [b"x"] * 3), Record(b"")], "buffer count"),
        ([Record(b"", [b"x"] * 2)] * 4, "buffer count"),
    ],
)
def test_limits_hold(sent: list[Record], reason: str) -> None:
    limits = Limits(header_bytes=100, batch_bytes=1000, records=10, record_buffers=2, buffers=6)
    with pytest.raises(WireError) as caught:
        frames.decode_batch(frames.encode_batch(sent), limits)
    assert caught.value.reason == reason


def test_a_record_is_measured_before_it_is_sent() -> None:
    limits = Limits(header_bytes=10, record_buffers=2, buffer_bytes=100)
    view = memoryview(bytearray(80)).cast("d")
    assert frames.check_record(Record(b"12", [b"345", view]), limits) == 85
    for record, reason in (
        (Record(b"x" * 11), "oversized header"),
        (Record(b"", [b""] * 3), "buffer count"),
        (Record(b"", [bytes(101)]), "oversized buffer"),
    ):
        with pytest.raises(WireError) as caught:
            frames.check_record(record, limits)
        assert caught.value.reason == reason


def test_headers_keep_no_reference_to_what_came_in() -> None:
    part = bytearray(frames.encode_batch([Record(b"abc"), Record(b"def")])[0])
    batch = frames.decode_batch([part])
    part[:] = bytes(len(part))
    assert [record.header for record in batch.records] == [b"abc", b"def"]


# The fuzzer: RUNTIME_FUZZ sets how many mutations, for a long run.

_MUTATIONS = int(os.environ.get("RUNTIME_FUZZ", "30000"))


def _samples() -> list[list[bytes]]:
    call = messages.Call(7, "ns.method", b"\x91\x01", (b"buffer",), 2.5)
    some = [
        messages.encode_call(*call),
        messages.encode_cast(messages.Cast("m", b"\xc0")),
        messages.encode_result(1, bytes(40_000)),
        messages.encode_error(2, b"\x90"),
        messages.encode_cancel(3),
        messages.encode_probe(messages.Probe("a", ("b",))),
        messages.encode_goodbye("done"),
    ]
    batches = [frames.encode_batch(some), *(frames.encode_batch([record]) for record in some)]
    return [[bytes(part) for part in batch] for batch in batches]


def _mutate(parts: list[bytes], rng: random.Random) -> list[bytes]:
    parts = list(parts)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(parts))
        data = bytearray(parts[at])
        place = rng.randrange(len(data) + 1)
        action = rng.randrange(7)
        if action == 0 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif action == 1 and data:
            data[place % len(data)] = rng.randrange(256)
        elif action == 2:
            del data[place : place + rng.randint(1, 8)]
        elif action == 3:
            data[place:place] = rng.randbytes(rng.randint(1, 8))
        elif action == 4:
            data[place:place] = rng.choice(
                [b"\xdd\xff\xff\xff\xff", b"\xc6\x7f\xff\xff\xff", b"\xc1"]
            )
        elif action == 5 and len(parts) > 1:
            del parts[rng.randrange(len(parts))]
            continue
        else:
            parts.insert(rng.randrange(len(parts) + 1), rng.randbytes(rng.randint(0, 9)))
            continue
        parts[at] = bytes(data)
    return parts


def _decode_all(parts: list[bytes]) -> None:
    for record in frames.decode_batch(parts).records:
        messages.decode(record)


@pytest.mark.timeout(max(60, _MUTATIONS // 500))
def test_mutated_batches_are_batches_or_wire_errors() -> None:
    rng = random.Random(2024)
    samples = _samples()
    refused = accepted = 0
    for _ in range(_MUTATIONS):
        parts = _mutate(rng.choice(samples), rng)
        reason = _refusal(_decode_all, parts)
        assert reason != ""
        accepted, refused = accepted + (reason is None), refused + (reason is not None)
    assert refused > _MUTATIONS // 3
    assert accepted > _MUTATIONS // 50
