"""Headers of the protocol: round trips and garbage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import MisuseError, WireError
from runtime.wire import messages
from runtime.wire.frames import Record
from runtime.wire.messages import (
    Ack,
    Call,
    Cancel,
    Cast,
    Credit,
    Error,
    Goodbye,
    Held,
    Item,
    Missing,
    More,
    Probe,
    Result,
    Resume,
    Resumed,
    Whole,
)

ids = st.integers(0, 2**63 - 1)
names = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20
)
bodies = st.binary(max_size=50) | st.just(bytes(100_000))
buffers = st.lists(st.binary(max_size=5), max_size=3).map(tuple)
deadlines = st.none() | st.floats(0, 1e9)
calls = st.builds(
    Call,
    ids,
    st.from_regex(r"[a-z.]{1,30}", fullmatch=True),
    bodies,
    buffers,
    deadlines,
    st.booleans(),
)
id_lists = st.lists(ids, max_size=20) | st.just(list(range(10_000)))


def _refusal(function: Callable[..., object], *args: Any, **options: Any) -> str | None:
    """The reason of the WireError that `function` raises; None when it raises nothing."""
    try:
        function(*args, **options)
    except WireError as error:
        return error.reason
    return None


def _same(got: messages.Message, sent: messages.Message) -> bool:
    return type(got) is type(sent) and [
        tuple(field) if isinstance(field, list) else field for field in got
    ] == list(sent)


@given(calls)
def test_a_call_comes_out_as_it_went_in(call: Call) -> None:
    assert _same(messages.decode(messages.encode_call(*call)), call)


@given(ids, bodies, buffers)
def test_results_and_errors_come_out_as_they_went_in(id: int, body: bytes, extra: tuple) -> None:
    got = messages.decode(messages.encode_result(id, body, extra))
    assert _same(got, Result(id, body, extra))
    got = messages.decode(messages.encode_error(id, body, extra))
    assert _same(got, Error(id, body, extra))
    got = messages.decode(messages.encode_item(id, body, extra))
    assert _same(got, Item(id, body, extra))


@given(ids, id_lists)
def test_lists_of_calls_come_out_as_they_went_in(number: int, listed: list[int]) -> None:
    for encode, kind in (
        (messages.encode_credit, Credit),
        (messages.encode_resume, Resume),
        (messages.encode_resumed, Resumed),
    ):
        assert messages.decode(encode(number, listed)) == kind(number, tuple(listed))
    assert messages.decode(messages.encode_ack(listed)) == Ack(tuple(listed))


def test_the_short_messages_come_out_as_they_went_in() -> None:
    decode = messages.decode
    cast = Cast("ns.m", b"body", (b"x",))
    assert _same(decode(messages.encode_cast(cast)), cast)
    assert decode(messages.encode_cancel(8)) == Cancel(8)
    assert decode(messages.encode_more(8, 3)) == More(8, 3)
    assert decode(messages.encode_probe(Probe("a-0", ("b-1", "c"), 3, 4))) == Probe(
        "a-0", ("b-1", "c"), 3, 4
    )
    assert decode(messages.encode_goodbye("Gute Nacht")) == Goodbye("Gute Nacht")
    where = "a-0.1", "tcp://h:1", b"id"
    held = decode(messages.encode_held(9, "load", 2.5, where))
    assert held == Held(Call(9, "load", b"", (), 2.5), *where)
    assert decode(messages.encode_missing(9)) == Missing(9)
    assert _same(decode(messages.encode_whole(9, b"body", (b"x",))), Whole(9, b"body", (b"x",)))


def test_a_long_body_is_a_buffer_and_the_header_stays_short() -> None:
    body = bytes(messages.INLINE_BODY + 1)
    record = messages.encode_result(1, body, (b"other",))
    assert len(record.header) < 20
    assert record.buffers[0] is body
    assert _same(messages.decode(record), Result(1, body, (b"other",)))


def test_a_long_reason_is_cut() -> None:
    got = messages.decode(messages.encode_goodbye("x" * 10_000 + "\ud800"))
    assert got == Goodbye("x" * messages.MAX_REASON)


@pytest.mark.parametrize("name", ["", "x" * 513, "tab\tß", "\ud800"])
def test_a_method_name_that_no_peer_accepts_is_not_sent(name: str) -> None:
    with pytest.raises(MisuseError, match="method name"):
        messages.encode_call(1, name, b"")
    with pytest.raises(MisuseError, match="method name"):
        messages.encode_cast(Cast(name, b""))


_GOOD = [1, 5, "m", None, b""]


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [None],
        [True],
        ["1"],
        [99, 1],
        _GOOD[:-1],
        [*_GOOD, 1],
        *([*_GOOD[:i], wrong, *_GOOD[i + 1 :]] for i, wrong in [
            (1, -1), (1, 2**63), (1, True), (1, 1.0), (1, None),
            (2, ""), (2, b"m"), (2, "x" * 513), (2, None),
            (3, -0.5), (3, math.nan), (3, math.inf), (3, "1"), (3, True), (3, 1e300),
            (4, "text"), (4, None), (4, 1), (4, [b""]),
        ]),
        [2, "m"],
        [2, "m", 0, b""],
        [2, "m", 1],
        [2, "", b""],
        [2, b"m", b""],
        [3, 1],
        [3, -1, b""],
        [3, 1, None],
        [4, "1", b""],
        [4, 1, 5],
        [5],
        [5, -1],
        [5, 1, 1],
        [6, "a"],
        [6, "a", [], -1, 0],
        [6, "a", [], 0, None],
        [6, "", [], 0, 0],
        [6, "a", "b", 0, 0],
        [6, "a", None, 0, 0],
        [6, "a", [b"b"], 0, 0],
        [6, "a", [1], 0, 0],
        [6, "a", [""], 0, 0],
        [6, "a", ["x"] * 257, 0, 0],
        [6, "a", ["x" * 600], 0, 0],
        [7, b"x"],
        [7, "x" * 5000],
        [8, 5, "m", None],
        [8, -5, "m", None, b""],
        [9, 1],
        [9, "1", b""],
        [10, 1],
        [10, 1, -1],
        [10, None, 1],
        [10, 1, 1, 1],
        [11],
        [11, b"1234567"],
        [11, "x" * 8],
        [11, None],
        *([kind, *rest] for kind in (12, 13, 14) for rest in (
            [1], [b""], [-1, b""], [1, b"123"], [1, [1]], [1, None], [1, b"", 1], ["1", b""],
        )),
        [15, 1, "m", None, "a", "mem://a", "id"],
        [15, 1, "m", None, "", "mem://a", b"id"],
        [15, 1, "m", -1, "a", "mem://a", b"id"],
        [16, -1],
        [17, 1],
        [18, 1],
    ],
)  # fmt: skip
def test_wrong_fields_are_refused(fields: list[object]) -> None:
    with pytest.raises(WireError) as caught:
        messages.decode(Record(msgpack.packb(fields)))
    assert caught.value.reason in {"malformed message", "unknown message"}


def test_messages_without_body_have_no_buffers() -> None:
    for record in (
        messages.encode_cancel(1),
        messages.encode_probe(Probe("a")),
        messages.encode_goodbye(""),
        messages.encode_more(1, 1),
        messages.encode_ack([1]),
        messages.encode_credit(1, [1]),
        messages.encode_resume(1, [1]),
        messages.encode_resumed(1, [1]),
        messages.encode_missing(1),
        messages.encode_held(1, "m", None, ("a", "mem://a", b"id")),
    ):
        with pytest.raises(WireError):
            messages.decode(Record(record.header, [b"x"]))


@given(st.binary(max_size=80), buffers)
def test_random_bytes_are_a_message_or_a_wire_error(header: bytes, extra: tuple) -> None:
    reason = _refusal(messages.decode, Record(header, extra))
    assert reason in {None, "malformed message", "unknown message"}
